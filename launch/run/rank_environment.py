"""Environment variables of ranks: the value of each unless the user has set it, the library that reads it, and why.

`shoestring doctor` prints this list. The launcher passes it to torchrun, with the binding of ranks to the CPUs of their
GPU's NUMA node. A rank under the user's torchrun sets those that are read late, and prints which are too late.
`TORCH_NCCL_ASYNC_ERROR_HANDLING` is not in the list: torch's default ends a rank whose collective failed, as wanted.

Not yet run on hardware: the settings for GPUs.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

_MALLOC_THRESHOLD = str(2**33)  # bytes
FLIGHT_RECORDER_DIR = "flight_recorder"
"""Folder of the run directory in which torch dumps the collectives of each rank when one does not return."""


@dataclass(frozen=True)
class EnvironmentSetting:
    """One environment variable."""

    name: str
    value: str
    read_by: str
    """Library that reads it."""
    reason: str
    gpu_only: bool = True
    """True if runs on CPUs do not need it."""
    read_at_startup: bool = False
    """True if Python or torch reads it at startup, so that a running process can no longer set it."""
    aliases: tuple[str, ...] = ()
    """Other names of the setting; a user who has set one of them has set this one."""

    def user_value(self, environment: Mapping[str, str]) -> tuple[str, str] | None:
        """Return the name (or alias) and value that `environment` holds, or None."""
        return next(((name, environment[name]) for name in (self.name, *self.aliases) if name in environment), None)


_RUN_DIR = "RUN_DIR"
_DUMP_NAMES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # of torch 2.13 and of earlier torch
_WHY_MALLOC = (
    "by default the memory of freed large tensors returns to the kernel, and the next tensor faults it in page by "
    "page; with this value up to 8 GiB stay in the process"
)
_WHY_DUMPS = "keeps the flight recorder's file of each rank in the run directory, not in one machine's home"
# fmt: off
_SETTINGS = (
    EnvironmentSetting("TORCH_CPP_LOG_LEVEL", "ERROR", "torch",
        "otherwise every rank prints the warnings of torch's C++ code", gpu_only=False, read_at_startup=True),
    EnvironmentSetting("OMP_NUM_THREADS", "1", "OpenMP",
        "with one thread pool per rank, the ranks of a machine spend their time spinning",
        gpu_only=False, read_at_startup=True),
    EnvironmentSetting("MALLOC_TRIM_THRESHOLD_", _MALLOC_THRESHOLD, "glibc", _WHY_MALLOC,
        gpu_only=False, read_at_startup=True),
    EnvironmentSetting("MALLOC_MMAP_THRESHOLD_", _MALLOC_THRESHOLD, "glibc", _WHY_MALLOC,
        gpu_only=False, read_at_startup=True),
    EnvironmentSetting("CUDA_DEVICE_MAX_CONNECTIONS", "32", "CUDA",
        "a process has 8 hardware queues by default and a rank a dozen streams; if two streams share a queue, the "
        "second waits for a receive that was posted early in the first"),
    EnvironmentSetting("PYTORCH_ALLOC_CONF", "expandable_segments:True", "torch",
        "row counts differ in every dispatch, which fragments fixed segments; DeepSeek-V3's largest rank has only "
        "4.8 GiB free", read_at_startup=True, aliases=("PYTORCH_CUDA_ALLOC_CONF",)),
    EnvironmentSetting("NCCL_LAUNCH_ORDER_IMPLICIT", "1", "NCCL 2.26 or later",
        "kernels of several communicators start in the order of their launches on the host, so that no two GPUs wait "
        "in kernels that the other has not started; a launch waits until the previous one has started, so the first "
        "collective of a step waits until all buckets but the last are gathered; set from CUDA 12.3 on, since before "
        "it NCCL serializes the kernels, and a receive posted early blocks all others"),
    EnvironmentSetting("NCCL_DEBUG", "WARN", "NCCL", "NCCL prints no errors by default"),
    EnvironmentSetting("TORCH_FR_BUFFER_SIZE", "10000", "torch",
        "calls that the flight recorder keeps; the default of 2,000 covers half a step: 4 layers x 8 all-to-alls x "
        "120 micro-batches are 3,840", aliases=("TORCH_NCCL_TRACE_BUFFER_SIZE",)),
    EnvironmentSetting("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "torch",
        "a collective that times out dumps the flight recorder"),
    EnvironmentSetting(_DUMP_NAMES[0], f"{_RUN_DIR}/{FLIGHT_RECORDER_DIR}/rank_", "torch 2.13", _WHY_DUMPS,
        aliases=_DUMP_NAMES),
    EnvironmentSetting(_DUMP_NAMES[1], f"{_RUN_DIR}/{FLIGHT_RECORDER_DIR}/rank_", "earlier torch", _WHY_DUMPS,
        aliases=_DUMP_NAMES),
    EnvironmentSetting("TORCH_GLOO_LAZY_INIT", "1", "torch",
        "gloo connects two ranks at their first message; at 2,048 ranks a group of all ranks would open 2,047 sockets "
        "per rank, and on GPUs gloo carries only stop votes and saves"),
)
# fmt: on


def environment_settings(run_dir: Path) -> tuple[EnvironmentSetting, ...]:
    """Return all settings of a run with the directory `run_dir`."""
    folder = str(run_dir.absolute())
    return tuple(replace(setting, value=setting.value.replace(_RUN_DIR, folder)) for setting in _SETTINGS)


SAFE_PATH_ENVIRONMENT = {"PYTHONSAFEPATH": "1"}
"""Keeps modules of the working directory out of ranks, which torchrun starts with `python -m`."""


def single_node_settings() -> tuple[EnvironmentSetting, ...]:
    """Return the settings of a run whose ranks are all on this machine."""
    why = "ranks of one machine use its loopback interface; by default gloo listens on the address of its host name"
    loopback = "lo" if sys.platform == "linux" else "lo0"
    return (
        EnvironmentSetting("GLOO_SOCKET_IFNAME", loopback, "gloo", why, gpu_only=False),
        EnvironmentSetting("NCCL_SOCKET_IFNAME", loopback, "NCCL", why.replace("gloo", "NCCL")),
    )


def supports_implicit_launch_order(runtime: str | None, driver: int | None) -> bool:
    """Return whether NCCL can order launches of several communicators without serializing their kernels.

    `runtime` is torch's CUDA version ("13.0"), `driver` the newest version that the driver supports (13000 for 13.0).
    """
    if runtime is None or driver is None:
        return False
    major, minor = (int(part) for part in runtime.split(".")[:2])
    return min(1000 * major + 10 * minor, driver) >= 12030


def _versions() -> tuple[str | None, int | None]:
    """Return the CUDA versions of torch and of the driver; None without CUDA."""
    import torch  # takes a second, which verbs that start no ranks need not wait

    if torch.version.cuda is None:
        return None, None
    driver: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # builds for CUDA have it
    return torch.version.cuda, driver


def applicable_settings(run_dir: Path, *, on_gpu: bool) -> list[EnvironmentSetting]:
    """Return the settings that apply to a run on GPUs, or on CPUs, on this machine."""
    found = [setting for setting in environment_settings(run_dir) if on_gpu or not setting.gpu_only]
    if on_gpu and not supports_implicit_launch_order(*_versions()):
        found = [setting for setting in found if setting.name != "NCCL_LAUNCH_ORDER_IMPLICIT"]
    return found


def uses_gpus(device: str, local_ranks: int) -> bool:
    """Return whether `local_ranks` ranks with `training.device` use GPUs: `auto` does if each rank gets a GPU."""
    import torch

    return device == "cuda" or (device == "auto" and torch.cuda.device_count() >= local_ranks)


COMMON_SETTINGS = tuple(setting for setting in environment_settings(Path()) if not setting.gpu_only)
"""Settings that depend neither on the device nor on the run directory."""
COMMON_ENVIRONMENT: Mapping[str, str] = MappingProxyType({setting.name: setting.value for setting in COMMON_SETTINGS})
"""Values of `COMMON_SETTINGS` by name."""


def build_rank_environment(
    overrides: Mapping[str, str] = MappingProxyType({}), settings: Iterable[EnvironmentSetting] = COMMON_SETTINGS
) -> dict[str, str]:
    """Return the environment of this process with `settings` and `overrides` added.

    A variable that the user has set takes precedence over `settings`, and `overrides` over both.
    """
    defaults = {setting.name: setting.value for setting in settings if setting.user_value(os.environ) is None}
    return {**defaults, **os.environ, **overrides}


def describe_user_overrides(chosen: Iterable[EnvironmentSetting], environment: Mapping[str, str]) -> Iterator[str]:
    """Yield one message per setting that the user has set to another value."""
    named = set()
    for setting in chosen:
        found = setting.user_value(environment)
        if found is not None and found[1] != setting.value and found[0] not in named:
            named.add(found[0])
            default = setting.value if found[0] == setting.name else f"{setting.name}={setting.value}"
            yield f"{found[0]}={found[1]} from your environment, instead of {default}"


def apply_late_settings(chosen: Iterable[EnvironmentSetting], environment: MutableMapping[str, str]) -> Iterator[str]:
    """Add to this process's `environment` the missing settings that are read late; yield a message on the others."""
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
        yield f"not set, and too late to set in this process: {', '.join(too_late)}; {hint}"


