"""Seeded damage to JSON, text, bytes and files: each call changes one thing, like a disk, an editor or an attacker."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

Place = tuple[Any, Any]
"""A container and the key or index of a value in it."""


class Twice(str):
    """A key that is in a mapping twice, so that `dumps` writes both."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def nasty(random: Random, old: object = None) -> Any:
    """Return a value that a reader may not handle; often one close to `old`."""
    values: list[Any] = [
        None, True, False, 0, 1, -1, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, -(10**18), 0.5, 1.0, -0.0, 1e308,
        1e-320, float("nan"), float("inf"), float("-inf"), "", " ", "0", "1", "null", "NaN", "é\u2028", "\ud800",
        "\x00", "\x1b[31m",
        "x" * 5000, "..", "../../etc/passwd", "/etc/passwd", "/dev/zero", "a/b", ".", "${oc.env:HOME}", "[link](x)",
        [], {}, [[]], [None], {"": None}, {"a": {"a": {}}}, [1, 2, 3], ["a"], deep(random.choice([50, 200])),
    ]  # fmt: skip
    close: list[Any] = []
    if isinstance(old, bool):
        close = [int(old), str(old).lower(), not old]
    elif isinstance(old, int):
        small = max(-(2**53), min(old, 2**53))
        close = [float(small), small + 0.5, str(old), -old, old + 1, old - 1, old * 10**9, [old], bool(old)]
    elif isinstance(old, float):
        close = [str(old), -old, old * 1e300, [old], int(old) if abs(old) < 1e18 else 0]
    elif isinstance(old, str):
        close = [
            old + " ",
            old[:-1],
            old * 2,
            old.upper(),
            "../" + old,
            "/" + old,
            [old],
            old.encode(errors="surrogatepass").hex(),
            old + "\0",
        ]
    elif isinstance(old, list):
        close = [
            old[:-1],
            old + old[:1],
            old[::-1],
            dict(enumerate(map(str, range(len(old))))),
            old[:1] * 3,
            str(old)[:99],
        ]
    elif isinstance(old, dict):
        close = [list(old), list(old.values()), {str(key).upper(): value for key, value in old.items()}, str(old)[:99]]
    return random.choice(close) if close and random.random() < 0.5 else random.choice(values)


def deep(depth: int) -> Any:
    """Return nested lists."""
    tree: Any = []
    for _ in range(depth):
        tree = [tree]
    return tree


def places(tree: Any) -> list[Place]:
    """Return all places of a tree, without the root."""
    found: list[Place] = []
    waiting = [tree]
    while waiting:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            found.append((each, key))
            waiting.append(each[key])
    return found


def mutate_tree(random: Random, tree: Any) -> Any:
    """Return `tree` with one to three changes, in place if possible; keys near the root are as likely as all others."""
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        found = places(tree)
        if not found or random.random() < 0.02:
            return nasty(random, tree)
        container, key = random.choice(found if random.random() < 0.6 else found[: max(1, len(found) // 20)])
        action = random.random()
        if action < 0.6:
            container[key] = nasty(random, container[key])
        elif action < 0.75:
            del container[key]
        elif action < 0.85 and isinstance(container, dict):
            container[Twice(f"{key}")] = nasty(random, container[key])
        elif action < 0.95 and isinstance(container, dict):
            container[nasty_key(random, str(key))] = nasty(random)
        else:
            other, other_key = random.choice(found)
            container[key] = shorten(other[other_key]) if other_key in keys_of(other) else None
    return tree


def keys_of(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


def shorten(value: Any) -> Any:
    """Return a copy, so that no tree contains itself."""
    return json.loads(json.dumps(value)) if not isinstance(value, float) else value


def nasty_key(random: Random, old: str) -> str:
    return random.choice(
        [old + "x", old.upper(), "", "hash", "kind", "__metadata__", "a.b", "é", "x" * 300, "../x", "/x"]
    )


def dumps(tree: Any) -> bytes:
    """Return the JSON of a damaged tree: NaN as Python writes it, and each `Twice` key repeated."""
    if isinstance(tree, dict):
        pairs = [f"{json.dumps(str(key))}:".encode() + dumps(value) for key, value in tree.items()]
        return b"{" + b",".join(pairs) + b"}"
    if isinstance(tree, list):
        return b"[" + b",".join(map(dumps, tree)) + b"]"
    return json.dumps(tree).encode()


def mutate_bytes(random: Random, raw: bytes) -> bytes:
    """Return `raw` with a few bytes, or its whole form, changed."""
    place = random.randrange(len(raw)) if raw else 0
    changes: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: raw[:place],
        lambda: raw[:place] + bytes([raw[place] ^ (1 << random.randrange(8))]) + raw[place + 1 :] if raw else b"\x00",
        lambda: raw[:place] + random.randbytes(random.choice([1, 4, 40])) + raw[place:],
        lambda: raw[:place] + b"\xff\xfe" + raw[place:],
        lambda: b"\xef\xbb\xbf" + raw,
        lambda: raw.decode(errors="replace").encode("utf-16"),
        lambda: raw + raw,
        lambda: raw + b"\x00" * 64,
        lambda: raw[:place] + b"[" * random.choice([100, 100_000]) + raw[place:],
        lambda: b'{"a":' * random.choice([100, 100_000]),
        lambda: raw.replace(b":", b"", 1),
        lambda: raw.replace(b'"', b"'"),
        lambda: raw.replace(b"1", b"9" * 5000, 1),
        lambda: raw[:place] + raw[place + random.choice([1, 10, 100]) :],
        lambda: b"\n" * 1000 + raw,
        lambda: random.randbytes(200),
    ]
    return random.choice(changes)()


def mutate_json(random: Random, raw: bytes) -> bytes:
    """Damage the parsed tree most of the time, the bytes otherwise."""
    if random.random() < 0.2:
        return mutate_bytes(random, raw)
    return dumps(mutate_tree(random, json.loads(raw)))


def large(path: Path) -> None:
    """Make a sparse file of 1 TB."""
    path.touch()
    os.truncate(path, 2**40)


def mutate_file(random: Random, path: Path) -> None:
    """Replace the file at `path` by another kind of file, or by another file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: path.mkdir(),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/null"),
        lambda: path.symlink_to("/not/mounted"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("."),
        lambda: path.write_bytes(b""),
        lambda: large(path),
    ]
    random.choice(changes)()
