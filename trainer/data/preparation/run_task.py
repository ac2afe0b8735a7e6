"""One task of a preparation: documents to tokens, in shuffled buckets, to the files of a part and a completion record.

Shapes: T tokens of a document.
"""

import hashlib
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ....comm.errors import ConfigError, Problem, raise_if_any
from ....comm.files.file_io import read_json, replace_file_atomically
from ....comm.files.strict_json import MalformedFileError
from ..document_random import document_key, uniform_fraction
from ..files import HashedFileWriter, fsync_directory, split_by_size
from ..formats import BadRecords, read_documents
from ..manifest import CorpusPiece, DataPart, FileEntry, PreparationSettings, SplitPart
from ..shards import SplitPartWriter
from ..storage import StoredFile, current_signature, hash_stored_file, local_path
from ..tokenizer import Tokenizer
from .augmentation import TokenArray, TokenSplitter, cut_for_fill_in_the_middle, join_fill_in_the_middle
from .tasks import Task
from .token_files import index_signature, read_token_file

TASKS_FOLDER = "tasks"
"""Folder of the completion records, in the prepared directory."""
_ABANDONED_SECONDS = 3600.0
_BATCH_CHARACTERS = 2**20
"""Text that is encoded at once: enough to outweigh the call, little enough for memory."""
_BUCKET_TOKENS, _BUCKET_DOCUMENTS = 2**23, 2**18
"""Documents are shuffled within a bucket of this size, 32 MiB of tokens."""


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """Completion record of a task: what it was made from and its part. Written when the part's files are on disk."""

    settings: str
    """Digest of the settings."""
    signatures: tuple[str, ...]
    """State of each source file when it was read."""
    bad: tuple[str, ...]
    """The first broken records, each with file and line."""
    notes: tuple[str, ...] = ()
    """Remarks about the files."""
    part: DataPart


@dataclass(frozen=True)
class PreparationJob:
    """Facts that all tasks of a preparation share."""

    directory: Path
    settings: PreparationSettings
    tokenizer: Tokenizer
    max_bad_records: int
    report_progress: Callable[[int, int], None] | None = None
    """Called after each batch with its bytes of text and its tokens."""

    @cached_property
    def token_splitter(self) -> TokenSplitter | None:
        """Splitter of joined tokens; None if none is to be split."""
        settings, tokenizer = self.settings, self.tokenizer
        if settings.token_split_rate == 0:
            return None
        return TokenSplitter.from_tokenizer(
            settings.token_split_rate, settings.vocab_size, lambda token: tokenizer.decode([token]), tokenizer.encode
        )


class _Tokenized(NamedTuple):
    key: int
    is_validation: bool
    tokens_T: TokenArray
    text_bytes: int


class _Text(NamedTuple):
    file: str
    place: int
    text: str


