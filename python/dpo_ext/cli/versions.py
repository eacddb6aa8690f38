"""What `dpo-ext --version` says: versions, and which kernels run here, without loading torch."""

from __future__ import annotations

import ctypes
import platform
import sys
from importlib import metadata
from pathlib import Path

from dpo_ext import __version__

# In the order in which the CPU kernels in Rust take them; a test compares.
INSTRUCTION_SETS = {
    "AVX-512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "AVX2": ("avx2", "fma"),
}
PACKAGES = {
    "NumPy": ("numpy",),
    "torch": ("torch",),
    "CuPy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "transformers": ("transformers",),
    "TRL": ("trl",),
    "pyarrow": ("pyarrow",),
}
DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MISSING = "not installed"


def version_lines() -> list[str]:
    """The version first, then a line a fact."""
    found = {name: _installed(names) for name, names in PACKAGES.items()}
    lines = {
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        **found,
        "CPU kernels": cpu_kernels(),
        "CUDA kernels": cuda_kernels(found),
    }
    return [f"dpo_ext {__version__}", *(f"{name:<14}{value}" for name, value in lines.items())]


def _installed(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return metadata.version(name) + (f" ({name})" if len(names) > 1 else "")
        except metadata.PackageNotFoundError:
            continue
    return MISSING


def cpu_kernels(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The instruction sets that the kernels choose when they run."""
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return "NEON, as on every machine of this kind"
    if machine not in ("x86_64", "amd64"):
        return f"those of every {machine}"
    flags = _flags(cpuinfo)
    if flags is None:
        names = " or ".join(INSTRUCTION_SETS)
        return f"{names} if the processor has it, else SSE2: this system does not tell"
    for name, needed in INSTRUCTION_SETS.items():
        if flags.issuperset(needed):
            return f"{name} ({' '.join(needed)})"
    return "SSE2: the processor has no AVX2"


def _flags(cpuinfo: Path) -> set[str] | None:
    """What Linux says that processor and system can do; None elsewhere."""
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "flags":
                    return set(value.split())
    except OSError:
        pass
    return None


def cuda_kernels(found: dict[str, str]) -> str:
    """The devices that the CUDA kernels can run on, or what they lack."""
    devices = cuda_devices()
    if isinstance(devices, str):
        return f"cannot run: {devices}"
    lacks = [name for name in ("torch", "CuPy") if found[name] == MISSING]
    if lacks:
        return f"cannot run: {' and '.join(lacks)} {MISSING}; {', '.join(devices)}"
    return f"can run on {', '.join(devices)}"


def cuda_devices(driver: str = DRIVER) -> list[str] | str:
    """The names of the devices, from the driver alone; or why there are none."""
    try:
        cuda = ctypes.CDLL(driver)
    except OSError:
        return f"no CUDA driver ({driver})"
    code = cuda.cuInit(0)
    if code:
        return f"the CUDA driver does not start (error {code})"
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for i in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        cuda.cuDeviceGet(ctypes.byref(device), i)
        cuda.cuDeviceGetName(name, len(name), device)
        names.append(name.value.decode(errors="replace"))
    return names or "no CUDA device"
