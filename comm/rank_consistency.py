"""Check that all ranks have the same configuration, code and data, before any process group exists."""

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from .errors import ConfigError, Problem
from .files.strict_json import parse_json


@dataclass(frozen=True)
class Fingerprint:
    """One property of a rank that must be equal on all ranks."""

    digest: str
    """Hash of the value, which may be secret."""
    display_value: str
    """Text that messages show in place of the value."""


class RankMismatchError(ConfigError):
    """Ranks of one run differ. Raised on all of them."""


Fingerprints = Mapping[str, Fingerprint]
"""Fingerprints by name, in the order of comparison."""


def find_first_mismatch(here: Fingerprints, there: Fingerprints) -> str | None:
    """Return the name of the first fingerprint that differs or is missing on one side; None if all agree."""
    for name in (*here, *(name for name in there if name not in here)):
        ours, theirs = here.get(name), there.get(name)
        if ours is None or theirs is None or ours.digest != theirs.digest:
            return name
    return None


def describe_mismatch(name: str, here: tuple[str, Fingerprints], there: tuple[str, Fingerprints]) -> str:
    """Return a sentence with the value of the fingerprint `name` on both sides; each side is (label, fingerprints)."""
    shown = [
        fingerprints[name].display_value if name in fingerprints else "nothing" for _, fingerprints in (here, there)
    ]
    sides = ", ".join(f"{text} on {who}" for text, (who, _) in zip(shown, (here, there), strict=True))
    return f"{sides} (environment variables differ)" if shown[0] == shown[1] else sides


def fingerprints_to_json(fingerprints: Fingerprints) -> str:
    """Return the fingerprints as JSON."""
    return json.dumps(
        {name: [fingerprint.digest, fingerprint.display_value] for name, fingerprint in fingerprints.items()}
    )


def fingerprints_from_json(text: str) -> dict[str, Fingerprint]:
    """Parse the text of `fingerprints_to_json`. Raises `ValueError` for any other text."""
    fingerprints = {}
    for name, pair in parse_json(text).as_mapping().items():
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
            raise ValueError(f"{name} is not a fingerprint")
        fingerprints[name] = Fingerprint(*pair)
    return fingerprints


def verify_ranks_match(store: dist.Store, rank: int, world_size: int, fingerprints: Fingerprints) -> None:
    """Raise `RankMismatchError` on every rank, with the first difference from rank 0, unless all fingerprints agree.

    Raises `dist.DistError` if ranks do not come in time.
    """
    # Over the store of the launch, without a process group: ranks that differ may create different groups, which hangs.
    who = f"rank {rank} ({socket.gethostname()})"
    if rank == 0:
        store.set("fingerprints", json.dumps([who, fingerprints_to_json(fingerprints)]))
    first, text = json.loads(store.get("fingerprints"))
    theirs = fingerprints_from_json(text)
    name = find_first_mismatch(theirs, fingerprints)
    if name is not None:
        store.set("difference", json.dumps([name, describe_mismatch(name, (first, theirs), (who, fingerprints))]))
    # A difference is written before its rank counts itself, so every rank sees it after the last one has counted.
    if store.add("compared", 1) == world_size:
        store.set("all compared", "")
    store.wait(["all compared"])
    if store.check(["difference"]):
        name, sides = json.loads(store.get("difference"))
        raise RankMismatchError([Problem(name, sides, MISMATCH_HINT)])


MISMATCH_HINT = (
    "must be the same on all ranks and nodes; start all with one command, one source tree and one prepared data set"
)