_NODES = Path("/sys/devices/system/node")
NUMA_BINDING_FLAG = "--numa-binding=node"


@dataclass(frozen=True)
class NumaSupport:
    """Facts that decide whether ranks can be bound to NUMA nodes on this machine."""

    cpus_by_node: tuple[frozenset[int], ...]
    """CPUs of each NUMA node that has any."""
    allowed_cpus: frozenset[int]
    """CPUs that this process may use."""
    has_numactl: bool
    """True if numactl, which torchrun calls, is installed."""
    torchrun_has_flag: bool
    """True if torchrun knows `--numa-binding`."""

    @staticmethod
    def detect(nodes: Path = _NODES) -> "NumaSupport":
        """Read the facts of this machine."""
        lists = (path.read_text() for path in sorted(nodes.glob("node[0-9]*/cpulist")))
        cpus = tuple(found for found in map(parse_cpu_list, lists) if found)
        has_flag = importlib.util.find_spec("torch.numa.binding") is not None
        return NumaSupport(cpus, frozenset(os.sched_getaffinity(0)), shutil.which("numactl") is not None, has_flag)


def parse_cpu_list(text: str) -> frozenset[int]:
    """Parse a CPU list in Linux's format, such as 0-3,8."""
    spans = (part.partition("-")[::2] for part in text.strip().split(",") if part)
    return frozenset(cpu for first, last in spans for cpu in range(int(first), int(last or first) + 1))


def numa_binding_blocker(facts: NumaSupport, *, on_gpu: bool) -> str | None:
    """Return why ranks are not bound to the CPUs of their GPU's NUMA node; None if they are."""
    # torchrun ends with an error if it cannot bind, so everything that it needs is checked here.
    no_numactl = "numactl is not installed; install it (apt-get install numactl) to run each rank near its GPU"
    is_allowed = all(node & facts.allowed_cpus for node in facts.cpus_by_node)
    blockers = {
        "ranks on CPUs use all of them": not on_gpu,
        "this machine has one NUMA node": len(facts.cpus_by_node) < 2,
        "this torch's torchrun has no --numa-binding": not facts.torchrun_has_flag,
        no_numactl: not facts.has_numactl,
        "this process may not use CPUs of every NUMA node": not is_allowed,
    }
    return next((reason for reason, is_true in blockers.items() if is_true), None)
