"""Process of one rehearsed rank: python -m shoestring.launch.rehearsal.rank SPEC.json OUT.json

SPEC: {"overrides": [...], "config_dir": null or a path, "rank": a number, "micro_batches": null or a number,
"shim": the path that `build_autograd_shim` returns}. Nothing here may import torch before the shim is loaded.
"""

import ctypes
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> None:
    """Rehearse the rank that the first argument's file describes, and write the log to the second argument.

    Print the error and exit with 2 if the run cannot be rehearsed.
    """
    spec = json.loads(Path(arguments[0]).read_text())
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are only counted, neither compiled nor interpreted
    ctypes.CDLL(spec["shim"], mode=ctypes.RTLD_GLOBAL)
    from ...comm.errors import ConfigError
    from ..compose import compose_run_config  # imports torch, which now finds the shim's device
    from .gpu_config import gpu_run_config
    from .rehearse import RankRehearsal

    directory = None if spec["config_dir"] is None else Path(spec["config_dir"])
    try:
        config = gpu_run_config(compose_run_config(spec["overrides"], directory), spec["micro_batches"])
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    RankRehearsal(config, spec["rank"]).run().write(Path(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
