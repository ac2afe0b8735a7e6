"""`shoestring data prepare`: a tokenizer and token shards in a directory, which is complete when its manifest is there.

Each task leaves a completion record, so a preparation that was killed continues, and one of a corpus with
new files prepares only these.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from ....comm.errors import ConfigError, Problem, raise_if_any
from ....comm.files.file_io import (
    config_error_context,
    os_error_to_problem,
    read_json,
    replace_file_atomically,
    unwritable_directory_hint,
)
from ....comm.files.lock import acquire_exclusive_lock
from ....comm.units import format_duration
from ..config import DataConfig
from ..files import fsync_directory
from ..formats import BadRecords
from ..manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    SETTINGS_FILE,
    SPLITS,
    DataManifest,
    DataPart,
    FileEntry,
    PreparationSettings,
    SplitTotals,
    read_manifest,
)
from ..shards import TOKENS_PER_SHARD
from ..storage import is_url, local_path, pattern_free_part
from ..tokenizer import (
    END_TOKEN,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    load_tokenizer_file,
    train_tokenizer,
)
from .corpus import SAMPLE_BYTES, list_corpus, sample_texts
from .run_task import TASKS_FOLDER, PreparationJob, TaskRecord, find_record, remove_abandoned_folders
from .tasks import CorpusFile, Task, plan_tasks
from .worker_pool import Progress, run_tasks

Report = Callable[[str], None]

_LOCK_FILE = ".lock"
_SMALL_CORPUS = 2**23
"""Up to this many bytes of text one process is faster than starting others."""
_SECONDS_BETWEEN_LINES = 5.0
_BAD_RECORDS_SHOWN = 8
_MOST_UNDER_WAY = 0.95
"""Most of the unfinished tasks that their text, of unknown size, can stand for in the progress."""
_BEFORE_SETTINGS = {TASKS_FOLDER, _LOCK_FILE, TOKENIZER_FILE, f"{TOKENIZER_FILE}.new", f"{SETTINGS_FILE}.new"}
"""Files that are written before the settings."""
_PART_FILE = re.compile(
    r"[0-9a-f]{16}-[0-9a-f]{8}\.(train|validation)\.(documents|[0-9]{5,}\.bin)|parts-[0-9a-f]{16}\.jsonl"
)


def prepare_corpus(
    config: DataConfig, report: Report, *, tokenizer: Tokenizer | None = None, shard_tokens: int = TOKENS_PER_SHARD
) -> DataManifest:
    """Fill `config.prepared` with the tokens of the corpus; pass progress lines to `report`.

    `tokenizer` is that of the checkpoint that a run starts from. Raises `ConfigError` for an invalid
    configuration, corpus or record, and for a directory that holds anything else; what was finished is kept.
    """
    with begun_preparation(config, report, tokenizer=tokenizer, shard_tokens=shard_tokens) as (job, files):
        return _publish(config, job, _run_missing_tasks(config, job, files, report), report)


@contextmanager
def begun_preparation(
    config: DataConfig, report: Report, *, tokenizer: Tokenizer | None = None, shard_tokens: int = TOKENS_PER_SHARD
) -> Iterator[tuple[PreparationJob, tuple[CorpusFile, ...]]]:
    """Check everything, write tokenizer and settings, and yield the job and its files, with the directory locked.

    Raises like `prepare_corpus`.
    """
    _check(config, shard_tokens, tokenizer)
    files = list_corpus(config, report)
    directory = Path(os.path.realpath(config.prepared))
    _refuse_directory_in_corpus(config, directory)
    _refuse_other_content(directory)
    tokenizer = tokenizer or _load_or_train_tokenizer(config, files, directory, report)
    settings = preparation_settings(config, tokenizer, shard_tokens)
    with _locked(directory):
        _adopt_settings(directory, settings, tokenizer)
        remove_abandoned_folders(directory)
        yield PreparationJob(directory, settings, tokenizer, config.max_bad_records), files


def _check(config: DataConfig, shard_tokens: int, tokenizer: Tokenizer | None) -> None:
    problems = [problem.with_prefix("data") for problem in config.problems()]
    if tokenizer is None and config.tokenizer is None and config.vocab_size is None:
        hint = "is needed to train a tokenizer; or name one as data.tokenizer"
        problems.append(Problem("data.vocab_size", None, hint))
    if tokenizer is not None and config.vocab_size not in (None, tokenizer.vocab_size):
        hint = f"the tokenizer of training.start_from is taken, which has {tokenizer.vocab_size} token ids; write null"
        problems.append(Problem("data.vocab_size", config.vocab_size, hint))
    if shard_tokens < 1:
        problems.append(Problem("shard_tokens", shard_tokens, "must be at least 1"))
    raise_if_any(problems)


def preparation_settings(config: DataConfig, tokenizer: Tokenizer, shard_tokens: int) -> PreparationSettings:
    """Return the settings that decide the tokens. Raises `ConfigError` if the tokenizer lacks a token they need."""
    return PreparationSettings(
        tokenizer_sha256=hashlib.sha256(tokenizer.raw).hexdigest(),
        eos_token_id=tokenizer.eos_token_id,
        vocab_size=tokenizer.vocab_size,
        text_key=config.text_key,
        validation=tuple(config.validation),
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        shuffle=config.shuffle,
        fim_rate=config.fim_rate,
        fim_token_ids=tokenizer.fim_token_ids(config.fim_tokens) if config.fim_rate > 0 else (),
        token_split_rate=config.token_split_rate,
        shard_tokens=shard_tokens,
    )


def _refuse_directory_in_corpus(config: DataConfig, directory: Path) -> None:
    """Raise `ConfigError` if `directory` is inside the corpus: the next call would read its files as text."""
    place = config.corpus_location
    if is_url(place):
        return
    if directory.is_relative_to(os.path.realpath(pattern_free_part(place))) and not local_path(place).is_file():
        hint = f"is inside data.corpus, {config.corpus}; name a directory outside of it"
        raise ConfigError([Problem("data.prepared", config.prepared, hint, ("data.corpus",))])


def _refuse_other_content(directory: Path) -> None:
    """Raise `ConfigError` unless `directory` is absent, empty, or holds data of this format or the beginning of it."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError([Problem("data.prepared", str(directory), "is not a directory; name another")])
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    # A kill may have left the lock, and not yet the settings.
    if not names or SETTINGS_FILE in names or (_LOCK_FILE in names and names <= _BEFORE_SETTINGS):
        return
    if (directory / MANIFEST_FILE).exists():
        read_manifest(directory)  # of another format
    hint = f"is not empty and has no {SETTINGS_FILE}; name another directory, or remove it"
    raise ConfigError([Problem("data.prepared", str(directory), hint)])


