"""The process of a rehearsed rank whose MoE layers have faults: SPEC.json OUT.json FAULT[,FAULT...]"""

import ctypes
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from shoestring.launch.rehearsal import rank


def main(spec: str, out: str, faults: str) -> None:
    ctypes.CDLL(json.loads(Path(spec).read_text())["shim"], mode=ctypes.RTLD_GLOBAL)
    import torch

    from shoestring.trainer.model.layer import MoELayer

    merge = MoELayer.add_expert_outputs

    def merge_with_faults(residual_BSD: torch.Tensor, *others: Any) -> torch.Tensor:
        if "host tensor" in faults:
            residual_BSD = residual_BSD + torch.ones(residual_BSD.shape[-1], dtype=residual_BSD.dtype)
        if "host read" in faults:
            assert float(residual_BSD.sum().detach()) == 1
        if "deprecated" in faults:
            warnings.warn("merging is deprecated", FutureWarning, stacklevel=1)
        if "shape" in faults:
            residual_BSD = residual_BSD.view(7, -1)
        return merge(residual_BSD, *others)

    MoELayer.add_expert_outputs = staticmethod(merge_with_faults)  # type: ignore[assignment,method-assign]
    rank.main([spec, out])


if __name__ == "__main__":
    main(*sys.argv[1:])
