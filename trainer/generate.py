"""Text from a trained model, one token at a time. Without a cache of keys and values: for short samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..comm.groups import ProcessGroups
from .model.chunk import Chunk, drive


@torch.no_grad()
def generate(
    chunk: Chunk,
    prompt: Sequence[int],
    count: int,
    context: int,
    groups: ProcessGroups,
    device: torch.device,
    *,
    seed: int,
    temperature: float = 0.8,
    stop: int | None = None,
) -> list[int]:
    """Continue `prompt` by up to `count` tokens, given the last `context` of them, up to the token `stop`.

    All ranks run the same text, since the experts are spread over them; the first one draws.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(count):
        window = torch.tensor([tokens[-context:]], dtype=torch.int64, device=device)
        logits_V = drive(chunk.logits(window))[0, -1].double().cpu()
        drawn = torch.multinomial((logits_V / temperature).softmax(dim=0), 1, generator=generator)
        token = int(groups.world.broadcast(drawn, "drawn token").item())
        if token == stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
