"""Files of a corpus: listed, checked and read."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...comm.errors import ConfigError, Problem, collect_problems, raise_if_any
from ...comm.files.file_io import config_error_context, open_regular_file, read_regular_file
from ...comm.files.strict_json import MalformedFileError
from .config import MIN_VOCAB_SIZE, DataConfig
from .manifest import CorpusFile
from .tokenizer import pretokenize

_FORMS = (".txt", ".jsonl")
_MAX_NAMES_LISTED = 8
"""Most names in the line about files that were not read."""
_DOCUMENT_BYTES, _LINE_BYTES = 2**31, 2**27
"""Largest document and line: a document is in memory as a whole, several times while it is encoded."""
_MAX_WORD = 2**16
"""Most characters of a word. Learning merges from a word of 200,000 takes 14 s, of twice as many a minute."""
_FIX = "make it readable, or remove it from the corpus"


def scan_corpus(config: DataConfig) -> tuple[CorpusFile, ...]:
    """Read the whole corpus once and return its files, sorted by name.

    Raises `ConfigError` with all problems: a missing or empty directory, broken links, files without text or not in
    UTF-8, validation files that do not exist, no file left to train on.
    """
    directory = config.corpus_directory
    if not directory.is_dir():
        raise ConfigError([Problem("data.corpus", config.corpus, "is not a directory")])
    paths = sorted(path for path in directory.iterdir() if path.suffix in _FORMS and path.is_file())
    raise_if_any(_broken_entries(directory))
    if not paths:
        hint = "holds no text: put *.txt (one document per file) or *.jsonl (one per line, key `text`) there"
        raise ConfigError([Problem("data.corpus", config.corpus, hint)])
    problems = list(_name_problems(config, [path.stem for path in paths]))
    sources = []
    for path in paths:
        with collect_problems(problems):
            sources.append(_source(path, "validation" if path.stem in config.validation else "train"))
    raise_if_any(problems)
    most = MIN_VOCAB_SIZE + sum(source.bytes for source in sources if source.split == "train")
    if config.vocab_size > most:  # checked before the tokenizer's trainer allocates memory for all entries
        hint = f"cannot be reached: the training text gives {most} entries at most; add text or ask for less"
        raise ConfigError([Problem("data.vocab_size", config.vocab_size, hint)])
    return tuple(sources)


def describe_ignored_files(directory: Path) -> str | None:
    """Return a line about directory entries that are no corpus files; None if there are none."""
    names = sorted(path.name for path in directory.iterdir() if not (path.suffix in _FORMS and path.is_file()))
    if not names:
        return None
    more = f", and {len(names) - _MAX_NAMES_LISTED} more" if len(names) > _MAX_NAMES_LISTED else ""
    shown = ", ".join(ascii(name)[1:-1] for name in names[:_MAX_NAMES_LISTED])
    count = "1 entry was" if len(names) == 1 else f"{len(names)} entries were"
    return f"{count} not read: {shown}{more}. Only *.txt and *.jsonl files directly in {directory} are read."


def _broken_entries(directory: Path) -> Iterator[Problem]:
    """Yield a problem for each broken link and each file name that is not UTF-8."""
    # A broken link may be a disk that is not mounted; skipping it would train on other data.
    for path in sorted(directory.iterdir()):
        if path.suffix not in _FORMS:
            continue
        if path.is_symlink() and not path.exists():
            yield Problem(str(path), str(path.readlink()), "is a broken link; mount its disk, or remove it")
        try:
            path.name.encode()
        except UnicodeEncodeError:
            yield Problem(ascii(str(path)), None, "has a name that is not UTF-8; rename the file")


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of one file, exactly as written. Raises `ConfigError` at the first invalid one."""
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


def _name_problems(config: DataConfig, names: Sequence[str]) -> Iterator[Problem]:
    for name, count in Counter(names).items():
        if count > 1:
            hint = f"is the name of both {name}.txt and {name}.jsonl in {config.corpus_directory}; rename one"
            yield Problem("data.corpus", name, hint)
    missing = sorted(set(config.validation) - set(names))
    for name in missing:
        yield Problem("data.validation", name, f"not a file of this corpus, which has {', '.join(names)}")
    if not missing and set(names) <= set(config.validation):
        hint = "every file is held out for validation; leave at least one to train on"
        yield Problem("data.validation", config.validation, hint)


def _source(path: Path, split: str) -> CorpusFile:
    documents = 0
    for documents, document in enumerate(read_documents(path), start=1):
        if _has_very_long_word(document):
            hint = f"holds a word of more than {_MAX_WORD // 2} letters, digits, signs or blanks in a row; break it up"
            raise ConfigError([Problem(str(path), f"document {documents}", hint)])
    with config_error_context(path, _FIX), open_regular_file(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return CorpusFile(
        work=path.stem, file=path.name, split=split, documents=documents, bytes=path.stat().st_size, sha256=sha256
    )


def _has_very_long_word(document: str) -> bool:
    """Return True for a word of more than `_MAX_WORD` characters, maybe also for one of half that length."""
    # A word of that length contains an aligned block of half of it; almost every block is ruled out by its first blank.
    blocks = (
        document[place : place + _MAX_WORD // 2]
        for place in range(0, len(document) - _MAX_WORD // 2 + 1, _MAX_WORD // 2)
    )
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
        hint = "holds half of a surrogate pair, which is no character"
        raise ConfigError([Problem(str(path), where, hint)]) from error
    return document


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("a key occurs twice")
    return tree


def _decode(path: Path, where: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = f"is not UTF-8 at byte {error.start}; convert the file"
        raise ConfigError([Problem(str(path), where, hint)]) from error
