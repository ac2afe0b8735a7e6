"""Whether the processes of a run have the same configuration, code and data: compared before any group is opened."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from .errors import ConfigError, Problem
from .files.strict_json import parse_json


@dataclass(frozen=True)
class Fingerprint:
    """One thing that must be the same everywhere."""

    digest: str
    """Of its value, which may be a secret."""
    display_value: str
    """What messages show of it."""


class RankMismatchError(ConfigError):
    """Processes of one run are not the same; raised on all of them."""


Fingerprints = Mapping[str, Fingerprint]
"""By name, in the order in which they are compared."""


def find_first_mismatch(here: Fingerprints, there: Fingerprints) -> str | None:
    """Return the name of the first fact that is not the same, or is missing on one side; None where all agree."""
    for name in (*here, *(name for name in there if name not in here)):
        ours, theirs = here.get(name), there.get(name)
        if ours is None or theirs is None or ours.digest != theirs.digest:
            return name
    return None


def describe_mismatch(name: str, here: tuple[str, Fingerprints], there: tuple[str, Fingerprints]) -> str:
    """Return in words what the fact `name` is on both sides; each side has a name of its own."""
    shown = [facts[name].display_value if name in facts else "nothing" for _, facts in (here, there)]
    sides = ", ".join(f"{text} on {who}" for text, (who, _) in zip(shown, (here, there), strict=True))
    return f"{sides} (variables of the environment differ)" if shown[0] == shown[1] else sides


def fingerprints_to_json(facts: Fingerprints) -> str:
    """Return `facts` as text."""
    return json.dumps({name: [fact.digest, fact.display_value] for name, fact in facts.items()})


def fingerprints_from_json(text: str) -> dict[str, Fingerprint]:
    """Return what `fingerprints_to_json` made into text. Raises `ValueError` for any other text."""
    facts = {}
    for name, pair in parse_json(text).as_mapping().items():
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(each, str) for each in pair)):
            raise ValueError(f"{name} is not a fact")
        facts[name] = Fingerprint(*pair)
    return facts


def verify_ranks_match(store: dist.Store, rank: int, world_size: int, fingerprints: Fingerprints) -> None:
    """Raise `RankMismatchError` on every rank, with the first difference from rank 0, unless all `facts` agree.

    A few messages of each rank with the store of the launch: no group is open yet, as ranks that differ may want other
    groups. Raises `dist.DistError` where ranks do not come in time.
    """
    who = f"rank {rank} ({socket.gethostname()})"
    if rank == 0:
        store.set("facts", json.dumps([who, fingerprints_to_json(fingerprints)]))
    first, text = json.loads(store.get("facts"))
    theirs = fingerprints_from_json(text)
    name = find_first_mismatch(theirs, fingerprints)
    if name is not None:
        store.set("difference", json.dumps([name, describe_mismatch(name, (first, theirs), (who, fingerprints))]))
    if store.add("compared", 1) == world_size:
        store.set("all compared", "")
    store.wait(["all compared"])
    if store.check(["difference"]):
        name, sides = json.loads(store.get("difference"))
        raise RankMismatchError([Problem(name, sides, MISMATCH_HINT)])


MISMATCH_HINT = "must be the same on all ranks and machines; start all with one command, one tree and one prepared data"
