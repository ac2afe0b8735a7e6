"""What the ledger calls a launch."""

from __future__ import annotations

import os
from pathlib import Path

ATTEMPT_VARIABLE = "SHOESTRING_ATTEMPT"
"""By which the launcher tells its ranks."""


def attempt_name() -> str:
    """What the ledger calls this launch: as the launcher says, or as the torchrun that has started this rank is known.

    Its run id is the same each time (`none`) unless it is given; process number and start tell two of them apart, and
    stay when it starts its ranks again.
    """
    given = os.environ.get(ATTEMPT_VARIABLE)
    if given:
        return given
    agent = os.getppid()
    stat = Path(f"/proc/{agent}/stat")
    # Field 22 is the start in ticks since the boot; field 2, the name, may hold spaces but ends with the last ")".
    start = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else "0"
    return f"{os.environ.get('TORCHELASTIC_RUN_ID', 'none')}.{agent}.{start}"
