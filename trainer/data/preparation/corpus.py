"""Files of a corpus: found, assigned to training and validation, and sampled for a tokenizer."""

import fnmatch
from collections.abc import Callable, Collection, Iterator, Sequence

from ....comm.errors import ConfigError, Problem, raise_if_any
from ..config import DataConfig
from ..document_random import document_key, uniform_fraction
from ..formats import BadRecords, describe_ignored, is_readable, read_documents, stem
from ..storage import StoredFile, list_files
from .tasks import CorpusFile
from .token_files import is_companion, is_token_file

SAMPLE_BYTES = 2**26
"""Most text that a tokenizer is trained on. Memory grows with the sample, and the merges hardly change beyond it."""
_MAX_WORD = 2**15
"""Most characters between blanks in the sample. Learning merges from a word of 200,000 takes 14 s, of twice as many a
minute; text without blanks, such as base64, teaches a tokenizer nothing."""
_MAX_NAMES = 8


def list_corpus(config: DataConfig, report: Callable[[str], None]) -> tuple[CorpusFile, ...]:
    """Return the files of the corpus, sorted by name; report what is left out.

    Raises `ConfigError` for a place without readable files and for validation names that match none or leave none.
    """
    found = list_files(config.corpus_location)
    names = frozenset(file.name for file in found)
    token_files = frozenset(file for file in found if is_token_file(file.name, names))
    files = [file for file in found if is_readable(file) or file in token_files]
    ignored = [file for file in found if file not in files and not is_companion(file.name, names)]
    if (line := describe_ignored(ignored, config.corpus)) is not None:
        report(line)
    raise_if_any(_token_file_problems(config, token_files))
    if not files:
        hint = "holds no text: put *.jsonl or *.parquet (key `text`), or *.txt (one document per file) there"
        raise ConfigError([Problem("data.corpus", config.corpus, hint)])
    raise_if_any(_validation_problems(config, [file.name for file in files]))
    return tuple(
        CorpusFile(file, any(_matches(file.name, pattern) for pattern in config.validation), file in token_files)
        for file in files
    )


def _token_file_problems(config: DataConfig, token_files: Collection[StoredFile]) -> Iterator[Problem]:
    """Yield a problem for each setting that token files, which are read in place, cannot follow."""
    if not token_files:
        return
    if config.tokenizer is None:
        yield Problem("data.tokenizer", None, "must name the tokenizer that the corpus's token files were made with")
    for key in ("validation_fraction", "fim_rate", "token_split_rate"):
        if (value := getattr(config, key)) > 0:
            hint = "is for text, and the corpus has token files, which are read as they are"
            yield Problem(f"data.{key}", value, hint)


def _matches(name: str, pattern: str) -> bool:
    """Return True if `pattern` is the file's path in the corpus, its name without suffix, or a glob of its path."""
    return pattern in (name, stem(name)) or fnmatch.fnmatchcase(name, pattern)


def _validation_problems(config: DataConfig, names: Sequence[str]) -> Iterator[Problem]:
    missing = [pattern for pattern in config.validation if not any(_matches(name, pattern) for name in names)]
    shown = ", ".join(sorted({stem(name) for name in names[: _MAX_NAMES + 1]})[:_MAX_NAMES])
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    for pattern in missing:
        yield Problem("data.validation", pattern, f"not a file of this corpus, which has {shown}{more}")
    if not missing and all(any(_matches(name, pattern) for pattern in config.validation) for name in names):
        hint = "every file is held out for validation; leave at least one to train on"
        yield Problem("data.validation", config.validation, hint)


def sample_texts(config: DataConfig, files: Sequence[CorpusFile], skipped: BadRecords) -> Iterator[str]:
    """Yield documents of the training files, from the start of each in proportion to its size.

    Documents with a very long word are left out. Broken records are counted in `skipped`.
    """
    train = [file.stored for file in files if not file.is_validation]
    total = max(1, sum(file.bytes for file in train))
    for file in train:
        room = max(1, SAMPLE_BYTES * file.bytes // total) if total > SAMPLE_BYTES else SAMPLE_BYTES
        for document in read_documents(file, config.text_key, None, skipped):
            if room <= 0:
                break
            room -= len(document.text)
            key = document_key(config.seed, "validation", file.name, document.place)
            if uniform_fraction(key) < config.validation_fraction:
                continue
            if not _has_very_long_word(document.text):
                yield document.text


def _has_very_long_word(text: str) -> bool:
    # A word of that length contains an aligned block of half of it; almost every block is ruled out by its first blank.
    half = _MAX_WORD // 2
    blocks = (text[place : place + half] for place in range(0, len(text) - half + 1, half))
    return any(block.isspace() or len(block.split(None, 1)) == 1 for block in blocks)
