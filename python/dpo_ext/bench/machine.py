"""`machine`: what a measurement ran on, so that it can be shown to others."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dpo_ext import __version__

CPUINFO = Path("/proc/cpuinfo")
# What can matter for text and float32; the others of some two hundred flags cannot.
INSTRUCTIONS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_tile",
    "asimd", "asimdhp", "bf16", "sve", "sve2",
)  # fmt: skip
PACKAGES = ("numpy", "tokenizers", "transformers", "trl")


def machine(cpuinfo: Path = CPUINFO) -> dict[str, Any]:
    """The CPU's name, the cores this process may use, the instruction sets that are known, the
    system, and the versions of what takes part; None for a package that is not installed.
    """
    fields = _fields(cpuinfo)
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "instructions": [flag for flag in INSTRUCTIONS if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "dpo_ext": __version__,
            "Python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
    }


def _fields(cpuinfo: Path) -> dict[str, str]:
    """The fields of the first processor; none where the system has no such file."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
