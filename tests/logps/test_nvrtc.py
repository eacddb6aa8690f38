"""NVRTC compiles every kernel x dtype x architecture with no GPU, and what comes out is gated.

The options are CuPy's own (``cupy/cuda/compiler.py`` adds all but the first and the last), or the gate would look at
another kernel than the one that runs. The machine code is read too, where NVIDIA's disassembler is found: `CEILINGS` is what each
kernel may take of it, and `make ceilings` measures that table again.
"""

from __future__ import annotations

import functools
import itertools
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import sass

from dpo_ext.torch.logps import cuda as kernels

pytest.importorskip("cupy", reason="CuPy is not installed")

from cuda.pathfinder import find_nvidia_header_directory
from cupy.cuda import nvrtc

pytestmark = pytest.mark.slow

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# 64 registers leave room for four blocks of 256 threads on every architecture here, 80 for three.
REGISTERS = {"token_stats.cu": 80, "logits_grad.cu": 64, "segment_sum.cu": 40}
WIDE = r"\S*\.(v4\.[a-z]32|v2\.[a-z]64|b128)\b"  # 16 bytes
BOOLS = ("false", "true")
TEMPLATES = {
    "token_stats.cu": list(itertools.product(kernels.TYPES.values(), kernels.MAPS, BOOLS)),
    "logits_grad.cu": list(itertools.product(kernels.TYPES.values(), kernels.MAPS)),
    "segment_sum.cu": [()],
}


def names(file: str) -> list[str]:
    family = [kernel for kernel, of in kernels.FILES.items() if of == file]
    return [kernels.name_expression(k, t) for t in TEMPLATES[file] for k in family]


class Compiled(NamedTuple):
    cubin: bytes
    ptx: str
    log: str
    mangled: dict[str, str]
    """Name of each kernel in the cubin to what it is called here."""


@functools.cache
def compile_for(file: str, arch: str, source: str | None = None, only: str = "") -> Compiled:
    options = (
        *kernels.OPTIONS,
        "-ftz=true",
        "--device-as-default-execution-space",
        "-I" + find_nvidia_header_directory("cudart"),
        "-arch=" + arch,
        "--ptxas-options=-v",
    )
    program = nvrtc.createProgram(source or kernels.source(file), file, (), ())
    for name in (n for n in names(file) if only in n):
        nvrtc.addNameExpression(program, name)
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(f"{arch}: {nvrtc.getProgramLog(program)}")
    # CuPy strips the last byte of a cubin, which belongs to the file.
    return Compiled(
        nvrtc.getCUBIN(program) + b"\0",
        nvrtc.getPTX(program).decode(),
        nvrtc.getProgramLog(program),
        {nvrtc.getLoweredName(program, name): name for name in names(file) if only in name},
    )


