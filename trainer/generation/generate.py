"""Text generation during training, one token at a time, without a KV cache: for short samples."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...comm.groups import ProcessGroups
from ...comm.host_transfer import to_device, to_host
from ...parallelism.pipeline.executor import PipelineExecutor
from ..model.chunk import Chunk
from ..run.exit import RunFailed, never_stop
from ..run.stage_runner import LogitsStage


@torch.no_grad()
def generate(
    chunks: tuple[Chunk, ...],
    executor: PipelineExecutor,
    prompt: Sequence[int],
    count: int,
    context: int,
    groups: ProcessGroups,
    device: torch.device,
    *,
    seed: int,
    temperature: float = 0.8,
    stop_token_id: int | None = None,
    stop_requested: Callable[[], bool] = never_stop,
) -> list[int] | None:
    """Continue `prompt` by up to `count` tokens or until `stop_token_id`; the model sees the last `context` tokens.

    `executor` runs one forward. All ranks read the same text, since layers and experts are distributed over them; one
    rank that has the logits draws. All ranks stop and return None after a token at which `stop_requested` was true on
    any of them. Raises `RunFailed` on all ranks for logits that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        window = torch.tensor([tokens[-context:]], dtype=torch.int64, device=device)
        stages = [LogitsStage(chunk, window) for chunk in chunks]
        executor.run(stages)
        drawn = torch.zeros(1, dtype=torch.int64)
        for logits_BSV in (logits for stage in stages for logits in stage.logits):
            logits_V = logits_BSV[0, -1].double().cpu()
            drawn = _draw(logits_V / temperature, generator)
        if groups.topology.dp_rank(groups.rank) != 0:  # of all ranks, one with the logits adds its token to the sum
            drawn.zero_()
        local = torch.cat((drawn, torch.tensor([stop_requested()], dtype=torch.int64)))
        token, asked = map(int, to_host(groups.world.all_reduce_sum(to_device(local, device), "drawn token")).tolist())
        if asked:
            return None
        if token < 0:
            hint = "check the model's values, such as model.routed_scaling_factor and model.rope_scaling.mscale"
            raise RunFailed(f"the logits of the sample's token {len(tokens) - len(prompt)} are not finite; {hint}")
        if token == stop_token_id:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _draw(logits_V: Tensor, generator: torch.Generator) -> Tensor:
    """Return a token, int64 [1]; -1 if the logits are not finite."""
    # No exception here: the other ranks wait for a number in the all-reduce.
    if not torch.isfinite(logits_V).all():
        return torch.tensor([-1])
    return torch.multinomial(logits_V.softmax(dim=0), 1, generator=generator)
