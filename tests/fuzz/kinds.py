"""Kinds of inputs: which seed file is damaged, and which command then reads it."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

from shoestring.launch.compose import compose_run_config, config_to_dict

from . import edits
from .mutate import dumps, mutate_bytes, mutate_file, mutate_json, mutate_tree, nasty, places

FILE_SHARE = 0.08
"""Share of inputs in which a file is replaced by something that is not a regular file."""


def data_overrides(root: Path) -> list[str]:
    """Return overrides for the corpus and the prepared data under `root`."""
    data = [f"data.corpus={root / 'corpus'}", f"data.prepared={root / 'prepared'}", "data.validation=[v]"]
    return [*data, "data.vocab_size=300", "model.vocab_size=300"]


@dataclass(frozen=True)
class Input:
    """A command on files in its folder."""

    arguments: tuple[str, ...]
    codes: frozenset[int]
    """Exit codes that the command's documentation lists."""
    made: Path | None = None
    """A path that must not exist after a refusal."""


def reads(*arguments: object, codes: tuple[int, ...] = (0, 2), made: Path | None = None) -> Input:
    """Return an input whose command ends with one of `codes`."""
    return Input(tuple(map(str, arguments)), frozenset(codes), made)


def copy(seeds: Path, folder: Path, name: str) -> Path:
    """Copy a seed into the folder."""
    source, target = seeds / name, folder / name
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target))


def overrides(random: Random, seeds: Path, folder: Path) -> Input:
    """Damage keys and values of the command line, or of a file in a user's configuration directory."""
    if random.random() < 0.3:
        own = copy(seeds, folder, "own")
        path = own / "experiment" / "mine.yaml"
        if random.random() < FILE_SHARE:
            mutate_file(random, path)
        else:
            path.write_bytes(_yaml(random, path.read_bytes()))
        return reads("train", "--cfg", "job", "--config-dir", own, "experiment=mine")
    tree = config_to_dict(compose_run_config(["experiment=quickstart"]))
    found = [place for place in places(tree) if isinstance(place[1], str)]
    lines = ["training.run_dir='${oc.env:HOME}'"] if random.random() < 0.1 else []
    for _ in range(random.choice([1, 1, 2, 4])):
        container, key = random.choice(found)
        name = next(path for path, holder in _paths(tree) if holder is container)
        value = nasty(random, container[key])
        text = value if isinstance(value, str) else json.dumps(value)
        line = f"{name}{key}={text}".replace("\0", "0").encode(errors="replace").decode()
        lines.append(random.choice([line, line, line, line.replace("=", "", 1), f"+{line}", f"~{line}", line + "}"]))
    return reads("train", "--cfg", "job", "experiment=quickstart", "--", *lines)


