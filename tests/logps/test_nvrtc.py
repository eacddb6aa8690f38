"""NVRTC compiles every kernel x dtype x architecture with no GPU, and what comes out is gated.

The options are CuPy's own (``cupy/cuda/compiler.py`` adds all but the first and the last), or the gate would look at
another kernel than the one that runs.
"""

from __future__ import annotations

import itertools
import re

import pytest

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


def compile_for(file: str, arch: str, source: str | None = None, only: str = ""):
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
    return (
        nvrtc.getCUBIN(program) + b"\0",
        nvrtc.getPTX(program).decode(),
        nvrtc.getProgramLog(program),
    )


def before_loops(body: str) -> str:
    """The PTX in front of the first label that a later branch goes back to."""
    labels = {m[1]: m.start() for m in re.finditer(r"^(\$L__BB\w+):", body, re.MULTILINE)}
    jumps = re.finditer(r"bra(?:\.uni)? \t?(\$L__BB\w+);", body)
    return body[: min(at for m in jumps if (at := labels[m[1]]) < m.start())]


def gate(file: str, arch: str, source: str | None = None, only: str = "") -> int:
    """The most registers of any kernel; raises if a gate is not met."""
    cubin, ptx, log = compile_for(file, arch, source, only)
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


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", sorted(TEMPLATES))
def test_every_kernel_compiles_without_spills_with_wide_loads(file, arch):
    assert gate(file, arch) > 0


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
