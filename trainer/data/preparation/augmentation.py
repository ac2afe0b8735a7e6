"""Changes of documents before they are written: fill-in-the-middle, and splitting of joined tokens.

Shapes: T tokens of a document, V vocabulary.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..document_random import uniform_fractions

TokenArray = npt.NDArray[np.uint32]

_PUNCTUATION_THEN_LINE_BREAKS = re.compile(r" ?[^\w\s]+[\r\n]+")


def cut_for_fill_in_the_middle(text: str, key: int) -> tuple[str, str, str]:
    """Cut a text at two random places into prefix, middle and suffix, each maybe empty.

    The report (§4.1) applies fill-in-the-middle to whole documents, before packing, in the order prefix, suffix, middle
    (Bavarian et al. 2022); the places are uniform over the characters, as there.
    """
    first, second = sorted((uniform_fractions(key, 2) * (len(text) + 1)).astype(np.int64).tolist())
    return text[:first], text[first:second], text[second:]


def join_fill_in_the_middle(pieces: Sequence[list[int]], fim_token_ids: tuple[int, ...]) -> list[int]:
    """Put prefix, middle and suffix in the order prefix, suffix, middle, each after its control token."""
    prefix, middle, suffix = pieces
    before_prefix, before_suffix, before_middle = fim_token_ids
    return [before_prefix, *prefix, before_suffix, *suffix, before_middle, *middle]


@dataclass(frozen=True)
class TokenSplitter:
    """Splitter of tokens that join punctuation and line breaks, for a random share of their occurrences.

    A prompt that ends between the two parts would else be unlike all training text; the report (§4.1) splits "a certain
    proportion" and does not say which.
    """

    rate: float
    heads_V: npt.NDArray[np.int64]
    """Index into `pieces` of each token that can be split; -1 for the others."""
    pieces: tuple[tuple[int, ...], ...]

    @staticmethod
    def from_tokenizer(
        rate: float, vocab_size: int, decode: Callable[[int], str], encode: Callable[[str], list[int]]
    ) -> "TokenSplitter":
        """Find the tokens that join punctuation and line breaks, such as `.\\n`, and the tokens of their two parts."""
        heads_V = np.full(vocab_size, -1, dtype=np.int64)
        pieces: list[tuple[int, ...]] = []
        for token, text in _joined_tokens(vocab_size, decode):
            at = min(text.find(end) for end in "\r\n" if end in text)
            parts = (*encode(text[:at]), *encode(text[at:]))
            if token not in parts and len(parts) > 1:
                heads_V[token] = len(pieces)
                pieces.append(parts)
        return TokenSplitter(rate, heads_V, tuple(pieces))

    def split(self, tokens_T: TokenArray, key: int) -> TokenArray:
        """Return the tokens with some joined ones replaced by their parts."""
        heads_T = self.heads_V[tokens_T]
        (joined,) = np.nonzero(heads_T >= 0)
        chosen = joined[uniform_fractions(key, len(joined)) < self.rate]
        if not len(chosen):
            return tokens_T
        runs, before = [], 0
        for place in chosen.tolist():
            runs += [tokens_T[before:place], np.array(self.pieces[heads_T[place]], dtype=tokens_T.dtype)]
            before = place + 1
        return np.concatenate([*runs, tokens_T[before:]])


def _joined_tokens(vocab_size: int, decode: Callable[[int], str]) -> Iterable[tuple[int, str]]:
    for token in range(vocab_size):
        text = decode(token)
        if _PUNCTUATION_THEN_LINE_BREAKS.fullmatch(text):
            yield token, text
