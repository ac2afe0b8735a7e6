"""The works of a corpus on disk: found, checked, read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.files.file_io import config_error_context, open_regular_file, read_regular_file
from ...comm.files.strict_json import MalformedFileError
from .config import MIN_VOCAB_SIZE, DataConfig
from .manifest import CorpusFile
from .tokenizer import pretokenize

_FORMS = (".txt", ".jsonl")
_LISTED = 8
"""Names in a line about what was not read."""
_DOCUMENT_BYTES, _LINE_BYTES = 2**31, 2**27
"""Of one document: it is in memory as a whole, many times when it is encoded."""
_WORD = 2**16
"""Characters of a word, at most. Learning merges from 200,000 takes 14 s, and from twice as many a minute."""
_FIX = "let it be read, or take it out of the corpus"


def scan_corpus(config: DataConfig) -> tuple[CorpusFile, ...]:
    """Read the whole corpus once and return its works, sorted by name.

    Raises `ConfigError` with all that is wrong: a missing or empty directory, links that lead nowhere, works without
    text or not in UTF-8, held-out works that do not exist, nothing left to train on.
    """
    directory = config.corpus_directory
    if not directory.is_dir():
        raise ConfigError([Problem("data.corpus", config.corpus, "is not a directory")])
    paths = sorted(path for path in directory.iterdir() if path.suffix in _FORMS and path.is_file())
    raise_if_any(_broken_entries(directory))
    if not paths:
        hint = "holds no text: put *.txt (one document a file) or *.jsonl (one a line, key `text`) there"
        raise ConfigError([Problem("data.corpus", config.corpus, hint)])
    problems = list(_name_problems(config, [path.stem for path in paths]))
    sources = []
    for path in paths:
        try:
            sources.append(_source(path, "validation" if path.stem in config.validation else "train"))
        except ConfigError as refusal:
            problems.extend(refusal.problems)
    raise_if_any(problems)
    most = MIN_VOCAB_SIZE + sum(source.bytes for source in sources if source.split == "train")
    if config.vocab_size > most:  # before the trainer of the tokenizer reserves memory for all entries
        hint = f"cannot be reached: the training text gives {most} entries at most; add text or ask for less"
        raise ConfigError([Problem("data.vocab_size", config.vocab_size, hint)])
    return tuple(sources)


def describe_ignored_files(directory: Path) -> str | None:
    """A line about the entries of a corpus that are no works; None where every entry is one."""
    names = sorted(path.name for path in directory.iterdir() if not (path.suffix in _FORMS and path.is_file()))
    if not names:
        return None
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    shown = ", ".join(ascii(name)[1:-1] for name in names[:_LISTED])
    count = "1 entry was" if len(names) == 1 else f"{len(names)} entries were"
    return f"{count} not read: {shown}{more}. A work is a file *.txt or *.jsonl in {directory} itself."


def _broken_entries(directory: Path) -> Iterator[Problem]:
    """A link without an end may be a disk that is not mounted; a name that is no text cannot be kept."""
    for path in sorted(directory.iterdir()):
        if path.suffix not in _FORMS:
            continue
        if path.is_symlink() and not path.exists():
            yield Problem(str(path), str(path.readlink()), "is a link that leads nowhere; mount its disk, or remove it")
        try:
            path.name.encode()
        except UnicodeEncodeError:
            yield Problem(ascii(str(path)), None, "has a name that is not UTF-8; rename the file")


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one work, exactly as written. Raises `ConfigError` at the first that cannot be used."""
    if path.suffix == ".txt":
        with config_error_context(path, _FIX):
            raw = read_regular_file(path, _DOCUMENT_BYTES)
        text = _decode(path, "the file", raw)
        if not text.strip():
            raise ConfigError([Problem(str(path), "", "holds no text; fill or remove the file")])
        yield text
        return
    number = 0
    with config_error_context(path, _FIX), open_regular_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(_LINE_BYTES + 1), b""), start=1):
            if len(line) > _LINE_BYTES:
                raise MalformedFileError(f"line {number}", None, f"is longer than {_LINE_BYTES} bytes")
            yield _document(path, number, line)
    if number == 0:
        raise ConfigError([Problem(str(path), "", "holds no text; fill or remove the file")])


def _name_problems(config: DataConfig, works: Sequence[str]) -> Iterator[Problem]:
    for work, count in Counter(works).items():
        if count > 1:
            hint = f"is the name of both {work}.txt and {work}.jsonl in {config.corpus_directory}; rename one"
            yield Problem("data.corpus", work, hint)
    missing = sorted(set(config.validation) - set(works))
    for work in missing:
        yield Problem("data.validation", work, f"is no work of this corpus, which has {', '.join(works)}")
    if not missing and set(works) <= set(config.validation):
        yield Problem("data.validation", config.validation, "holds out every work; leave some to train on")


def _source(path: Path, split: str) -> CorpusFile:
    documents = 0
    for documents, document in enumerate(read_documents(path), start=1):
        if _has_endless_word(document):
            hint = f"holds a word of more than {_WORD // 2} letters, digits, signs or blanks in a row; break it up"
            raise ConfigError([Problem(str(path), f"document {documents}", hint)])
    with config_error_context(path, _FIX), open_regular_file(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return CorpusFile(
        work=path.stem, file=path.name, split=split, documents=documents, bytes=path.stat().st_size, sha256=sha256
    )


def _has_endless_word(document: str) -> bool:
    """Whether it has a word of more than `_WORD` characters; perhaps also for one of half of that.

    A word twice as long holds an aligned block of them. Almost every block ends at its first blank here.
    """
    blocks = (document[place : place + _WORD // 2] for place in range(0, len(document) - _WORD // 2 + 1, _WORD // 2))
    return any(len(pretokenize(block)) == 1 for block in blocks if block.isspace() or len(block.split(None, 1)) == 1)


def _document(path: Path, number: int, line: bytes) -> str:
    where = f"line {number}"
    text = _decode(path, where, line)
    try:
        record = json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
        raise ConfigError([Problem(str(path), where, f"is not JSON ({error})")]) from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ConfigError([Problem(str(path), where, 'must be an object with a string under the key "text"')])
    document: str = record["text"]
    if not document.strip():
        raise ConfigError([Problem(str(path), where, "holds no text; fill or remove the line")])
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            [Problem(str(path), where, "holds half of a surrogate pair, which is no character")]
        ) from error
    return document


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a key stands twice")
    return tree


def _decode(path: Path, where: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = f"is not UTF-8 at byte {error.start}; convert the file"
        raise ConfigError([Problem(str(path), where, hint)]) from error
