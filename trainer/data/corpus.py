"""The works of a corpus on disk: found, checked, read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...comm.refusal import Problem, Refused, refuse_if_any
from .config import DataConfig
from .manifest import Source

_FORMS = (".txt", ".jsonl")


def survey(config: DataConfig) -> tuple[Source, ...]:
    """Read the whole corpus once and return its works, sorted by name.

    Raises `Refused` with everything that is wrong: a missing or empty directory, works without text or not in UTF-8,
    held-out works that do not exist, nothing left to train on.
    """
    directory = config.corpus_directory
    if not directory.is_dir():
        raise Refused([Problem("data.corpus", config.corpus, "is not a directory")])
    paths = sorted(path for path in directory.iterdir() if path.suffix in _FORMS and path.is_file())
    if not paths:
        remedy = "holds no text: put *.txt (one document a file) or *.jsonl (one a line, key `text`) there"
        raise Refused([Problem("data.corpus", config.corpus, remedy)])
    problems = list(_name_problems(config, [path.stem for path in paths]))
    sources = []
    for path in paths:
        try:
            sources.append(_source(path, "validation" if path.stem in config.validation else "train"))
        except Refused as refusal:
            problems.extend(refusal.problems)
    refuse_if_any(problems)
    return tuple(sources)


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one work, exactly as written. Raises `Refused` at the first that cannot be used."""
    if path.suffix == ".txt":
        text = _decode(path, "the file", path.read_bytes())
        if not text.strip():
            raise Refused([Problem(str(path), "", "holds no text; fill or remove the file")])
        yield text
        return
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _document(path, number, line)
    if number == 0:
        raise Refused([Problem(str(path), "", "holds no text; fill or remove the file")])


def _name_problems(config: DataConfig, works: Sequence[str]) -> Iterator[Problem]:
    for work, count in Counter(works).items():
        if count > 1:
            remedy = f"is the name of both {work}.txt and {work}.jsonl in {config.corpus_directory}; rename one"
            yield Problem("data.corpus", work, remedy)
    missing = sorted(set(config.validation) - set(works))
    for work in missing:
        yield Problem("data.validation", work, f"is no work of this corpus, which has {', '.join(works)}")
    if not missing and set(works) <= set(config.validation):
        yield Problem("data.validation", config.validation, "holds out every work; leave some to train on")


def _source(path: Path, split: str) -> Source:
    documents = sum(1 for _ in read_documents(path))
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(
        work=path.stem, file=path.name, split=split, documents=documents, bytes=path.stat().st_size, sha256=sha256
    )


def _document(path: Path, number: int, line: bytes) -> str:
    where = f"line {number}"
    text = _decode(path, where, line)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise Refused([Problem(str(path), where, f"is not JSON ({error.msg})")]) from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise Refused([Problem(str(path), where, 'must be an object with a string under the key "text"')])
    document: str = record["text"]
    if not document.strip():
        raise Refused([Problem(str(path), where, "holds no text; fill or remove the line")])
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise Refused([Problem(str(path), where, "holds half of a surrogate pair, which is no character")]) from error
    return document


def _decode(path: Path, where: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = f"is not UTF-8 at byte {error.start}; convert the file"
        raise Refused([Problem(str(path), where, remedy)]) from error
