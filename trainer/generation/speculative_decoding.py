"""Speculative decoding on one process: the MTP module drafts the token after the next, and the main model checks it.

A forward of the main model over the text and one draft token gives the distributions of the draft token and of the one
after it. The draft is accepted with probability min(1, p / q) and otherwise replaced by a draw from max(0, p - q), so
the text is distributed as without drafts (Leviathan et al. 2023, algorithm 1). The report measures an acceptance rate
of 85-90 % (§5.4.3). There is no KV cache: for short samples.

Letters: V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...parallelism.pipeline.instruction import run_to_completion
from ..model.chunk import Chunk


class NonFiniteLogits(ArithmeticError):  # noqa: N818 -- says what the logits are
    """Error for logits that are not finite."""


@dataclass
class Continuation:
    """Generated tokens and draft statistics."""

    tokens: list[int]
    num_forwards: int = 0
    """Forwards of the main model."""
    num_drafted: int = 0
    """Draft tokens that were checked."""
    num_accepted: int = 0
    """Draft tokens that were accepted."""


@dataclass(frozen=True)
class TokenSampler:
    """Sampler of tokens from logits."""

    generator: torch.Generator
    temperature: float
    """Softmax temperature; 0 takes the most likely token."""

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """Return the token probabilities, FP64 [V]. Raises `NonFiniteLogits`."""
        bad = int((~torch.isfinite(logits_V)).sum())
        if bad:
            raise NonFiniteLogits(f"{bad:,} of {logits_V.numel():,} logits are not finite")
        if self.temperature == 0:
            return torch.zeros_like(logits_V, dtype=torch.float64).scatter_(0, logits_V.argmax(keepdim=True), 1.0)
        logits_V = logits_V.double()
        return ((logits_V - logits_V.max()) / self.temperature).softmax(dim=0)  # at most 0: no temperature overflows

    def sample_token(self, probabilities_V: Tensor) -> int:
        """Draw one token."""
        return int(torch.multinomial(probabilities_V, 1, generator=self.generator).item())

    def accepts_draft(self, token: int, p_V: Tensor, q_V: Tensor) -> bool:
        """Return whether a draft `token` drawn from q is accepted for p: with probability min(1, p / q)."""
        chance = float(torch.rand((), dtype=torch.float64, generator=self.generator))
        return chance * float(q_V[token]) < float(p_V[token])


def residual_distribution(p_V: Tensor, q_V: Tensor) -> Tensor:
    """Return the distribution max(0, p - q), normalized, that replaces a rejected draft."""
    rest_V = (p_V - q_V).clamp(min=0)
    return rest_V / rest_V.sum()


@torch.no_grad()
def generate_speculatively(
    chunk: Chunk,
    prompt: Sequence[int],
    count: int,
    context: int,
    sampler: TokenSampler,
    *,
    stop_token_id: int | None = None,
    use_drafts: bool = True,
) -> Continuation:
    """Continue `prompt` by up to `count` tokens or until `stop_token_id`; the model sees the last `context` tokens.

    Text that fills the context is continued without drafts, as is a model without MTP. Raises `NonFiniteLogits`.
    """
    text, result = list(prompt), Continuation([])
    guess: tuple[int, Tensor] | None = None
    while len(result.tokens) < count:
        window = text[-context:] if guess is None else [*text, guess[0]]
        hidden_BSD = run_to_completion(chunk.compute_hidden_states(_row(window, chunk)))
        result.num_forwards += 1
        p_SV = [sampler.probabilities(logits_V) for logits_V in chunk.apply_output_head(hidden_BSD[0, -2:]).cpu()]
        if guess is None:
            found = [sampler.sample_token(p_SV[-1])]
        elif sampler.accepts_draft(guess[0], p_SV[0], guess[1]):
            found = [guess[0], sampler.sample_token(p_SV[1])]
            result.num_accepted += 1
        else:
            found = [sampler.sample_token(residual_distribution(p_SV[0], guess[1]))]
            hidden_BSD = hidden_BSD[:, :-1]  # the last position has read the guess
        result.num_drafted += guess is not None
        for token in found:
            if token == stop_token_id or len(result.tokens) == count:
                return result
            text.append(token)
            result.tokens.append(token)
        guess = None
        if use_drafts and chunk.model.config.num_nextn_predict_layers and len(text) < context:
            q_V = sampler.probabilities(
                run_to_completion(chunk.compute_mtp_logits(hidden_BSD, _row(text[1:], chunk)))[0, -1].cpu()
            )
            guess = sampler.sample_token(q_V), q_V
    return result


def _row(tokens: Sequence[int], chunk: Chunk) -> Tensor:
    return torch.tensor([tokens], dtype=torch.int64, device=next(chunk.model.parameters()).device)
