"""A stand-in for the process of a rehearsed rank: writes a log, or does what its first argument says."""

import json
import os
import sys
import time
from pathlib import Path

from shoestring.tests.launch.rehearsal.logs import log


def main() -> None:
    behavior, spec, output = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    rank: int = spec["rank"]
    if behavior.startswith("hang=") and rank == 1:
        Path(behavior.removeprefix("hang=")).write_text(str(os.getpid()))
        time.sleep(600)
    if behavior == "die" and rank == 1:
        print("words of rank 1", file=sys.stderr)
        sys.exit(3)
    if behavior == "killed":
        os.kill(os.getpid(), 9)
    assert spec["overrides"] == ["experiment=quickstart"]
    assert (spec["config_dir"], spec["micro_batches"], spec["shim"]) == (None, 8, "shim.so")
    log(rank).write(output)


main()