def _paths(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found = [(prefix, tree)]
    for key, value in tree.items() if isinstance(tree, dict) else ():
        found += _paths(value, f"{prefix}{key}.")
    return found


def _yaml(random: Random, raw: bytes) -> bytes:
    lines = raw.splitlines(keepends=True)
    place = random.randrange(1, len(lines))
    indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
    key = lines[place].split(b":")[0]
    new = [
        key + b": " + json.dumps(nasty(random)).encode() + b"\n",
        key + b": &a [*a]\n",
        key + b": ${" + key.strip() + b"}\n",
        key + b": ${oc.env:NO_SUCH_VARIABLE}\n",
        key + b": !!python/object/apply:os.getcwd []\n",
        key + b": " + b"[" * 3000 + b"\n",
        indent + b"- a\n",
        b"",
        lines[place] * 2,
        indent + b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + b"".join(indent + b"%c: &%c [%s]\n" % (n + 1, n + 1, b",".join([b"*%c" % n] * 10)) for n in range(97, 106)),
    ]  # fmt: skip
    if random.random() < 0.3:
        return mutate_bytes(random, raw)
    return b"".join([*lines[:place], random.choice(new), *lines[place + 1 :]])


def config_json(random: Random, seeds: Path, folder: Path) -> Input:
    """Damage the configuration and the other small files of released weights."""
    hf = copy(seeds, folder, "hf")
    made = folder / "made"
    if random.random() < 0.5:
        _edit_json(random, hf / "config.json", edits.CONFIG)
    else:
        name = random.choice(["config.json"] * 6 + ["generation_config.json", "tokenizer_config.json"])
        _damage_json(random, hf / name)
    if random.random() < 0.05:
        (made / "checkpoints").mkdir(parents=True)
        (made / random.choice(["step_00000000", "step_00000000.partial", "checkpoints/x"])).mkdir()
        return reads("import", hf, made)
    return reads("import", hf, made, made=made)


def headers(random: Random, seeds: Path, folder: Path) -> Input:
    """Damage the index and the headers of released weights, and their data."""
    hf = copy(seeds, folder, random.choice(["hf", "hf_sharded"]))
    files = sorted(hf.glob("model*"))
    path = random.choice(files)
    if path.suffix == ".json" and random.random() < 0.5:
        tree = json.loads(path.read_bytes())
        name = random.choice(list(tree["weight_map"]))
        tree["weight_map"][name] = random.choice(
            [*tree["weight_map"].values(), "../hf/x", "/dev/zero", "sub/x", "x", 5]
        )
        path.write_bytes(dumps(random.choice([tree, tree, tree, {"weight_map": {}}])))
        return reads("import", hf, folder / "made", made=folder / "made")
    if len(files) > 1 and random.random() < 0.1:
        shutil.copy(files[0], files[1])
        return reads("import", hf, folder / "made", made=folder / "made")
    if path.suffix == ".json" or random.random() < FILE_SHARE:
        _damage_json(random, path)
        return reads("import", hf, folder / "made", made=folder / "made")
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text, data = raw[8 : 8 + length], raw[8 + length :]
    action = random.random()
    if action < 0.7:
        own = dumps(edits.edit(random, json.loads(text), edits.HEADER))
        text = own if random.random() < 0.6 else mutate_json(random, text)
        length = len(text)
    elif action < 0.8:
        length = random.choice([0, 1, 2**31, 2**63, length - 1, length + 1, len(raw)])
    elif action < 0.9:
        place = random.randrange(len(data))
        data = data[:place] + random.choice([b"\xff" * 4, random.randbytes(2)]) + data[place + 4 :]
        data += b"\0" * (len(raw) - 8 - length - len(data))
    else:
        path.write_bytes(mutate_bytes(random, raw))
        return reads("import", hf, folder / "made", made=folder / "made")
    path.write_bytes(struct.pack("<Q", length) + text + data)
    return reads("import", hf, folder / "made", made=folder / "made")


def _edit_json(random: Random, path: Path, changes: Sequence[edits.Edit]) -> None:
    path.write_bytes(dumps(edits.edit(random, json.loads(path.read_bytes()), changes)))


def _damage_json(random: Random, path: Path) -> None:
    if random.random() < FILE_SHARE or not path.name.endswith(".json"):
        mutate_file(random, path)
    else:
        path.write_bytes(mutate_json(random, path.read_bytes()))


def data_manifest(random: Random, seeds: Path, folder: Path) -> Input:
    """Damage the manifest of prepared data, its list of parts with a matching hash, or another file there."""
    prepared = copy(seeds, folder, "prepared")
    files = sorted(path for path in prepared.rglob("*") if path.is_file())
    if random.random() < 0.2:
        _damage_any(random, random.choice(files))
    elif random.random() < 0.15:
        _flip(random, random.choice([path for path in files if path.stat().st_size]))
    elif random.random() < 0.3:
        path = random.choice([prepared / "manifest.json", prepared / "settings.json", *prepared.glob("tasks/*.json")])
        path.write_bytes(mutate_json(random, path.read_bytes()))
    elif random.random() < 0.5:
        path = prepared / "manifest.json"
        tree = json.loads(path.read_bytes())
        path.write_bytes(
            dumps(edits.edit(random, tree, edits.DATA) if random.random() < 0.6 else mutate_tree(random, tree))
        )
    else:
        _damage_parts(random, prepared)
    return _opens_prepared(random, seeds, folder)


def _damage_parts(random: Random, prepared: Path) -> None:
    (path,) = prepared.glob("parts-*.jsonl")
    parts = [json.loads(line) for line in path.read_bytes().splitlines()]
    parts = edits.edit(random, parts, edits.DATA_PARTS) if random.random() < 0.6 else mutate_tree(random, parts)
    path.write_bytes(b"".join(dumps(part) + b"\n" for part in (parts if isinstance(parts, list) else [parts])))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = json.loads((prepared / "manifest.json").read_bytes())
    manifest["parts"].update(sha256=sha256, bytes=path.stat().st_size)
    (prepared / "manifest.json").write_bytes(dumps(manifest))


def _opens_prepared(random: Random, seeds: Path, folder: Path) -> Input:
    """Open prepared data: one command reads every byte, the other only what shows whether work is left."""
    if random.random() < 0.6:
        return reads("data", "inspect", *data_overrides(folder))
    copy(seeds, folder, "corpus")
    return reads("data", "prepare", *data_overrides(folder))


def _damage_any(random: Random, path: Path) -> None:
    if random.random() < 0.5:
        mutate_file(random, path)
    else:
        path.write_bytes(mutate_bytes(random, path.read_bytes()))


def _flip(random: Random, path: Path) -> None:
    """Flip a bit, half of the time near the beginning; the size stays."""
    raw = bytearray(path.read_bytes())
    place = random.randrange(len(raw) if random.random() < 0.5 else min(len(raw), 2000))
    raw[place] ^= 1 << random.randrange(8)
    path.write_bytes(raw)


def _cut(random: Random, path: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def checkpoint_manifest(random: Random, seeds: Path, folder: Path) -> Input:
    """Damage a checkpoint's manifest and reseal it, or damage another file there."""
    saved = copy(seeds, folder, "saved")
    step = saved / "checkpoints" / "step_00000004"
    path, action = step / "manifest.json", random.random()
    if action < 0.15:
        _damage_any(random, random.choice(sorted(step.iterdir())))
        if random.random() < 0.5:
            return reads("checkpoint", "verify", saved, codes=(0, 1))  # 0: some damage changes no byte
    elif action < 0.3:
        damaged = random.choice([*step.glob("part_*"), step / "tokenizer.json"])
        random.choice([_flip, _cut])(random, damaged)
        return reads("checkpoint", "verify", saved, codes=(1,))
    else:
        tree = json.loads(path.read_bytes())
        if action < 0.65:
            path.write_bytes(dumps(edits.edit(random, tree, edits.CHECKPOINT)))
        elif action < 0.8:
            tree["metadata"] = mutate_tree(random, tree["metadata"])
            path.write_bytes(dumps(tree))
        else:
            path.write_bytes(mutate_json(random, path.read_bytes()))
        (step / "complete").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    made = folder / "made"
    return random.choice(
        [
            reads("checkpoint", "verify", saved, codes=(0, 1, 2)),
            reads("checkpoint", "ls", saved),
            reads("checkpoint", "diff", saved, saved, "--other-step", 2, codes=(0, 1, 2)),
            reads("export", saved, made, made=made),
            reads("generate", saved, "--prompt", "word", "--tokens", 2),
        ]
    )


def ledger(random: Random, seeds: Path, folder: Path) -> Input:
    """Damage ledger records and rehash them, damage their bytes, or damage the heartbeat."""
    run = copy(seeds, folder, "run")
    if random.random() < 0.1:
        return _project(random, seeds, folder, run)
    names = ["work.jsonl"] * 5 + ["allocation.jsonl"] * 4 + ["heartbeat.json", "snapshot.json"]
    path = run / "ledger" / random.choice(names)
    if path.name == "snapshot.json":
        path.write_bytes(_totals(random, path.read_bytes()))
        return reads("budget", run, "--verify")
    if random.random() < FILE_SHARE:
        mutate_file(random, path)
    elif path.suffix == ".json" or random.random() < 0.15:
        path.write_bytes(mutate_bytes(random, path.read_bytes()))
    else:
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        if random.random() < 0.5:
            path.write_bytes(_chained(edits.edit(random, records, edits.RECORDS)))
            return _looks_at(random, seeds, run, folder)
        kind = random.choice(sorted({record["kind"] for record in records}))  # most records are steps
        index = random.choice([place for place, record in enumerate(records) if record["kind"] == kind])
        changed = mutate_tree(random, records[index])
        records[index : index + 1] = random.choice([[changed]] * 5 + [[], [changed, changed]])
        path.write_bytes(_chained(records))
    return _looks_at(random, seeds, run, folder)


def _project(random: Random, seeds: Path, folder: Path, run: Path) -> Input:
    """Make a run continue from a record that may belong to another run, whose ledger may be damaged."""
    other, work = folder / "other", run / "ledger" / "work.jsonl"
    shutil.copytree(run, other)
    records = [json.loads(line) for line in work.read_bytes().splitlines()]
    head = random.choice([records[-1]["hash"], "a" * 64, "é"])
    inherited = {**edits.INHERITED, "from_head": head}
    (run / "ledger" / "work.jsonl").write_bytes(_chained([records[0], inherited, *records[1:]]))
    if random.random() < 0.5:
        _damage_any(random, other / "ledger" / "work.jsonl")
    project = copy(seeds, folder, "project.yaml")
    project.write_text(project.read_text() + "  - other\n")
    return reads("budget", project)


def _totals(random: Random, raw: bytes) -> bytes:
    """Damage saved totals, half of the time with a matching hash."""
    tree = json.loads(raw)
    if random.random() < 0.3:
        return mutate_json(random, raw)
    tree["totals"] = mutate_tree(random, tree["totals"])
    try:
        text = json.dumps(tree["totals"], sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError):
        return dumps(tree)
    return dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "totals": json.loads(text)})


