"""The model against its references: transformers' DeepseekV3ForCausalLM; the plain one with MTP and balance loss."""

import pytest
import torch
from torch import Tensor

from shoestring.comm.topology import Topology
from shoestring.parallelism.pipeline.instruction import run_to_completion
from shoestring.tests.reference.configs import random_params, reference_configs
from shoestring.tests.reference.deepseek_v3 import losses as reference_losses
from shoestring.tests.reference.hf import gradients_of, to_transformers
from shoestring.tests.trainer.model.released import (
    largest_difference,
    make_chunk,
    released_gradients,
    run_losses,
)
from shoestring.trainer.model.forward_context import LossNormalizers

CONFIGS = reference_configs()


def window(width: int, vocabulary: int, sequences: int = 3) -> Tensor:
    return torch.randint(0, vocabulary, (sequences, width), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_transformers(name: str) -> None:
    config = CONFIGS[name]
    params = random_params(config, seed=3, dtype=torch.float32)
    tokens_BW = window(25 + config.num_nextn_predict_layers, config.vocab_size)
    inputs_BS, targets_BS = tokens_BW[:, :24], tokens_BW[:, 1:25]
    theirs = to_transformers(config, params)
    their_logits = theirs(inputs_BS).logits
    torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), targets_BS.flatten()).backward()

    chunk = make_chunk(config, params, torch.float32, Topology(), rank=0)
    with torch.no_grad():
        our_logits = run_to_completion(chunk.compute_logits(inputs_BS))
    assert 0.5 < their_logits.std().item() < 2
    assert (our_logits - their_logits).abs().max().item() <= 2e-5

    scales = LossNormalizers(main_loss=1 / targets_BS.numel(), mtp_loss=0.0, balance_loss=0.0)
    run_losses(chunk, tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool), scales)
    expected = gradients_of(theirs)
    ours = released_gradients(chunk.model)
    assert expected.keys() <= ours.keys()
    assert largest_difference({key: ours[key] for key in expected}, expected) <= 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_whole_loss_and_its_gradients_are_those_of_the_reference(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    config = CONFIGS[name]
    params = random_params(config, seed=5, dtype=dtype)
    tokens_BW = window(18 + config.num_nextn_predict_layers, config.vocab_size)
    valid_BW = torch.ones_like(tokens_BW, dtype=torch.bool)
    valid_BW[1, 11:] = False  # a sequence that ends early
    leaves = {key: value.clone().requires_grad_(not key.endswith("bias")) for key, value in params.items()}
    expected = reference_losses(leaves, config, tokens_BW, valid_BW)
    expected.total.backward()

    chunk = make_chunk(config, params, dtype, Topology(), rank=0)
    targets = int((valid_BW[:, 1 : tokens_BW.shape[1] - config.num_nextn_predict_layers]).sum())
    scales = LossNormalizers(
        main_loss=1 / targets,
        mtp_loss=config.mtp_weight / (max(1, config.num_nextn_predict_layers) * targets),
        balance_loss=config.balance_alpha / len(tokens_BW),
    )
    forward = run_losses(chunk, tokens_BW, valid_BW, scales)

    total = (
        forward.metrics.main_loss_sum * scales.main_loss
        + forward.metrics.mtp_loss_sum * scales.mtp_loss
        + forward.metrics.balance_loss_sum * scales.balance_loss
    )
    assert total.item() == pytest.approx(expected.total.item(), rel=tolerance)
    counts = list(expected.counts.values())
    assert [c.tolist() for c in forward.metrics.tokens_per_expert_E.values()] == [c.tolist() for c in counts]
    gradients = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    assert largest_difference(released_gradients(chunk.model), gradients) <= tolerance