def _load_or_train_tokenizer(
    config: DataConfig, files: Sequence[CorpusFile], directory: Path, report: Report
) -> Tokenizer:
    if config.tokenizer is not None:
        return load_tokenizer_file(Path(config.tokenizer), config.eos_token)
    assert config.vocab_size is not None
    kept = directory / TOKENIZER_FILE
    if kept.exists() and (directory / SETTINGS_FILE).exists():
        # New text does not change the tokenizer: that would change all tokens.
        with suppress(ConfigError):  # damaged, or not trained here: the comparison of settings names the difference
            tokenizer = load_tokenizer_file(kept, END_TOKEN)
            if tokenizer.vocab_size == config.vocab_size:
                return tokenizer
    train_bytes = sum(file.stored.bytes for file in files if not file.is_validation)
    report(
        f"Training a tokenizer of {config.vocab_size} entries on {min(train_bytes, SAMPLE_BYTES) / 1e6:.2f} MB of text."
    )
    start = time.perf_counter()
    tokenizer = train_tokenizer(sample_texts(config, files, BadRecords(config.max_bad_records)), config.vocab_size)
    report(f"Tokenizer of {tokenizer.vocab_size} entries trained in {time.perf_counter() - start:.1f} s.")
    return tokenizer


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of the prepared directory, which is created if it does not exist."""
    try:
        (directory / TASKS_FOLDER).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        hint = f"cannot be created: {error.strerror}; {unwritable_directory_hint(error)}"
        raise ConfigError([Problem("data.prepared", str(directory), hint)]) from error
    try:
        held = "is being prepared by another process; wait for it, or name another directory"
        acquire_exclusive_lock(descriptor, "data.prepared", str(directory), held)
        yield
    finally:
        os.close(descriptor)


def _adopt_settings(directory: Path, settings: PreparationSettings, tokenizer: Tokenizer) -> None:
    """Write settings and tokenizer. Raises `ConfigError` if something was finished with others."""
    path = directory / SETTINGS_FILE
    nothing_is_finished = not (directory / MANIFEST_FILE).exists() and not any(
        (directory / TASKS_FOLDER).glob("*.json")
    )
    if nothing_is_finished:
        with _write_errors(directory):
            _replace_file(directory / TOKENIZER_FILE, tokenizer.raw)
            replace_file_atomically(path, (json.dumps(asdict(settings), indent=2) + "\n").encode())
        return
    with config_error_context(path, "remove the directory and prepare again"):
        begun = read_json(path).as_dataclass(PreparationSettings)
    old, new = asdict(begun), asdict(settings)
    differing = [f"{key} {old[key]!r}, not {new[key]!r}" for key in old if old[key] != new[key]]
    if differing:
        hint = f"was prepared with other settings: {'; '.join(differing)}. Name another directory, or remove it"
        raise ConfigError([Problem("data.prepared", str(directory), hint)])


def _run_missing_tasks(
    config: DataConfig, job: PreparationJob, files: Sequence[CorpusFile], report: Report
) -> list[TaskRecord]:
    """Return the records of all tasks in order, after running those that have none."""
    tasks = plan_tasks(files)
    records = {task: record for task in tasks if (record := find_record(job.directory, task, job.settings)) is not None}
    missing = [task for task in tasks if task not in records]
    held_out = ", ".join(config.validation) or f"{config.validation_fraction:g} of the documents"
    total = sum(task.bytes for task in tasks) / 1e6
    report(f"{len(files)} files, {total:.2f} MB; held out for validation: {held_out}.")
    if records:
        report(f"{len(records)} of {len(tasks)} tasks were finished before and are kept.")
    if missing:
        is_small = sum(task.bytes for task in missing) <= _SMALL_CORPUS
        workers = 1 if is_small else min(config.workers or available_cores(), len(missing))
        display = _ProgressLines(missing, report)
        for task, record in run_tasks(job, missing, workers, display.update):
            records[task] = record
            display.finish(task, record)
            _refuse_too_many_bad_records(config, records.values())
    _refuse_too_many_bad_records(config, records.values())  # also those that an earlier call has found
    return [records[task] for task in tasks]


def _refuse_too_many_bad_records(config: DataConfig, records: Iterable[TaskRecord]) -> None:
    """Raise `ConfigError` with the first broken records if the tasks together found more than the limit."""
    found = list(records)
    count = sum(record.part.bad_records for record in found)
    if count > config.max_bad_records:
        first = [text for record in found for text in record.bad][:_BAD_RECORDS_SHOWN]
        hint = f"{count} records are broken: correct them, or allow that many. The first: {' | '.join(first)}"
        raise ConfigError([Problem("data.max_bad_records", config.max_bad_records, hint)])


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


class _ProgressLines:
    """Lines about a preparation: done, rate, and time left. The first comes after two seconds."""

    def __init__(self, tasks: Sequence[Task], report: Report) -> None:
        self._report = report
        self._tasks, self._bytes = len(tasks), sum(task.bytes for task in tasks)
        self._done_tasks = self._done_bytes = 0
        self._done_text = 0
        self._start = time.perf_counter()
        self._next = self._start + 2.0

    def finish(self, task: Task, record: TaskRecord) -> None:
        """Count a completed task."""
        self._done_tasks += 1
        self._done_bytes += task.bytes
        self._done_text += sum(part.bytes for part in (record.part.train, record.part.validation) if part is not None)

    def update(self, progress: Progress) -> None:
        """Report a line if the last one is some seconds old."""
        now = time.perf_counter()
        if now < self._next:
            return
        self._next = now + _SECONDS_BETWEEN_LINES
        seconds = now - self._start
        # Compressed files hold more text than they have bytes: the finished ones tell how much more.
        text_per_byte = self._done_text / self._done_bytes if self._done_bytes else 1.0
        under_way = (progress.text_bytes - self._done_text) / max(text_per_byte, 1e-9)
        rest = self._bytes - self._done_bytes
        share = (self._done_bytes + min(under_way, _MOST_UNDER_WAY * rest)) / max(self._bytes, 1)
        left = f", about {format_duration(seconds * (1 - share) / share)} left" if share > 0 else ""
        megabytes, tokens = progress.text_bytes / 1e6 / seconds, progress.tokens / 1e3 / seconds
        self._report(
            f"{self._done_tasks} of {self._tasks} tasks, {100 * share:.0f} %: {megabytes:.1f} MB/s of text, "
            f"{tokens:.0f} K tokens/s{left}"
        )


def _publish(
    config: DataConfig,
    job: PreparationJob,
    records: Sequence[TaskRecord],
    report: Report,
) -> DataManifest:
    """Write the manifest over the parts; a manifest that says the same stays as it is."""
    directory, settings, tokenizer = job.directory, job.settings, job.tokenizer
    parts = [record.part for record in records]
    totals = {name: SplitTotals.of_parts(parts, name) for name in SPLITS}
    for name in SPLITS:
        if totals[name].documents == 0:
            field = "data.corpus" if name == "train" else "data.validation_fraction"
            value = config.corpus if name == "train" else config.validation_fraction
            raise ConfigError([Problem(field, value, f"leaves no document for {name}; add text or change the share")])
    lines = "".join(part.to_json() + "\n" for part in parts).encode()
    with _write_errors(directory):
        # The list of parts has its hash in its name: readers of the old manifest find the old list until the new one
        # takes its place.
        digest = hashlib.sha256(lines).hexdigest()
        entry = FileEntry(f"parts-{digest[:16]}.jsonl", len(lines), digest)
        manifest = DataManifest(
            format=FORMAT_VERSION,
            settings=settings,
            source=config.corpus,
            license=config.license,
            tokenizer=_replace_file(directory / TOKENIZER_FILE, tokenizer.raw),
            tokenizer_config=None
            if tokenizer.config is None
            else _replace_file(directory / TOKENIZER_CONFIG_FILE, tokenizer.config),
            parts=entry,
            train=totals["train"],
            validation=totals["validation"],
        )
        path, raw = directory / MANIFEST_FILE, manifest.to_json().encode()
        is_listed = (directory / entry.file).exists()
        if is_listed and path.exists() and path.read_bytes() == raw:
            report(f"{directory} is already prepared from this text with these settings.")
            return manifest
        replace_file_atomically(directory / entry.file, lines)
        replace_file_atomically(path, raw)
        fsync_directory(directory)
    _remove_other_parts(directory, manifest, parts)
    _report_result(records, totals, report)
    report(f"Wrote {directory}")
    return manifest


def _replace_file(path: Path, raw: bytes) -> FileEntry:
    if not path.exists() or path.read_bytes() != raw:
        replace_file_atomically(path, raw)
    return FileEntry(path.name, len(raw), hashlib.sha256(raw).hexdigest())


@contextmanager
def _write_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError([os_error_to_problem(error, directory, unwritable_directory_hint(error))]) from error


def _remove_other_parts(directory: Path, manifest: DataManifest, parts: Sequence[DataPart]) -> None:
    """Remove the files of parts that the manifest no longer lists: their source was removed or has changed."""
    tasks = {part.task for part in parts}
    listed = {entry.file for part in parts for entry in part.files} | {entry.file for entry in manifest.head_files}
    for path in directory.iterdir():
        if _PART_FILE.fullmatch(path.name) and path.name not in listed:
            path.unlink(missing_ok=True)
    for record in (directory / TASKS_FOLDER).glob("*.json"):
        if record.stem not in tasks:
            record.unlink(missing_ok=True)


def _report_result(records: Sequence[TaskRecord], totals: Mapping[str, SplitTotals], report: Report) -> None:
    for name, split in totals.items():
        rate = f", {split.bytes / split.tokens:.2f} bytes per token" if split.bytes else ""
        report(f"{name}: {split.tokens} tokens{rate}; documents: {split.documents}")
    for note in [note for record in records for note in record.notes][:_BAD_RECORDS_SHOWN]:
        report(note)
    empty, bad = (sum(getattr(record.part, key) for record in records) for key in ("empty_records", "bad_records"))
    if empty:
        report(f"{empty} records without text were skipped.")
    if bad:
        first = next(text for record in records for text in record.bad)
        report(f"{bad} broken records were skipped (data.max_bad_records). The first: {first}")