def _chained(records: list[Any]) -> bytes:
    head, lines = "0" * 64, []
    for record in records:
        if not isinstance(record, dict):
            lines.append(dumps(record) + b"\n")
            continue
        text = dumps({key: value for key, value in record.items() if key != "hash"})
        head = hashlib.sha256(head.encode() + text).hexdigest()
        comma = "," if len(record) > 1 else ""
        lines.append(text[:-1] + f'{comma}"hash":"{head}"}}\n'.encode())
    return b"".join(lines)


def _looks_at(random: Random, seeds: Path, run: Path, folder: Path) -> Input:
    return random.choice(
        [
            reads("budget", run),
            reads("budget", run, "--format", "json"),
            reads("budget", run, "--verify"),
            reads("budget", copy(seeds, folder, "project.yaml")),
            reads("watch", run, "--once"),
            reads("report", run, "--html", folder / "made", made=folder / "made"),
        ]
    )


def metrics(random: Random, seeds: Path, folder: Path) -> Input:
    """Damage lines of the event stream."""
    run = copy(seeds, folder, "run")
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if random.random() < FILE_SHARE:
        mutate_file(random, path)
    elif random.random() < 0.15:
        path.write_bytes(mutate_bytes(random, path.read_bytes()))
    else:
        for _ in range(random.choice([1, 1, 3])):
            index = random.randrange(len(lines))
            tree = lines[index] if random.random() < 0.1 else dumps(mutate_tree(random, json.loads(lines[index])))
            lines[index] = (mutate_bytes(random, tree) if tree is lines[index] else tree) + b"\n"
            break
        path.write_bytes(b"".join(lines))
    return random.choice(
        [reads("watch", run, "--once"), reads("report", run, "--html", folder / "made", made=folder / "made")]
    )


