"""`shoestring data preview`: the samples that a run sees first, decoded, with control tokens marked."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from ...comm.errors import ConfigError, Problem
from ...trainer.build import open_samples
from ...trainer.config import RunConfig
from ...trainer.data.prepared import open_prepared_data
from ...trainer.data.samples import SampleOrder
from ...trainer.data.tokenizer import Tokenizer
from ..answers.blocks import Answer, Block, MarkedText, TextSpan


def preview_answer(config: RunConfig, count: int) -> Answer:
    """Return the first `count` samples of the run. Raises `ConfigError` without prepared data."""
    if count < 1:
        raise ConfigError([Problem("--samples", count, "must be at least 1")])
    prepared = open_prepared_data(config.data)
    train, _ = open_samples(config, prepared)
    order = SampleOrder(config.training.seed, len(train))
    indices = order.sample_indices(0, min(count, len(train))).tolist()
    length, end = config.training.sequence_length, prepared.tokenizer.eos_token_id
    blocks: list[Block] = []
    samples = []
    for index, tokens_W in zip(indices, train.read_batch(indices).tokens_BW.tolist(), strict=True):
        tokens = tokens_W[: length + 1]
        ends = tokens[:-1].count(end)
        spans = list(_spans(tokens, prepared.tokenizer))
        blocks.append(MarkedText(f"Sample {index}: {length} targets, parts of {ends + 1} documents", spans))
        samples.append({"index": index, "targets": length, "documents": ends + 1, "tokens": tokens})
    title = f"Samples of {config.data.prepared}"
    return Answer.from_blocks(title, {"directory": config.data.prepared, "samples": samples}, blocks)


def _spans(tokens: Sequence[int], tokenizer: Tokenizer) -> Iterator[TextSpan]:
    controls = tokenizer.control_tokens
    for name, run in groupby(tokens, controls.get):
        if name is None:
            yield TextSpan(tokenizer.decode(list(run)))
        else:
            yield from (TextSpan(name, "control") for _ in run)
