"""Text with MTP as a draft: the same text as without for greedy decoding, the same distribution for sampling."""

from typing import cast
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from shoestring.parallelism.pipeline.instruction import Resumable
from shoestring.tests.reference.configs import random_params, reference_configs
from shoestring.tests.trainer.checkpoint.saved import save_params
from shoestring.trainer.generation.load import load_chunk_for_inference
from shoestring.trainer.generation.speculative_decoding import (
    NonFiniteLogits,
    TokenSampler,
    generate_speculatively,
    residual_distribution,
)
from shoestring.trainer.model.chunk import Chunk
from shoestring.trainer.model.config import ModelConfig


@pytest.fixture(scope="module")
def chunk(tmp_path_factory: pytest.TempPathFactory) -> Chunk:
    config = reference_configs()["full"]
    params = random_params(config, seed=5, dtype=torch.float32)
    checkpoint = save_params(config, params, tmp_path_factory.mktemp("store"))
    return load_chunk_for_inference(checkpoint, torch.device("cpu"), torch.float32)


def sampler(temperature: float, seed: int = 0) -> TokenSampler:
    return TokenSampler(torch.Generator().manual_seed(seed), temperature)


@pytest.mark.parametrize("context", [40, 12], ids=["inside the context", "beyond it"])
def test_the_likeliest_text_is_the_same_with_drafts(chunk: Chunk, context: int) -> None:
    plain = generate_speculatively(chunk, [5, 6, 7], 24, context, sampler(0), use_drafts=False)
    drafted = generate_speculatively(chunk, [5, 6, 7], 24, context, sampler(0))
    assert drafted.tokens == plain.tokens
    assert (plain.num_forwards, plain.num_drafted) == (24, 0)
    assert drafted.num_drafted > 0
    assert len(drafted.tokens) <= drafted.num_forwards + drafted.num_accepted <= len(drafted.tokens) + 1


def test_a_draft_that_is_always_right_gives_two_tokens_a_forward(chunk: Chunk) -> None:
    """The main model replaces its MTP module, so every draft is right."""
    truth = generate_speculatively(chunk, [5, 6, 7], 25, 60, sampler(0), use_drafts=False).tokens
    text = [5, 6, 7, *truth]

    def right_draft(self: Chunk, hidden_BSD: Tensor, next_BS: Tensor) -> Resumable[Tensor]:
        logits_BSV = torch.zeros((*next_BS.shape, 96))
        logits_BSV[0, -1, text[next_BS.shape[1] + 1]] = 1.0
        yield from ()
        return logits_BSV

    with patch.object(Chunk, "compute_mtp_logits", right_draft):
        found = generate_speculatively(chunk, [5, 6, 7], 24, 60, sampler(0))
    assert found.tokens == truth[:24]
    assert found.num_accepted == found.num_drafted == 12
    assert found.num_forwards == 13


def test_a_taken_or_replaced_draft_has_the_distribution_of_the_model() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        p_V, q_V = (torch.randn(7, dtype=torch.float64, generator=generator).mul(2).softmax(0) for _ in range(2))
        taken_V = torch.minimum(p_V, q_V)
        assert torch.allclose(taken_V + (1 - taken_V.sum()) * residual_distribution(p_V, q_V), p_V, rtol=1e-12)


def test_a_guess_is_taken_as_often_as_it_should_be() -> None:
    p_V, q_V = torch.tensor([0.2, 0.8]).double(), torch.tensor([0.5, 0.5]).double()
    draws = sampler(1.0)
    assert sum(draws.accepts_draft(0, p_V, q_V) for _ in range(4000)) / 4000 == pytest.approx(0.4, abs=0.03)
    assert all(draws.accepts_draft(1, p_V, q_V) for _ in range(100))


class Table(torch.nn.Module):
    """A stand-in for a chunk: the next token depends on the last one alone, and the draft is a poor guess at it."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.next_VV = torch.nn.Parameter(torch.randn(4, 4, generator=generator))
        self.guess_VV = torch.nn.Parameter(torch.randn(4, 4, generator=generator))
        self.model, self.config = self, ModelConfig()

    def compute_hidden_states(self, tokens_BS: Tensor) -> Resumable[Tensor]:
        yield from ()
        return torch.nn.functional.one_hot(tokens_BS, 4).float()

    def apply_output_head(self, hidden_BSV: Tensor) -> Tensor:
        return hidden_BSV @ self.next_VV

    def compute_mtp_logits(self, hidden_BSV: Tensor, next_BS: Tensor) -> Resumable[Tensor]:
        yield from ()
        return self.guess_VV[next_BS]


def test_drawn_text_has_the_distribution_of_the_model() -> None:
    """The first tokens after a prompt: a draft can decide the second one first; the third may follow one."""
    table, draws, counts = Table(), sampler(1.0), torch.zeros(4, 4, 4)
    for _ in range(3000):
        first, second, third = generate_speculatively(cast("Chunk", table), [2], 3, 40, draws).tokens
        counts[first, second, third] += 1
    p_VV = table.next_VV.detach().softmax(dim=1)
    expected = p_VV[2][:, None, None] * p_VV[:, :, None] * p_VV[None]
    guess_VV = table.guess_VV.detach().softmax(dim=1)
    draft_VVV = p_VV[2][:, None, None] * guess_VV[:, :, None] * p_VV[None]
    assert float((counts / 3000 - expected).abs().sum()) / 2 < 0.06
    assert float((draft_VVV - expected).abs().sum()) / 2 > 0.2  # the distribution if every draft were accepted


def test_text_ends_with_the_stop_token(chunk: Chunk) -> None:
    plain = generate_speculatively(chunk, [5, 6, 7], 24, 40, sampler(0)).tokens
    first = plain.index(plain[4])
    assert generate_speculatively(chunk, [5, 6, 7], 24, 40, sampler(0), stop_token_id=plain[4]).tokens == plain[:first]


def test_no_temperature_overflows_and_no_logit_is_infinite() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0])
    assert sampler(5e-324).probabilities(logits_V).tolist() == [0.0, 1.0, 0.0]
    for temperature in (0, 1):
        with pytest.raises(NonFiniteLogits, match="1 of 2 logits"):
            sampler(temperature).probabilities(torch.tensor([1.0, float("nan")]))
