"""What a run ran on, and the settings without which the same command would not give the same bits."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from verify.kernels.waiting import WAITING_VARIABLES, waiting_variables

PACKAGES = ("torch", "numpy", "gguf", "tokenizers", "datasets", "scipy", "pyarrow", "triton")
# Read by the libraries when they start: set before the first product. MKL then gives one result a shape,
# whatever the alignment; cuBLAS keeps to one workspace, and so to one order of summation.
DETERMINISTIC_VARIABLES = {
    "MKL_CBWR": "AVX512,STRICT",
    "MKL_DYNAMIC": "FALSE",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def prepare_variables() -> None:
    """Set the environment variables that libraries read when they start, where the user has not."""
    for name, value in DETERMINISTIC_VARIABLES.items():
        os.environ.setdefault(name, value)
    os.environ.update(waiting_variables(os.environ))
    wanted = DETERMINISTIC_VARIABLES["MKL_CBWR"]
    if os.environ["MKL_CBWR"] == wanted and "avx512f" not in _cpu_flags():
        os.environ["MKL_CBWR"] = "AVX2,STRICT" if "avx2" in _cpu_flags() else "COMPATIBLE"


def prepare_torch() -> None:
    """Deterministic algorithms, no TF32, no gradients."""
    import torch

    # The plainer call would load the compiler: thousands of modules.
    torch.set_deterministic_debug_mode("error")
    # Filling new memory would hide reads of it in tests only, at the price of a pass over every tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    torch.set_grad_enabled(False)


def describe(device: str) -> dict[str, Any]:
    """Versions, device, threads and settings, as `run.json` holds them."""
    import torch

    found: dict[str, Any] = {
        "fa-verify": version_of("fa-verify"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": device,
        "packages": {name: version_of(name) for name in PACKAGES},
        "variables": {name: os.environ.get(name) for name in (*DETERMINISTIC_VARIABLES, *WAITING_VARIABLES)},
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["cuda"] = torch.version.cuda
        found["multiprocessors"] = properties.multi_processor_count
    return found


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Processors that this process may run on, at least 1."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # no such question on macOS
        return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of main memory that are free to use; a guess of 4 GiB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30


def anonymous_memory() -> int:
    """Anonymous memory of this process now in bytes, file-backed pages left out; 0 where it is not known."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def process_seconds() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def _cpu_info() -> Mapping[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in first.splitlines())
        if value
    }


def _cpu_flags() -> frozenset[str]:
    return frozenset(_cpu_info().get("flags", "").split())
