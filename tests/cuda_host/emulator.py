"""Runs the kernels of ``cuda/`` on the host: g++ builds them through ``cuda_emu.h`` once, ctypes calls them.

``Emulator.launch`` stands in for ``dpo_ext.torch.logps.cuda.launch``, so a test runs the real launch layer on CPU tensors.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

from dpo_ext.torch.logps import cuda as kernels

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
C_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}


class FaultError(RuntimeError):
    """The emulator refused what a kernel did: a divergent barrier, a shuffle outside its mask."""


def compile_cached(main: str, folder: Path, flags: list[str]) -> Path:
    """The program or library of ``main`` and the kernels in ``folder``; built again only if they changed."""
    sources = sorted([*folder.glob("*.cu*"), HERE / main, HERE / "cuda_emu.h"])
    digest = hashlib.sha256(repr(flags).encode())
    for path in sources:
        digest.update(path.read_bytes())
    built = ROOT / "target" / "cuda_host" / f"{main}-{digest.hexdigest()[:16]}"
    built.parent.mkdir(parents=True, exist_ok=True)
    with built.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other worker compiles, this one waits
        if built.exists():
            return built
        fresh = built.with_suffix(f".{os.getpid()}")
        command = [
            "g++",
            *FLAGS,
            *flags,
            f"-I{HERE}",
            f"-I{folder}",
            str(HERE / main),
            "-o",
            str(fresh),
        ]
        subprocess.run(command, check=True)
        fresh.replace(built)
    return built


class Emulator:
    """The kernels as a library. Every launch takes the next seed, so another schedule."""

    def __init__(self, processors: int = 1) -> None:
        # Not -O2: g++ 12 then merges the aligned and the unaligned form of a load into an aligned one.
        flags = ["-O1", "-g1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
        self.library = ctypes.CDLL(str(compile_cached("host.cpp", kernels.CUDA_FOLDER, flags)))
        self.library.parameter_bytes.restype = ctypes.c_char_p
        self.seed = 0
        self.processors = processors
        self.launched: list[tuple[str, tuple[int, int]]] = []

    def parameter_bytes(self, name: str) -> str:
        """Bytes of each parameter of an instantiation, one digit each."""
        return self.library.parameter_bytes(name.encode()).decode()

    def launch(self, kernel, template, grid, arguments, device) -> None:
        """As ``dpo_ext.torch.logps.cuda.launch``."""
        converted = kernels.convert(kernel, arguments)
        values = [
            C_TYPES[t](a if t == "p" else a.item())
            for t, a in zip(kernels.PARAMETERS[kernel], converted, strict=True)
        ]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        message = ctypes.create_string_buffer(1000)
        name = kernels.name_expression(kernel, template)
        self.seed += 1
        self.launched.append((name, grid))
        failed = self.library.launch(
            name.encode(), *grid, ctypes.c_uint64(self.seed), addresses, message, len(message)
        )
        if failed:
            raise FaultError(message.value.decode())

    def install(self, monkeypatch) -> None:
        """Puts the emulator in the place of the device."""
        monkeypatch.setattr(kernels, "launch", self.launch)
        monkeypatch.setattr(kernels, "processors", lambda device: self.processors)
