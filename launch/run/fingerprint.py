"""Fingerprint of a run (configuration, code, data), equal in all of its processes, and the name of the attempt."""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...comm.errors import ConfigError
from ...comm.rank_consistency import Fingerprint, Fingerprints
from ...trainer.config import RunConfig
from ...trainer.data.manifest import read_manifest
from ...trainer.structured_config import restore_interpolations
from ..compose import config_to_dict

_PACKAGE = Path(__file__).resolve().parents[2]
_CODE = ("comm", "conf", "launch", "parallelism", "trainer")


def run_fingerprint(config: RunConfig, data: str) -> Fingerprints:
    """Return the fingerprint of a run on this machine; `data` is the digest of its prepared data."""
    # Configuration first, as the first mismatch is reported: a key says more than a different code hash.
    fingerprints = {
        key: Fingerprint(_digest(value), json.dumps(restore_interpolations(value)))
        for key, value in _flat(config_to_dict(config), "")
    }
    versions = {"code": code_hash(), "torch": torch.__version__, "python": platform.python_version()}
    return fingerprints | {name: Fingerprint(text, text[:16]) for name, text in (versions | {"data": data}).items()}


def data_digest(config: RunConfig) -> str:
    """Return the digest of the prepared data; if it cannot be read, a text that says why."""
    try:
        return read_manifest(Path(config.data.prepared)).content_hash
    except ConfigError as error:
        return f"cannot be read here: {error}"


def code_hash() -> str:
    """Return the SHA-256 of every source file that a run executes."""
    total = hashlib.sha256()
    for folder in _CODE:
        for path in sorted((_PACKAGE / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                total.update(f"{path.relative_to(_PACKAGE)}\0".encode())
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


ATTEMPT_ENV_VAR = "SHOESTRING_ATTEMPT"
"""Environment variable that carries the attempt's name from the launcher to its ranks."""


def attempt_name() -> str:
    """Return the attempt's name in the ledger: the launcher's, or one derived from the torchrun that started this rank.

    torchrun's run id is `none` unless it is given, so the name adds its process id and start time, which stay the same
    when torchrun restarts its ranks.
    """
    given = os.environ.get(ATTEMPT_ENV_VAR)
    if given:
        return given
    agent = os.getppid()
    stat = Path(f"/proc/{agent}/stat")
    # Field 22 is the start in ticks since boot; field 2, the name, may hold spaces but ends with the last ")".
    start = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else "0"
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}.{agent}.{start}"