def before_loops(body: str) -> str:
    """The PTX in front of the first label that a later branch goes back to."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$L__BB\w+):", body, re.MULTILINE)}
    jumps = re.finditer(r"bra(?:\.uni)? \t?(\$L__BB\w+);", body)
    return body[: min(at for m in jumps if (at := labels[m[1]]) < m.start())]


def gate(file: str, arch: str, source: str | None = None, only: str = "") -> int:
    """The most registers of any kernel; raises if a gate is not met."""
    cubin, ptx, log, _ = compile_for(file, arch, source, only)
    expected = [name for name in names(file) if only in name]
    bodies = {entry.split("(")[0].strip(): entry for entry in ptx.split(".entry ")[1:]}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    assert cubin.startswith(b"\x7fELF")
    assert len(bodies) == len(registers) == len(expected), log
    assert len(spilled) == 2 * len(registers), log
    assert not any(spilled), f"{file}, {arch}: {max(spilled)} bytes spilled"
    assert max(registers) <= REGISTERS[file], f"{file}, {arch}: {max(registers)} registers"
    if file != "segment_sum.cu":
        streaming = {n: b for n, b in bodies.items() if "finish" not in n and "grad_rows" not in n}
        assert len(streaming) == len(expected) // 2
        for name, body in streaming.items():
            assert re.search(r"ld\.global" + WIDE, body), f"{file}, {arch}, {name}: no 16-byte load"
            if file == "logits_grad.cu":
                assert re.search(r"st\.global" + WIDE, body), (
                    f"{file}, {arch}, {name}: no 16-byte store"
                )
            else:
                # Backward begins at what forward read last: no hint may drop that from the cache.
                assert ".cs." not in body, f"{file}, {arch}, {name}: a streaming load"
                # its row, its target and the target's logit
                before = before_loops(body)
                assert before.count("ld.global") == 3, f"{file}, {arch}, {name}: a late target"
            assert ".local" not in body, f"{file}, {arch}, {name}: local memory"
    return max(registers)


@pytest.fixture(
    scope="module",
    params=list(itertools.product(sorted(TEMPLATES), ARCHITECTURES)),
    ids=lambda param: "-".join(param),
)
def built(request):
    """File and architecture: of one module, so that both tests of a pair follow each other and it is compiled once."""
    return request.param


def test_every_kernel_compiles_without_spills_with_wide_loads(built):
    assert gate(*built) > 0


# ---- the machine code -------------------------------------------------

needs_nvdisasm = pytest.mark.skipif(sass.find_nvdisasm() is None, reason=sass.NO_NVDISASM)
MEASURED = (13, 0)
measured_here = pytest.mark.skipif(
    nvrtc.getVersion() != MEASURED,
    reason="the ceilings are those of NVRTC {}.{}, this is {}.{}".format(
        *MEASURED, *nvrtc.getVersion()
    ),
)
# Instructions a column by which a ceiling may be passed: it is rounded, and 8 instructions for 32 columns may come and go.
SLACK = 0.25
BUNDLE = 32  # columns that a thread has in flight
SIZES = {"float": 4, "__half": 2, "__nv_bfloat16": 2}

# Of each kernel and architecture, on the main loop's aligned path: instructions a column, special functions (MUFU) a column,
# - where there is no such loop; then registers, blocks an SM, accesses of local memory. benches/head predicts times from it.
# By `make ceilings`, under NVRTC `MEASURED`: another one allocates other registers for the same source.
CEILINGS = """
kernel                                           | sm_80             | sm_86             | sm_89             | sm_90             | sm_100            | sm_120
token_stats<float, PLAIN, false>                 | 6.06 1.03 64 4 0  | 6.06 1.03 64 4 0  | 6.06 1.03 64 4 0  | 6.03 1.03 64 4 0  | 5.50 1.03 64 4 0  | 6.00 1.03 64 4 0
token_stats_finish<float, PLAIN, false>          | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 40 6 0        | - - 40 6 0
token_stats<float, PLAIN, true>                  | 11.56 1.03 80 3 0 | 11.56 1.03 80 3 0 | 11.56 1.03 80 3 0 | 11.53 1.03 80 3 0 | 11.16 1.03 72 3 0 | 11.53 1.03 79 3 0
token_stats_finish<float, PLAIN, true>           | - - 55 4 0        | - - 56 4 0        | - - 56 4 0        | - - 56 4 0        | - - 54 4 0        | - - 55 4 0
token_stats<float, SCALED, false>                | 7.06 1.03 63 4 0  | 7.06 1.03 63 4 0  | 7.06 1.03 63 4 0  | 7.03 1.03 63 4 0  | 6.50 1.03 64 4 0  | 7.00 1.03 64 4 0
token_stats_finish<float, SCALED, false>         | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 40 6 0        | - - 40 6 0
token_stats<float, SCALED, true>                 | 12.56 1.03 80 3 0 | 12.56 1.03 79 3 0 | 12.56 1.03 79 3 0 | 12.53 1.03 79 3 0 | 12.16 1.03 72 3 0 | 12.53 1.03 80 3 0
token_stats_finish<float, SCALED, true>          | - - 55 4 0        | - - 56 4 0        | - - 56 4 0        | - - 56 4 0        | - - 54 4 0        | - - 55 4 0
token_stats<float, CAPPED, false>                | 17.06 1.03 75 3 0 | 17.06 1.03 75 3 0 | 17.06 1.03 75 3 0 | 17.00 1.03 80 3 0 | 16.09 1.03 80 3 0 | 17.09 1.03 80 3 0
token_stats_finish<float, CAPPED, false>         | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 40 6 0        | - - 40 6 0
token_stats<float, CAPPED, true>                 | 22.59 1.03 80 3 0 | 22.59 1.03 79 3 0 | 22.59 1.03 79 3 0 | 22.62 1.03 80 3 0 | 21.75 1.03 80 3 0 | 22.59 1.03 80 3 0
token_stats_finish<float, CAPPED, true>          | - - 55 4 0        | - - 56 4 0        | - - 56 4 0        | - - 56 4 0        | - - 54 4 0        | - - 55 4 0
token_stats<__half, PLAIN, false>                | 6.94 1.03 64 4 0  | 6.94 1.03 64 4 0  | 6.94 1.03 64 4 0  | 6.91 1.03 64 4 0  | 6.38 1.03 64 4 0  | 6.88 1.03 64 4 0
token_stats_finish<__half, PLAIN, false>         | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 40 6 0        | - - 40 6 0
token_stats<__half, PLAIN, true>                 | 11.81 1.03 80 3 0 | 11.81 1.03 79 3 0 | 11.81 1.03 79 3 0 | 11.78 1.03 79 3 0 | 11.34 1.03 72 3 0 | 11.78 1.03 80 3 0
token_stats_finish<__half, PLAIN, true>          | - - 55 4 0        | - - 56 4 0        | - - 56 4 0        | - - 56 4 0        | - - 54 4 0        | - - 55 4 0
token_stats<__half, SCALED, false>               | 7.97 1.03 64 4 0  | 7.97 1.03 64 4 0  | 7.97 1.03 64 4 0  | 7.94 1.03 64 4 0  | 7.38 1.03 64 4 0  | 7.88 1.03 64 4 0
token_stats_finish<__half, SCALED, false>        | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 40 6 0        | - - 40 6 0
token_stats<__half, SCALED, true>                | 12.81 1.03 80 3 0 | 12.81 1.03 79 3 0 | 12.81 1.03 79 3 0 | 12.78 1.03 79 3 0 | 12.34 1.03 72 3 0 | 12.84 1.03 80 3 0
token_stats_finish<__half, SCALED, true>         | - - 55 4 0        | - - 56 4 0        | - - 56 4 0        | - - 56 4 0        | - - 54 4 0        | - - 55 4 0
token_stats<__half, CAPPED, false>               | 17.41 1.03 79 3 0 | 17.41 1.03 79 3 0 | 17.41 1.03 79 3 0 | 17.44 1.03 80 3 0 | 16.47 1.03 80 3 0 | 17.47 1.03 80 3 0
token_stats_finish<__half, CAPPED, false>        | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 40 6 0        | - - 40 6 0
token_stats<__half, CAPPED, true>                | 22.34 1.03 80 3 0 | 22.34 1.03 80 3 0 | 22.34 1.03 80 3 0 | 22.38 1.03 80 3 0 | 21.50 1.03 80 3 0 | 22.47 1.03 80 3 0
token_stats_finish<__half, CAPPED, true>         | - - 55 4 0        | - - 56 4 0        | - - 56 4 0        | - - 56 4 0        | - - 54 4 0        | - - 55 4 0
token_stats<__nv_bfloat16, PLAIN, false>         | 6.88 1.03 64 4 0  | 6.88 1.03 64 4 0  | 6.88 1.03 64 4 0  | 6.88 1.03 64 4 0  | 6.38 1.03 64 4 0  | 6.88 1.03 64 4 0
token_stats_finish<__nv_bfloat16, PLAIN, false>  | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 40 6 0        | - - 40 6 0
token_stats<__nv_bfloat16, PLAIN, true>          | 11.81 1.03 75 3 0 | 12.25 1.03 80 3 0 | 12.25 1.03 80 3 0 | 11.97 1.03 67 3 0 | 11.34 1.03 72 3 0 | 11.78 1.03 79 3 0
token_stats_finish<__nv_bfloat16, PLAIN, true>   | - - 55 4 0        | - - 56 4 0        | - - 56 4 0        | - - 56 4 0        | - - 54 4 0        | - - 55 4 0
token_stats<__nv_bfloat16, SCALED, false>        | 7.91 1.03 64 4 0  | 7.91 1.03 64 4 0  | 7.91 1.03 64 4 0  | 7.88 1.03 64 4 0  | 7.38 1.03 64 4 0  | 7.88 1.03 64 4 0
token_stats_finish<__nv_bfloat16, SCALED, false> | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 40 6 0        | - - 40 6 0
token_stats<__nv_bfloat16, SCALED, true>         | 12.81 1.03 75 3 0 | 13.25 1.03 80 3 0 | 13.25 1.03 80 3 0 | 12.94 1.03 73 3 0 | 12.34 1.03 72 3 0 | 12.78 1.03 79 3 0
token_stats_finish<__nv_bfloat16, SCALED, true>  | - - 55 4 0        | - - 56 4 0        | - - 56 4 0        | - - 56 4 0        | - - 54 4 0        | - - 55 4 0
token_stats<__nv_bfloat16, CAPPED, false>        | 17.41 1.03 78 3 0 | 17.41 1.03 78 3 0 | 17.41 1.03 78 3 0 | 17.44 1.03 80 3 0 | 16.47 1.03 80 3 0 | 17.47 1.03 80 3 0
token_stats_finish<__nv_bfloat16, CAPPED, false> | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 38 6 0        | - - 40 6 0        | - - 40 6 0
token_stats<__nv_bfloat16, CAPPED, true>         | 22.34 1.03 80 3 0 | 22.34 1.03 80 3 0 | 22.34 1.03 80 3 0 | 22.38 1.03 80 3 0 | 21.50 1.03 80 3 0 | 22.47 1.03 80 3 0
token_stats_finish<__nv_bfloat16, CAPPED, true>  | - - 55 4 0        | - - 56 4 0        | - - 56 4 0        | - - 56 4 0        | - - 54 4 0        | - - 55 4 0
grad_rows<float, PLAIN>                          | - - 21 8 0        | - - 22 6 0        | - - 22 6 0        | - - 22 8 0        | - - 22 8 0        | - - 22 6 0
logits_grad<float, PLAIN>                        | 4.69 1.00 64 4 0  | 4.69 1.00 64 4 0  | 4.69 1.00 64 4 0  | 4.69 1.00 64 4 0  | 4.72 1.00 64 4 0  | 4.69 1.00 63 4 0
grad_rows<float, SCALED>                         | - - 21 8 0        | - - 22 6 0        | - - 22 6 0        | - - 22 8 0        | - - 22 8 0        | - - 22 6 0
logits_grad<float, SCALED>                       | 5.69 1.00 64 4 0  | 5.69 1.00 64 4 0  | 5.69 1.00 64 4 0  | 5.69 1.00 64 4 0  | 5.72 1.00 64 4 0  | 5.69 1.00 60 4 0
grad_rows<float, CAPPED>                         | - - 23 8 0        | - - 22 6 0        | - - 22 6 0        | - - 22 8 0        | - - 22 8 0        | - - 22 6 0
logits_grad<float, CAPPED>                       | 17.88 1.00 56 4 0 | 17.88 1.00 56 4 0 | 17.88 1.00 56 4 0 | 17.81 1.00 64 4 0 | 17.66 1.00 64 4 0 | 18.00 1.00 64 4 0
grad_rows<__half, PLAIN>                         | - - 21 8 0        | - - 22 6 0        | - - 22 6 0        | - - 22 8 0        | - - 22 8 0        | - - 22 6 0
logits_grad<__half, PLAIN>                       | 6.03 1.00 64 4 0  | 6.03 1.00 64 4 0  | 6.03 1.00 64 4 0  | 6.03 1.00 64 4 0  | 5.97 1.00 54 4 0  | 5.94 1.00 56 4 0
grad_rows<__half, SCALED>                        | - - 21 8 0        | - - 22 6 0        | - - 22 6 0        | - - 22 8 0        | - - 22 8 0        | - - 22 6 0
logits_grad<__half, SCALED>                      | 7.03 1.00 64 4 0  | 7.03 1.00 64 4 0  | 7.03 1.00 64 4 0  | 7.03 1.00 64 4 0  | 6.97 1.00 56 4 0  | 6.94 1.00 56 4 0
grad_rows<__half, CAPPED>                        | - - 23 8 0        | - - 22 6 0        | - - 22 6 0        | - - 22 8 0        | - - 22 8 0        | - - 22 6 0
logits_grad<__half, CAPPED>                      | 18.62 1.00 61 4 0 | 18.62 1.00 63 4 0 | 18.62 1.00 63 4 0 | 18.53 1.00 61 4 0 | 18.38 1.00 63 4 0 | 18.75 1.00 64 4 0
grad_rows<__nv_bfloat16, PLAIN>                  | - - 21 8 0        | - - 22 6 0        | - - 22 6 0        | - - 22 8 0        | - - 22 8 0        | - - 22 6 0
logits_grad<__nv_bfloat16, PLAIN>                | 6.03 1.00 64 4 0  | 6.03 1.00 64 4 0  | 6.03 1.00 64 4 0  | 6.03 1.00 64 4 0  | 5.94 1.00 56 4 0  | 5.94 1.00 56 4 0
grad_rows<__nv_bfloat16, SCALED>                 | - - 21 8 0        | - - 22 6 0        | - - 22 6 0        | - - 22 8 0        | - - 22 8 0        | - - 22 6 0
logits_grad<__nv_bfloat16, SCALED>               | 7.03 1.00 61 4 0  | 7.03 1.00 61 4 0  | 7.03 1.00 61 4 0  | 7.03 1.00 64 4 0  | 6.94 1.00 56 4 0  | 6.94 1.00 56 4 0
grad_rows<__nv_bfloat16, CAPPED>                 | - - 23 8 0        | - - 22 6 0        | - - 22 6 0        | - - 22 8 0        | - - 22 8 0        | - - 22 6 0
logits_grad<__nv_bfloat16, CAPPED>               | 18.62 1.00 61 4 0 | 18.62 1.00 61 4 0 | 18.62 1.00 61 4 0 | 18.56 1.00 63 4 0 | 18.38 1.00 64 4 0 | 18.75 1.00 64 4 0
segment_sum                                      | - - 32 8 0        | - - 40 6 0        | - - 40 6 0        | - - 32 8 0        | - - 32 8 0        | - - 40 6 0
"""


class Figures(NamedTuple):
    """What machine code takes."""

    instructions: float | None
    special: float | None
    registers: int
    blocks: int
    local: int

    def __str__(self) -> str:
        loop = ("-" if n is None else f"{n:.2f}" for n in (self.instructions, self.special))
        return " ".join((*loop, *map(str, self[2:])))

    @classmethod
    def of(cls, text: str) -> Figures:
        loop, counts = text.split()[:2], text.split()[2:]
        return cls(*(None if n == "-" else float(n) for n in loop), *map(int, counts))

    def above(self, ceiling: Figures) -> str:
        """What is worse than the ceiling; empty where nothing is."""
        parts = []
        for what, have, most in zip(
            ("instructions", "special functions"), self, ceiling, strict=False
        ):
            if (have is None) != (most is None) or (have or 0) > (most or 0) + SLACK:
                parts.append(f"{what} a column")
        parts += ["registers"] * (self.registers > ceiling.registers)
        parts += ["blocks an SM"] * (self.blocks < ceiling.blocks)
        parts += ["accesses of local memory"] * (self.local > ceiling.local)
        return ", ".join(parts)


def ceilings() -> dict[tuple[str, str], Figures]:
    """The table by kernel and architecture."""
    head, *rows = (re.split(r"\s*\|\s*", line) for line in CEILINGS.strip().splitlines())
    return {
        (name, arch): Figures.of(cell)
        for name, *cells in rows
        for arch, cell in zip(head[1:], cells, strict=True)
    }


def measure(file: str, arch: str, source: str | None = None, only: str = "") -> dict[str, Figures]:
    """The figures of each kernel of a file."""
    compiled = compile_for(file, arch, source, only)
    told = {}
    for entry in compiled.log.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        told[entry.split("'")[0]] = int(registers[1]), int(shared[1]) if shared else 0
    with tempfile.TemporaryDirectory() as folder:
        code = sass.disassemble(compiled.cubin, Path(folder))
    found = {}
    for mangled, name in compiled.mangled.items():
        registers, shared = told[mangled]
        blocks = sass.blocks_of(arch, registers, shared, kernels.THREADS)
        instructions = special = None
        if name.startswith(("token_stats<", "logits_grad<")):
            hot = sass.hot_loop(code[mangled], SIZES[re.findall(r"\w+", name)[1]], BUNDLE)
            assert not hot.turn.narrow, (
                f"{name}, {arch}: an aligned row is read or written narrowly"
            )
            instructions, special = hot.instructions, hot.special
        local = code[mangled].local
        found[name] = Figures(instructions, special, registers, blocks, local)
    return found


def gate_code(file: str, arch: str, source: str | None = None, only: str = "") -> None:
    table = ceilings()
    for name, figures in measure(file, arch, source, only).items():
        assert (name, arch) in table, f"{name} has no ceiling for {arch}: `make ceilings`"
        ceiling = table[name, arch]
        above = figures.above(ceiling)
        assert not above, f"{name}, {arch}: found {figures}, at most {ceiling}: {above}"


@needs_nvdisasm
@measured_here
def test_no_kernel_takes_more_instructions_registers_or_local_memory_than_it_did(built):
    gate_code(*built)


def test_the_table_has_the_kernels_that_there_are():
    every = {(name, arch) for file in TEMPLATES for name in names(file) for arch in ARCHITECTURES}
    assert set(ceilings()) == every


def test_the_launch_layer_knows_how_many_blocks_there_are():
    for (name, arch), figures in ceilings().items():
        kernel, _, inside = name.partition("<")
        if kernel in ("token_stats", "logits_grad"):
            template = inside.rstrip(">").split(", ")
            known = kernels.blocks_at_once(kernel, template[1], template[-1] == "true")
            assert figures.blocks == known, (name, arch)


PLAINEST = next(n for n in names("token_stats.cu") if n.startswith("token_stats<__nv_bfloat16, "))


@needs_nvdisasm
@measured_here
@pytest.mark.parametrize(
    ("old", "new", "arch", "said"),
    [
        ("exp2f(__fmul_rn(difference", "exp2f(__fmul_rn(__fadd_rn(difference, 1e-3f)", "sm_90", "instructions a column"),
        ("(THREADS, 3)", "(THREADS, 8)", "sm_90", "accesses of local memory"),
        ("Part of_tile[MAX_TILES]", "Part of_tile[16 * MAX_TILES]", "sm_86", "blocks an SM"),
        ("bool aligned = is_aligned(row);", "bool aligned = false;", "sm_90", "no loop loads 32 columns"),
    ],
    ids=["an instruction a column", "spills", "shared memory", "narrow loads"],
)  # fmt: skip
def test_a_kernel_that_got_worse_is_refused(old, new, arch, said):
    worse = kernels.source("token_stats.cu").replace(old, new)
    assert worse != kernels.source("token_stats.cu")
    with pytest.raises(AssertionError, match=said):
        gate_code("token_stats.cu", arch, worse, PLAINEST)


def test_each_figure_has_its_ceiling():
    ceiling = Figures.of("9.41 1.03 64 4 0")
    assert Figures.of(str(ceiling)) == ceiling
    assert not ceiling.above(ceiling)
    assert not Figures(9.6, 1.0, 40, 6, 0).above(ceiling)
    assert Figures(9.7, 1.03, 64, 4, 0).above(ceiling) == "instructions a column"
    assert Figures(9.41, 2.03, 64, 4, 0).above(ceiling) == "special functions a column"
    assert Figures(None, 1.03, 64, 4, 0).above(ceiling) == "instructions a column"
    worse = Figures(9.41, 1.03, 65, 3, 1)
    assert worse.above(ceiling) == "registers, blocks an SM, accesses of local memory"
    assert not Figures.of("- - 38 6 0").above(Figures.of("- - 38 6 0"))


def test_the_gates_can_fail():
    narrow = (
        kernels.source("logits_grad.cu")
        .replace("is_aligned(from) && is_aligned(to)", "false")
        .replace("&& is_aligned(to)", "&& false")
    )
    with pytest.raises(AssertionError, match="no 16-byte"):
        gate("logits_grad.cu", "sm_90", narrow, "<float, PLAIN")
    indexed = kernels.source("logits_grad.cu").replace(
        "narrow(0.f, out[(long long)WIDTH<T> * group + k]);",
        "out[(long long)WIDTH<T> * group + k] = zeros.value[k];",
    )
    with pytest.raises(AssertionError, match="local memory"):
        gate("logits_grad.cu", "sm_90", indexed, "<float, PLAIN")
    late = kernels.source("token_stats.cu").replace("widen(z_target)", "widen(row[target])")
    with pytest.raises(AssertionError, match="a late target"):
        gate("token_stats.cu", "sm_90", late, "<float, PLAIN, false>")
    hinted = kernels.source("token_stats.cu").replace("ALIGNED, false>(row", "ALIGNED, true>(row")
    with pytest.raises(AssertionError, match="a streaming load"):
        gate("token_stats.cu", "sm_90", hinted, "<float, PLAIN, false>")
    starved = kernels.source("token_stats.cu").replace("(THREADS, 3)", "(THREADS, 8)")
    with pytest.raises(AssertionError, match="bytes spilled"):
        gate("token_stats.cu", "sm_90", starved, "<float, CAPPED, true")


def test_compile_errors_name_the_file_and_line():
    broken = kernels.source("segment_sum.cu").replace("double sum = 0;", "double sum = zero;")
    program = nvrtc.createProgram(broken, "kernel.cu", (), ())
    with pytest.raises(nvrtc.NVRTCError):
        nvrtc.compileProgram(
            program, (*kernels.OPTIONS, "-I" + find_nvidia_header_directory("cudart"))
        )
    line = (kernels.CUDA_FOLDER / "segment_sum.cu").read_text().split("double sum = 0;")[0].count(
        "\n"
    ) + 1
    assert f"segment_sum.cu({line})" in nvrtc.getProgramLog(program)


def table() -> str:
    """`CEILINGS` as it is measured here."""
    found = {
        (name, arch): figures
        for file in TEMPLATES
        for arch in ARCHITECTURES
        for name, figures in measure(file, arch).items()
    }
    rows = [["kernel", *ARCHITECTURES]]
    for file in TEMPLATES:
        rows += [
            [name, *(str(found[name, arch]) for arch in ARCHITECTURES)] for name in names(file)
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print("MEASURED =", nvrtc.getVersion())
    print(f'CEILINGS = """\n{table()}\n"""')