def run_task(job: PreparationJob, task: Task) -> TaskRecord:
    """Run `task`: write its files into the prepared directory, then its completion record.

    Raises `ConfigError` for broken records beyond the limit and for unreadable files, and `OSError` for a directory
    that cannot be written.
    """
    # The files get their names when all of them are on disk: a killed task leaves a folder that the next call removes.
    # Random, as a container may have the same name and process numbers as the one before it.
    mark = f"{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}"
    folder = job.directory / TASKS_FOLDER / f"{task.name}.unfinished-{mark}"
    folder.mkdir()
    try:
        record = _read_in_place(job, task, folder) if task.is_token_file else _tokenize_files(job, task, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    fsync_directory(job.directory)
    replace_file_atomically(record_path(job.directory, task), _to_json(record))
    return record


def _tokenize_files(job: PreparationJob, task: Task, folder: Path) -> TaskRecord:
    bad = BadRecords(job.max_bad_records)
    splits = _write_splits(job, task, folder, bad)
    pieces = tuple(_piece(task, file) for file in task.files)
    _refuse_changed_files(task)  # after both reads: the tokens and the hash are of the same bytes
    part = DataPart(
        task=task.name,
        pieces=pieces,
        empty_records=bad.empty,
        bad_records=bad.count,
        train=_publish(job.directory, task, pieces, folder, splits["train"]),
        validation=_publish(job.directory, task, pieces, folder, splits["validation"]),
    )
    return TaskRecord(
        settings=job.settings.digest,
        signatures=_signatures(task),
        bad=tuple(str(problem) for problem in bad.problems),
        part=part,
    )


def _read_in_place(job: PreparationJob, task: Task, folder: Path) -> TaskRecord:
    """Read a token file of another program to its end, and write where its documents begin."""
    (file,), signatures = task.files, _signatures(task)
    found = read_token_file(file, job.settings.eos_token_id)
    if found.largest_token >= job.settings.vocab_size:
        hint = f"is a token of it, and the tokenizer has {job.settings.vocab_size} ids; name its own as data.tokenizer"
        raise ConfigError([Problem(file.url, found.largest_token, hint)])
    documents = len(found.starts_M)
    with closing(HashedFileWriter(folder / "documents")) as starts:
        starts.write(found.starts_M.astype("<i8").tobytes())
    pieces = (CorpusPiece(file=file.name, start=0, bytes=file.bytes, sha256=found.entry.sha256),)
    _refuse_changed_files(task)
    if _signatures(task) != signatures:
        raise ConfigError([Problem(file.url, None, "has an index that changed while it was read; run it again")])
    name = f"{_prefix(task, pieces)}.{'validation' if task.is_validation else 'train'}.documents"
    (folder / "documents").rename(job.directory / name)
    split = SplitPart(
        tokens=found.tokens,
        documents=documents,
        bytes=0,
        shards=(found.entry,),
        starts=replace(starts.entry, file=name),
    )
    place = Path(os.path.realpath(local_path(file.url)))
    part = DataPart(
        task=task.name,
        pieces=pieces,
        folder=str(place.parent),
        dtype=found.dtype,
        empty_records=0,
        bad_records=0,
        train=None if task.is_validation else split,
        validation=split if task.is_validation else None,
    )
    without_end = documents - found.documents_with_end
    note = f"{file.name}: {without_end} of {documents} documents do not end with the end token"
    notes = (note,) if without_end else ()
    return TaskRecord(settings=job.settings.digest, signatures=signatures, bad=(), notes=notes, part=part)


def _signatures(task: Task) -> tuple[str, ...]:
    """Return the state of each file as it was listed; of a token file also that of its index."""
    return tuple(
        f"{file.signature} {index_signature(file)}" if task.is_token_file else file.signature for file in task.files
    )


def _refuse_changed_files(task: Task) -> None:
    """Raise `ConfigError` for a file that has changed since it was listed."""
    raise_if_any(
        Problem(file.url, None, "has changed while it was read; run the same command again")
        for file in task.files
        if current_signature(file) != file.signature
    )


def _prefix(task: Task, pieces: tuple[CorpusPiece, ...]) -> str:
    """Return the begin of the names of the task's files: a changed corpus file does not overwrite its old tokens."""
    content = json.dumps([asdict(piece) for piece in pieces])
    return f"{task.name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def remove_abandoned_folders(directory: Path) -> None:
    """Remove what killed tasks have left: those of dead processes here, and of other machines after an hour."""
    for left in (directory / TASKS_FOLDER).glob("*.unfinished-*"):
        machine, process, _ = left.name.partition(".unfinished-")[2].rsplit("-", 2)
        if machine == platform.node():
            is_abandoned = not Path(f"/proc/{process}").exists()
        else:
            newest = max((path.stat().st_mtime for path in (left, *left.iterdir())), default=0.0)
            is_abandoned = time.time() - newest > _ABANDONED_SECONDS
        if is_abandoned:
            shutil.rmtree(left, ignore_errors=True)


def record_path(directory: Path, task: Task) -> Path:
    """Return the path of the completion record of `task`."""
    return directory / TASKS_FOLDER / f"{task.name}.json"


def find_record(directory: Path, task: Task, settings: PreparationSettings) -> TaskRecord | None:
    """Return the record of `task` if it was completed with these settings and its files are as they were then.

    A file whose signature has changed, as by a copy to another machine, is read and compared by its hash.
    """
    path = record_path(directory, task)
    try:
        record = read_json(path).as_dataclass(TaskRecord)
    except (OSError, MalformedFileError):  # not completed, or damaged: the task runs again
        return None
    if record.settings != settings.digest or len(record.signatures) != len(task.files):
        return None
    if any(not _has_size(directory / entry.file, entry.bytes) for entry in record.part.files):
        return None
    signatures = _signatures(task)
    if signatures != record.signatures:
        if task.is_token_file or any(
            piece != _piece(task, file) for piece, file in zip(record.part.pieces, task.files, strict=True)
        ):
            return None
        record = replace(record, signatures=signatures)
        replace_file_atomically(path, _to_json(record))
    return record


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _to_json(record: TaskRecord) -> bytes:
    return (json.dumps(asdict(record)) + "\n").encode()


def _piece(task: Task, file: StoredFile) -> CorpusPiece:
    start, size = (0, file.bytes) if task.part is None else (task.part.start, task.bytes)
    return CorpusPiece(file=file.name, start=start, bytes=size, sha256=hash_stored_file(file, start, size))


def _write_splits(job: PreparationJob, task: Task, folder: Path, bad: BadRecords) -> dict[str, SplitPart | None]:
    settings = job.settings
    with (
        closing(SplitPartWriter(folder, "train", settings.numpy_dtype, settings.shard_tokens)) as train,
        closing(SplitPartWriter(folder, "validation", settings.numpy_dtype, settings.shard_tokens)) as validation,
    ):
        documents = _tokenize(job, _texts(task, settings.text_key, bad))
        for bucket in _buckets(documents):
            if settings.shuffle:
                bucket.sort(key=lambda document: document.key)
            for writer, is_validation in ((train, False), (validation, True)):
                chosen = [each for each in bucket if (each.is_validation or task.is_validation) == is_validation]
                writer.add_documents([each.tokens_T for each in chosen], sum(each.text_bytes for each in chosen))
        return {"train": train.finish(), "validation": validation.finish()}


def _texts(task: Task, text_key: str, bad: BadRecords) -> Iterator[_Text]:
    for file in task.files:
        for document in read_documents(file, text_key, task.part, bad):
            yield _Text(file.name, document.place, document.text)


def _tokenize(job: PreparationJob, texts: Iterator[_Text]) -> Iterator[_Tokenized]:
    for batch in split_by_size(texts, lambda text: len(text.text), _BATCH_CHARACTERS):
        tokenized = [_finish(job, text, tokens) for text, tokens in zip(batch, _encode(job, batch), strict=True)]
        if job.report_progress is not None:
            tokens = sum(len(each.tokens_T) for each in tokenized)
            job.report_progress(sum(each.text_bytes for each in tokenized), tokens)
        yield from tokenized


def _encode(job: PreparationJob, batch: list[_Text]) -> list[list[int]]:
    """Return the tokens of each text, a share of them reordered for fill-in-the-middle."""
    settings = job.settings
    if settings.fim_rate == 0:
        return job.tokenizer.encode_batch([text.text for text in batch])
    keys = [document_key(settings.seed, "fim", text.file, text.place) for text in batch]
    cuts = [
        cut_for_fill_in_the_middle(text.text, key) if uniform_fraction(key) < settings.fim_rate else (text.text,)
        for text, key in zip(batch, keys, strict=True)
    ]
    encoded = iter(job.tokenizer.encode_batch([piece for cut in cuts for piece in cut]))
    pieces = [[next(encoded) for _ in cut] for cut in cuts]
    return [each[0] if len(each) == 1 else join_fill_in_the_middle(each, settings.fim_token_ids) for each in pieces]


def _finish(job: PreparationJob, text: _Text, tokens: list[int]) -> _Tokenized:
    settings, splitter = job.settings, job.token_splitter
    tokens_T = np.array([*tokens, settings.eos_token_id], dtype=np.uint32)
    if splitter is not None:
        tokens_T = splitter.split(tokens_T, document_key(settings.seed, "split", text.file, text.place))
    share = uniform_fraction(document_key(settings.seed, "validation", text.file, text.place))
    key = document_key(settings.seed, "order", text.file, text.place)
    return _Tokenized(key, share < settings.validation_fraction, tokens_T, len(text.text.encode()))


def _buckets(documents: Iterator[_Tokenized]) -> Iterator[list[_Tokenized]]:
    bucket: list[_Tokenized] = []
    tokens = 0
    for document in documents:
        bucket.append(document)
        tokens += len(document.tokens_T)
        if tokens >= _BUCKET_TOKENS or len(bucket) >= _BUCKET_DOCUMENTS:
            yield bucket
            bucket, tokens = [], 0
    if bucket:
        yield bucket


def _publish(
    directory: Path, task: Task, pieces: tuple[CorpusPiece, ...], folder: Path, part: SplitPart | None
) -> SplitPart | None:
    """Move the files of a part into the prepared directory, under names that begin with the task's."""
    if part is None:
        return None

    def move(entry: FileEntry) -> FileEntry:
        name = f"{_prefix(task, pieces)}.{entry.file}"
        (folder / entry.file).rename(directory / name)
        return replace(entry, file=name)

    return replace(part, shards=tuple(move(shard) for shard in part.shards), starts=move(part.starts))