def tokenizer(random: Random, seeds: Path, folder: Path) -> Input:
    """Damage the tokenizer of prepared data, released weights or a checkpoint, each with a matching hash."""
    where = random.choice(["prepared", "hf", "saved"])
    base = copy(seeds, folder, where)
    path = base / "tokenizer.json"
    if where == "saved":
        path = base / "checkpoints" / "step_00000004" / "tokenizer.json"
    raw = path.read_bytes()
    tree = json.loads(raw)
    if random.random() < 0.4:
        new = dumps(edits.edit(random, tree, edits.TOKENIZER))
    elif random.random() < 0.5:  # near the root: most values are in the vocabulary
        short = {key: value for key, value in tree.items() if key != "model"}
        changed = mutate_tree(random, short)
        new = dumps({**changed, "model": tree["model"]} if isinstance(changed, dict) else changed)
    else:
        new = mutate_json(random, raw)
    path.write_bytes(new)
    if random.random() < FILE_SHARE:
        mutate_file(random, path)
    sha256, size = hashlib.sha256(new).hexdigest(), len(new)
    if where == "hf":
        return reads("import", base, folder / "made", made=folder / "made")
    if where == "prepared" and random.random() < 0.9:
        manifest = json.loads((base / "manifest.json").read_bytes())
        manifest["tokenizer"].update(sha256=sha256, bytes=size)
        (base / "manifest.json").write_text(json.dumps(manifest))
    if where == "prepared":
        return _opens_prepared(random, seeds, folder)
    manifest = json.loads((path.parent / "manifest.json").read_bytes())
    manifest["attachments"][0].update(sha256=sha256, bytes=size)
    (path.parent / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")))
    (path.parent / "complete").write_text(hashlib.sha256((path.parent / "manifest.json").read_bytes()).hexdigest())
    made = folder / "made"
    return random.choice(
        [reads("generate", base, "--prompt", "word", "--tokens", 2), reads("export", base, made, made=made)]
    )


DOCUMENTS = (b'{"text": "\\ud800"}', b'{"text": " "}', b'{"text": 5}', b"", b"\x00", b'{"text": "a", "text": "b"}')


def corpus(random: Random, seeds: Path, folder: Path) -> Input:
    """Damage files of a corpus."""
    base = copy(seeds, folder, "corpus")
    path = random.choice(sorted(base.iterdir()))
    action = random.random()
    if action < 0.15:
        _strange_corpus(random, base)
    elif action < 0.2:
        mutate_file(random, path)
    elif action < 0.4:
        path.write_bytes(mutate_bytes(random, path.read_bytes()))
    elif action < 0.7:
        path = base / "w.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        index = random.randrange(len(lines))
        strange = (
            b'{"text": "\\ud800"}',
            b'{"text": " "}',
            b'{"text": 5}',
            b"",
            b"\x00",
            b'{"text": "a", "text": "b"}',
        )
        lines[index] = mutate_json(random, lines[index]) if random.random() < 0.6 else random.choice(strange)
        lines[index] += b"\n"
        path.write_bytes(b"".join(lines))
    else:
        name = random.choice(
            ["a.jsonl", "b.TXT", "é.txt", ".txt", "x" * 200 + ".txt", "sub", "c.txt.gz", "new\nline.txt"]
        )
        mutate_file(random, base / name)
    wrong = random.choice(
        [
            "data.vocab_size=100000 model.vocab_size=100000",
            "data.validation=[a,v,w]",
            "data.validation=[x]",
            "data.vocab_size=4e9",
            "data.corpus=/no",
        ]
    )
    more = wrong.split() if random.random() < 0.1 else []
    return reads("data", "prepare", *data_overrides(folder), *more, made=folder / "prepared")


def _strange_corpus(random: Random, base: Path) -> None:
    """Write files that exist and are not a corpus."""
    action = random.randrange(5)
    if action == 0:
        for path in base.iterdir():
            path.rename(path.with_suffix(".md"))
    elif action == 1:
        Path(os.fsdecode(os.fsencode(base) + b"/\xff.txt")).write_text("text")
    elif action == 2:
        (base / "w.jsonl").write_bytes(b"")
    elif action == 3:
        shutil.copy(base / "a.txt", base / "w.txt")
    else:
        (base / "z.txt").write_text("word " * random.choice([1, 100_000]))


def small_files(random: Random, seeds: Path, folder: Path) -> Input:
    """Damage plans, timelines, tables, invoices, account files, projects, and the configuration saved by a run."""
    run, what = copy(seeds, folder, "run"), random.randrange(7)
    if what == 0:
        (run / "metrics.jsonl").unlink()
        path = run / "config.yaml"
        path.write_bytes(_yaml(random, path.read_bytes()))
        return reads("report", run, "--html", folder / "made", made=folder / "made")
    if what == 1:
        path = run / "trace" / "trace.json"
        _damage_json(random, path)
        return random.choice([reads("trace", run), reads("trace", path, "--svg", folder / "made")])
    name = ["plan.json", "table.csv", "invoice.csv", "sacct.txt", "project.yaml"][what - 2]
    path = copy(seeds, folder, name)
    if name == "plan.json":
        _damage_json(random, path)
        return reads("budget", run, "--against", path)
    if random.random() < FILE_SHARE:
        mutate_file(random, path)
    elif name == "project.yaml" and random.random() < 0.7:
        path.write_bytes(_yaml(random, path.read_bytes()))
    else:
        path.write_bytes(_row(random, path.read_bytes()))
    if name == "table.csv":
        return reads("simulate", "experiment=deepseek_v3_h800", f"cluster.tables={path}")
    if name == "project.yaml":
        return reads("budget", path)
    return reads("budget", run, "--invoice" if name == "invoice.csv" else "--sacct", path)


def _row(random: Random, raw: bytes) -> bytes:
    if random.random() < 0.3:
        return mutate_bytes(random, raw)
    lines = raw.decode().splitlines()
    index = random.randrange(len(lines))
    sign = "|" if "|" in lines[0] else ","
    cells = lines[index].split(sign)
    cells[random.randrange(len(cells))] = str(nasty(random, 5))[:6000]
    lines[index] = sign.join(cells)
    return "\n".join(lines).encode(errors="surrogatepass") + b"\n"


KINDS: Mapping[str, Callable[[Random, Path, Path], Input]] = MappingProxyType(
    {
        "overrides": overrides,
        "config.json": config_json,
        "index and headers": headers,
        "data manifest": data_manifest,
        "checkpoint manifest": checkpoint_manifest,
        "ledger": ledger,
        "metrics": metrics,
        "tokenizer": tokenizer,
        "corpus": corpus,
        "small files": small_files,
    }
)
