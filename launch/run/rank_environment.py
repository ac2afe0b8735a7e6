"""Every variable that ranks start with, where the user has not set it: its value, who reads it, and why.

`shoestring doctor` prints this list. The launcher hands it to torchrun, with the binding of ranks to the CPUs beside
their GPU; a rank that a torchrun of one's own has started makes the settings that are read late, and says which it
cannot make any more. `TORCH_NCCL_ASYNC_ERROR_HANDLING` is not here: torch's default ends a rank whose collective
failed, as wanted.

Not yet run on hardware: what is for GPUs alone.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_KEPT = str(2**33)  # bytes
FLIGHT_RECORDER_DIR = "flight_recorder"
"""The folder of a run directory where torch writes the collectives of each rank when one does not return."""


@dataclass(frozen=True)
class EnvironmentSetting:
    """One environment variable."""

    name: str
    value: str
    read_by: str
    """The library that reads it."""
    reason: str
    gpu_only: bool = True
    """Whether runs on CPUs go without it."""
    read_at_startup: bool = False
    """Whether it is read when Python or torch starts, so that a running process cannot set it any more."""
    aliases: tuple[str, ...] = ()
    """Other names of the same setting: a user who has set one of them has set this."""

    def user_value(self, environment: Mapping[str, str]) -> tuple[str, str] | None:
        """The name and value in `environment`, under whichever name."""
        return next(((name, environment[name]) for name in (self.name, *self.aliases) if name in environment), None)


def environment_settings(run_dir: Path) -> tuple[EnvironmentSetting, ...]:
    """Every setting of a run whose directory is `run_dir`."""
    dumps = str(run_dir.absolute() / FLIGHT_RECORDER_DIR / "rank_")
    dump_names = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    where = "the flight recorder's file of each rank, in the run directory and not in the home of one machine"
    return (
        EnvironmentSetting(
            "TORCH_CPP_LOG_LEVEL",
            "ERROR",
            "torch",
            "a warning of torch's C++ part would come from every rank",
            gpu_only=False,
            read_at_startup=True,
        ),
        EnvironmentSetting(
            "OMP_NUM_THREADS",
            "1",
            "OpenMP",
            "with a pool of threads each, the ranks of one machine spend their time spinning",
            gpu_only=False,
            read_at_startup=True,
        ),
        *(
            EnvironmentSetting(
                name,
                _KEPT,
                "glibc",
                "it gives large tensors back to the kernel when they end, and faults the memory of the next in again "
                "page by page; up to 8 GiB it now keeps",
                gpu_only=False,
                read_at_startup=True,
            )
            for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
        ),
        EnvironmentSetting(
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "32",
            "CUDA",
            "a process has 8 hardware queues by default, and a rank a dozen streams; of two streams in one queue, the "
            "second waits behind a receive that was posted ahead in the first",
        ),
        EnvironmentSetting(
            "PYTORCH_ALLOC_CONF",
            "expandable_segments:True",
            "torch",
            "row counts differ in every dispatch, which fragments fixed segments; DeepSeek-V3's fullest rank has "
            "4.8 GiB to spare",
            read_at_startup=True,
            aliases=("PYTORCH_CUDA_ALLOC_CONF",),
        ),
        EnvironmentSetting(
            "NCCL_LAUNCH_ORDER_IMPLICIT",
            "1",
            "NCCL 2.26 or later",
            "kernels of several communicators start in the order in which the host launched them, so that two GPUs "
            "cannot each give its SMs to what the other has not started; a launch waits until the one before it has "
            "started, so the first collective of a step waits for all weights but the last bucket's to be gathered; "
            "set from CUDA 12.3 on, as before that NCCL would run them one after the other, and a receive posted ahead "
            "would stop all",
        ),
        EnvironmentSetting("NCCL_DEBUG", "WARN", "NCCL", "NCCL says nothing of what went wrong unless told to"),
        EnvironmentSetting(
            "TORCH_FR_BUFFER_SIZE",
            "10000",
            "torch",
            "calls that the flight recorder keeps; the default of 2,000 is half a step: 4 layers x 8 all-to-alls x 120 "
            "micro-batches are 3,840",
            aliases=("TORCH_NCCL_TRACE_BUFFER_SIZE",),
        ),
        EnvironmentSetting(
            "TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "torch", "a collective past its limit writes the flight recorder"
        ),
        *(
            EnvironmentSetting(
                name, dumps, "torch 2.13" if name is dump_names[0] else "earlier torch", where, aliases=dump_names
            )
            for name in dump_names
        ),
        EnvironmentSetting(
            "TORCH_GLOO_LAZY_INIT",
            "1",
            "torch",
            "gloo connects a pair of ranks when they first talk; at 2,048 ranks a world-wide group would open 2,047 "
            "sockets in each at once, and on a GPU gloo carries halts and saves alone",
        ),
    )


SAFE_PATH_ENVIRONMENT = {"PYTHONSAFEPATH": "1"}
"""For ranks, which torchrun starts by `python -m`: modules of the working directory are not to be imported."""


def single_node_settings() -> tuple[EnvironmentSetting, ...]:
    """Settings of ranks that are all on this machine."""
    why = "ranks of one machine talk over its loopback interface; gloo would listen on the address of its name"
    loopback = "lo" if sys.platform == "linux" else "lo0"
    return (
        EnvironmentSetting("GLOO_SOCKET_IFNAME", loopback, "gloo", why, gpu_only=False),
        EnvironmentSetting("NCCL_SOCKET_IFNAME", loopback, "NCCL", why.replace("gloo", "NCCL")),
    )


def supports_implicit_launch_order(runtime: str | None, driver: int | None) -> bool:
    """Whether NCCL can order launches of several communicators without running them one after the other.

    `runtime` is CUDA's version in torch ("13.0"), `driver` the newest that the driver serves (13000 for 13.0).
    """
    if runtime is None or driver is None:
        return False
    major, minor = (int(part) for part in runtime.split(".")[:2])
    return min(1000 * major + 10 * minor, driver) >= 12030


def _versions() -> tuple[str | None, int | None]:
    """CUDA's versions in torch and in the driver; None where there is none."""
    import torch  # a second, which no verb that starts no ranks shall wait for

    if torch.version.cuda is None:
        return None, None
    driver: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # builds for CUDA have it
    return torch.version.cuda, driver


def applicable_settings(run_dir: Path, *, on_gpu: bool) -> list[EnvironmentSetting]:
    """Those of `settings` that a run on GPUs, or on CPUs, takes on this machine."""
    found = [setting for setting in environment_settings(run_dir) if on_gpu or not setting.gpu_only]
    if on_gpu and not supports_implicit_launch_order(*_versions()):
        found = [setting for setting in found if setting.name != "NCCL_LAUNCH_ORDER_IMPLICIT"]
    return found


def uses_gpus(device: str, local_ranks: int) -> bool:
    """Whether `training.device` takes GPUs on a machine with so many ranks: `auto` does where each gets its own."""
    import torch

    return device == "cuda" or (device == "auto" and torch.cuda.device_count() >= local_ranks)


COMMON_SETTINGS = tuple(setting for setting in environment_settings(Path()) if not setting.gpu_only)
"""Those that depend neither on the device nor on the run directory."""
COMMON_ENVIRONMENT: Mapping[str, str] = MappingProxyType({setting.name: setting.value for setting in COMMON_SETTINGS})
"""The same by name."""


def build_rank_environment(
    overrides: Mapping[str, str] = MappingProxyType({}), settings: Iterable[EnvironmentSetting] = COMMON_SETTINGS
) -> dict[str, str]:
    """The environment of this process with the settings `made` and with `own`.

    What the user has set wins over settings, and `own` over both.
    """
    ours = {setting.name: setting.value for setting in settings if setting.user_value(os.environ) is None}
    return {**ours, **os.environ, **overrides}


def describe_user_overrides(chosen: Iterable[EnvironmentSetting], environment: Mapping[str, str]) -> Iterator[str]:
    """Yield what the user has set to another value, in words."""
    named = set()
    for setting in chosen:
        found = setting.user_value(environment)
        if found is not None and found[1] != setting.value and found[0] not in named:
            named.add(found[0])
            ours = setting.value if found[0] == setting.name else f"{setting.name}={setting.value}"
            yield f"{found[0]}={found[1]} from your environment, instead of {ours}"


def apply_late_settings(chosen: Iterable[EnvironmentSetting], environment: MutableMapping[str, str]) -> Iterator[str]:
    """Set in `environment`, that of this process, what is missing and read late; say in words what is too late."""
    given, too_late = dict(environment), []
    for setting in chosen:
        if setting.user_value(given) is not None:
            continue
        if setting.read_at_startup:
            too_late.append(f"{setting.name}={setting.value}")
        else:
            environment[setting.name] = setting.value
    if too_late:
        hint = "start the run with `shoestring train` or launch/torchrun.sh, or set them before torchrun"
        yield f"not set, and too late for this process: {', '.join(too_late)}; {hint}"


_NODES = Path("/sys/devices/system/node")
NUMA_BINDING_FLAG = "--numa-binding=node"


@dataclass(frozen=True)
class NumaSupport:
    """What decides whether ranks can be bound here."""

    cpus_by_node: tuple[frozenset[int], ...]
    """Of each NUMA node with CPUs."""
    allowed_cpus: frozenset[int]
    """CPUs that this process may use."""
    has_numactl: bool
    """torchrun runs it."""
    torchrun_has_flag: bool
    """Whether this torchrun knows the flag."""

    @staticmethod
    def detect(nodes: Path = _NODES) -> NumaSupport:
        """Those of this machine."""
        lists = (path.read_text() for path in sorted(nodes.glob("node[0-9]*/cpulist")))
        cpus = tuple(found for found in map(parse_cpu_list, lists) if found)
        has_flag = importlib.util.find_spec("torch.numa.binding") is not None
        return NumaSupport(cpus, frozenset(os.sched_getaffinity(0)), shutil.which("numactl") is not None, has_flag)


def parse_cpu_list(text: str) -> frozenset[int]:
    """The CPUs of a list as Linux writes it: 0-3,8."""
    spans = (part.partition("-")[::2] for part in text.strip().split(",") if part)
    return frozenset(cpu for first, last in spans for cpu in range(int(first), int(last or first) + 1))


def numa_binding_blocker(facts: NumaSupport, *, on_gpu: bool) -> str | None:
    """Return why ranks are not bound to the CPUs of their GPU's NUMA node; None where they are.

    torchrun ends with an error where it cannot bind, so everything that it needs is looked at before.
    """
    if not on_gpu:
        return "ranks on CPUs use all of them"
    if len(facts.cpus_by_node) < 2:
        return "this machine has one NUMA node"
    if not facts.torchrun_has_flag:
        return "this torch's torchrun has no --numa-binding"
    if not facts.has_numactl:
        return "numactl is not installed; install it (apt-get install numactl), so that Python runs beside its GPU"
    if not all(node & facts.allowed_cpus for node in facts.cpus_by_node):
        return "this process may not use CPUs of every NUMA node"
    return None
