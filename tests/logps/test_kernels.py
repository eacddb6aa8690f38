"""The launch layer against a device that only records, and what the .cu files say about themselves."""

from __future__ import annotations

import builtins
import functools
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cuda_host.emulator import Emulator

from dpo_ext import KernelCompileError, KernelUnavailable, TensorError
from dpo_ext.torch import warm_up
from dpo_ext.torch.logps import cuda as kernels

KEYS = ["Math", "Shapes", "Launch", "Traffic", "Numerics", "Source"]
CUDA_FILES = sorted(kernels.CUDA_FOLDER.glob("*.cu*"))
PLAIN = (1.0, 0.0, 1.0)


class Recorder:
    """Stands in for CuPy: keeps every launch, runs nothing."""

    def __init__(self):
        self.launches = []
        self.looked_up = []

    def __call__(self, kernel, template):
        self.looked_up.append(kernel)

        def run(grid, block, arguments, *, stream):
            self.launches.append((kernel, template, grid, block, arguments, stream.ptr))

        return run


@pytest.fixture
def recorder(monkeypatch):
    """CPU tensors reach the end of the launch layer: torch's device and stream are replaced."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    fake = Recorder()
    monkeypatch.setattr(kernels, "_on_device", functools.cache(kernels._on_device.__wrapped__))
    monkeypatch.setattr(kernels, "_function", fake)
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77)
    )
    return fake


def table(tokens, columns, rows=None):
    logits = torch.zeros(rows or tokens, columns)
    return logits, torch.arange(tokens), torch.zeros(tokens, dtype=torch.int32), torch.ones(tokens)


def widths(arguments):
    return "".join(
        {int: "p", np.int64: "l", np.int32: "i", np.float32: "f"}[type(a)] for a in arguments
    )


@pytest.mark.fault("K17")
def test_argument_types_match_the_cu_signatures():
    found = {}
    for path in CUDA_FILES:
        for name, text in re.findall(
            r"__launch_bounds__\(.*?\)\s+(\w+)\((.*?)\) \{", path.read_text(), re.DOTALL
        ):
            types = [" ".join(p.split()) for p in text.split(",")]
            found[name] = "".join(
                "p" if "*" in t else {"long": "l", "int": "i", "float": "f"}[t.split()[0]]
                for t in types
            )
            assert kernels.FILES[name] == path.name
    assert found == kernels.PARAMETERS


def test_argument_widths_are_those_that_the_compiler_gives():
    library = Emulator()
    width = {"p": "8", "l": "8", "i": "4", "f": "4"}
    for kernel, types in kernels.PARAMETERS.items():
        template = {"segment_sum": ()}.get(kernel, ("float", "PLAIN"))
        template += ("true",) if kernel.startswith("token_stats") else ()
        sizes = library.parameter_bytes(kernels.name_expression(kernel, template))
        assert sizes == "".join(width[t] for t in types), kernel


def test_constants_match_the_header():
    header = (kernels.CUDA_FOLDER / "reduce.cuh").read_text()
    assert f"THREADS = {kernels.THREADS};" in header
    assert f"MAX_TILES = {kernels.MAX_TILES};" in header
    assert f"IGNORE = {-100};" in header
    assert f"enum Map {{ {', '.join(kernels.MAPS)} }};" in header


@pytest.mark.fault("K10")
def test_launches_carry_shapes_widths_and_the_current_stream(recorder):
    logits, rows, targets, grad = table(300, 50_257)
    kernels.token_stats(logits, rows, targets, *PLAIN, False)
    kernels.logits_grad(logits, rows, targets, grad, grad, grad, *PLAIN, logits)
    kernels.segment_sum(grad, None, torch.tensor([0, 100, 300], dtype=torch.int32))
    assert [(k, t, g, b) for k, t, g, b, *_ in recorder.launches] == [
        ("token_stats", ("float", "PLAIN", "false"), (300, 1), (256,)),
        ("grad_rows", ("float", "PLAIN"), (2, 1), (256,)),
        ("logits_grad", ("float", "PLAIN"), (300, 5), (256,)),
        ("segment_sum", (), (2, 1), (256,)),
    ]
    for kernel, _, _, _, arguments, stream in recorder.launches:
        assert widths(arguments) == kernels.PARAMETERS[kernel]
        assert stream == 77
    assert recorder.launches[0][4][0] == logits.data_ptr()
    assert recorder.launches[0][4][11:] == (300, 50_257, 50_257, 32_768, 2, 1.0, 1.0)
    assert recorder.launches[2][4][:2] == (logits.data_ptr(), logits.data_ptr())
    assert recorder.launches[3][4][1] == 0  # no weights: a null pointer


def test_a_kernel_is_looked_up_once_a_device(recorder):
    logits, rows, targets, _ = table(300, 40)
    for _ in range(3):
        kernels.token_stats(logits, rows, targets, *PLAIN, False)
    assert recorder.looked_up == ["token_stats"]
    kernels.token_stats(logits.to("meta"), rows, targets, *PLAIN, False)
    kernels.launch("segment_sum", (), (1, 1), (0, 0, 0, 0, 0), torch.device("cuda", 1))
    kernels.launch("segment_sum", (), (1, 1), (0, 0, 0, 0, 0), torch.device("cuda", 0))
    assert recorder.looked_up == ["token_stats", "segment_sum", "segment_sum"]


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_warm_up_loads_what_the_calls_launch(recorder, monkeypatch, stats, softcap):
    monkeypatch.setattr(kernels, "require", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # where CPU tensors are
    logits, rows, targets, grad = table(3, 40_000)
    how = (1.0, softcap or 0.0, 1.0)
    warm_up(torch.float32, stats=stats, softcap=softcap)
    loaded = list(recorder.looked_up)
    assert sorted(loaded) == sorted(kernels.FILES)
    kernels.token_stats(logits, rows, targets, *how, stats)
    kernels.logits_grad(logits, rows, targets, grad, grad, grad, *how, logits)
    kernels.segment_sum(grad, None, torch.tensor([0, 3], dtype=torch.int32))
    assert len(recorder.launches) == 5
    assert recorder.looked_up == loaded


def test_warm_up_refuses_what_has_no_kernels():
    with pytest.raises(TensorError, match="`dtype` must be one of float32, bfloat16, float16"):
        warm_up(torch.float64)
    with pytest.raises(ValueError, match="`device` must be a CUDA device, found cpu"):
        warm_up(torch.float32, device="cpu")
    with pytest.raises(ValueError, match="`softcap` must be finite and above 0"):
        warm_up(torch.float32, softcap=-1.0)
    if not torch.cuda.is_available():
        with pytest.raises(KernelUnavailable, match="no CUDA device"):
            warm_up(torch.float32)


def test_a_kernel_that_is_first_asked_for_inside_a_capture_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "require", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(KernelUnavailable, match=r"segment_sum was not loaded(.|\n)*warm_up"):
        kernels._function("segment_sum", ())


@pytest.mark.fault("K13")
def test_rows_are_split_by_the_vocabulary_alone_where_that_keeps_more_blocks_busy(recorder):
    # 132 multiprocessors hold 396 blocks of a fold with statistics and 528 of a gradient
    for tokens, tiles, pieces in ((1, 2, 5), (264, 1, 2), (396, 1, 4), (450, 2, 1), (528, 2, 1)):
        recorder.launches.clear()
        logits, rows, targets, grad = table(tokens, 40_000)
        kernels.token_stats(logits, rows, targets, *PLAIN, True)
        kernels.logits_grad(logits, rows, targets, grad, grad, grad, *PLAIN, logits)
        finish = [("token_stats_finish", (-(-tokens // 256), 1))] if tiles == 2 else []
        assert [(kernel, grid) for kernel, _, grid, *_ in recorder.launches] == [
            ("token_stats", (tokens, tiles)),
            *finish,
            ("grad_rows", (-(-tokens // 256), 1)),
            ("logits_grad", (tokens, pieces)),
        ]
    for columns in (1, 32_768, 32_769, 2_097_152, 2_097_153, 2**31 - 1):
        each, number = kernels.tiles(columns)
        # column j stays with thread (j / W) mod 256 in every tile, for a W of 4 and of 8
        assert each % (8 * kernels.THREADS) == 0
        assert 1 <= number <= kernels.MAX_TILES
        assert (number - 1) * each < columns <= number * each


@pytest.mark.parametrize("processors", [108, 132, 148])
@pytest.mark.parametrize("blocks", [3, 4])
def test_the_last_wave_is_full_where_a_row_can_be_cut(processors, blocks):
    slots = processors * blocks

    def busy(rows, pieces):
        return rows * pieces / (math.ceil(rows * pieces / slots) * slots)

    for rows in range(300, 16_385):
        folds = kernels.cut(rows, (1, kernels.tiles(128_256).number), slots)
        assert busy(rows, folds) >= max(busy(rows, 1), busy(rows, 4)) / 1.1
        gradients = kernels.cut(rows, range(1, 17), slots)
        assert busy(rows, gradients) >= 0.82
    assert kernels.cut(slots, (1, 4), slots) == kernels.cut(10 * slots, range(1, 17), slots) == 1


@pytest.mark.fault("K2")
def test_strides_beyond_32_bits_reach_the_kernel(recorder):
    logits = torch.empty_strided((3, 10), (2**40, 1), device="meta")
    rows, targets, grad = torch.arange(3), torch.zeros(3, dtype=torch.int32), torch.ones(3)
    kernels.token_stats(logits, rows, targets, *PLAIN, False)
    kernels.logits_grad(logits, rows, targets, grad, grad, grad, *PLAIN, logits)
    assert [2**40 in launch[4] for launch in recorder.launches] == [True, True, True]


@pytest.mark.fault("K3")
def test_nothing_to_do_launches_nothing(recorder):
    logits, rows, targets, grad = table(0, 10, rows=3)
    assert [len(c) for c in kernels.token_stats(logits, rows, targets, *PLAIN, True)] == [0] * 7
    kernels.segment_sum(grad, None, torch.zeros(1, dtype=torch.int32))
    kernels.logits_grad(logits[:0], rows, targets, grad, grad, grad, *PLAIN, logits[:0])
    kernels.logits_grad(logits[:, :0], rows, targets, grad, grad, grad, *PLAIN, logits[:, :0])
    assert not recorder.launches
    kernels.logits_grad(logits, rows, targets, grad, grad, grad, *PLAIN, logits)
    assert [launch[0] for launch in recorder.launches] == ["logits_grad"]  # all rows become 0


@pytest.mark.fault("K3")
def test_a_grid_that_cupy_would_cut_is_refused(recorder):
    tokens = torch.zeros(1, dtype=torch.int64).expand(2**31)
    logits = torch.zeros(1, 4)
    with pytest.raises(TensorError, match="at most 2147483647 elements, found 2147483648"):
        kernels._check_grid("logit_rows", tokens.shape[0])
    assert logits.shape == (1, 4)


def test_a_wrong_number_of_arguments_is_a_bug_that_shows():
    with pytest.raises(TypeError, match="segment_sum takes 5 arguments, found 2"):
        kernels.convert("segment_sum", (1, 2))


@pytest.mark.parametrize("path", CUDA_FILES, ids=lambda p: p.name)
def test_cuda_files_open_with_six_keys(path):
    text = path.read_text()
    head = text[: text.index("*/")]
    assert head.startswith(f"/*\n{path.name}: ")
    assert re.findall(r"^([A-Z][a-z]+) {2,}\S", head, re.MULTILINE) == KEYS
    assert max(map(len, text.splitlines())) <= 100
    assert "#include <c" not in text.replace("#include <cuda_", "")  # NVRTC has no standard headers


def test_launch_bounds_are_those_of_the_header_comment():
    for path in CUDA_FILES:
        head, _, body = path.read_text().partition("*/")
        for bounds in re.findall(r"__launch_bounds__\((.*?)\)", body):
            assert bounds.split(",")[0] == "THREADS"
            assert f"blocks of {kernels.THREADS} threads" in head.replace("\n          ", " ")


@pytest.mark.fault("K2")
def test_no_product_of_row_and_stride_is_32_bit():
    """The same overflow was found four times in sibling kernels of one project."""
    for path in CUDA_FILES:
        for row in re.findall(r"\b(\w+) \* (?:out_)?stride\b", path.read_text()):
            assert row == "r", f"{path.name}: {row} * stride"
            assert re.search(
                r"long long i = [^;]*\br = logit_rows|long long r = ", path.read_text()
            )


def test_the_source_holds_the_header_with_its_lines():
    for file in sorted(set(kernels.FILES.values())):
        text = kernels.source(file)
        assert '#include "' not in text
        assert "#pragma once" not in text
        lines = text.split("\n")
        at = next(i for i, line in enumerate(lines) if line.startswith("#line") and file in line)
        number = int(lines[at].split()[1])
        original = (kernels.CUDA_FOLDER / file).read_text().split("\n")
        assert lines[at + 1 :] == original[number - 1 :]


@pytest.mark.fault("K16")
def test_an_edit_of_the_header_changes_the_source(tmp_path, monkeypatch):
    before = kernels.source("token_stats.cu")
    for path in CUDA_FILES:
        (tmp_path / path.name).write_text(path.read_text().replace("UNROLL = 32", "UNROLL = 16"))
    monkeypatch.setattr(kernels, "CUDA_FOLDER", tmp_path)
    assert kernels.source("token_stats.cu") != before


@pytest.mark.fault("K15")
def test_without_a_device_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelUnavailable, match=r"no CUDA device: .*\nhint: use impl="):
        kernels.require()


@pytest.mark.fault("K15")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ImportError("No module named 'cupy'"),
            r"need CuPy, which cannot be imported.*\nhint: pip install cupy-cuda1",
        ),
        (
            PermissionError(13, "read-only"),
            r"cannot create its cache folder.*\nhint: set CUPY_CACHE_DIR",
        ),
        (
            FileNotFoundError(2, "no home"),
            r"cannot create its cache folder.*\nhint: set CUPY_CACHE_DIR",
        ),
    ],
)
def test_a_cupy_that_cannot_be_imported_says_what_to_install(monkeypatch, error, message):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "cupy":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(KernelUnavailable, match=message):
        kernels.require()


class FakeRuntime:
    """What `require` asks of CuPy's runtime."""

    is_hip = False

    def __init__(self, built=13020, driver=13000):
        self.runtimeGetVersion = lambda: built
        self.driverGetVersion = lambda: driver


@pytest.fixture
def cupy_of(monkeypatch):
    """Puts a CuPy of some CUDA version beside a driver and a torch of others."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

    def put(built, driver, torch_cuda, **runtime):
        fake = FakeRuntime(built, driver)
        for name, value in runtime.items():
            setattr(fake, name, value)
        monkeypatch.setattr(cupy.cuda, "runtime", fake)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    return put


@pytest.mark.fault("K15")
def test_a_cupy_that_is_newer_than_the_driver_says_which_to_install(cupy_of):
    cupy_of(13020, 12080, "12.8")
    with pytest.raises(
        KernelUnavailable,
        match=r"built for CUDA 13\.2, the driver supports CUDA 12\.8 at most\nhint: pip uninstall "
        "cupy-cuda13x, then pip install cupy-cuda12x, or update the driver",
    ):
        kernels.require()
    for built, driver, torch_cuda in (
        (13020, 13000, "13.0"),  # a newer minor version runs
        (12090, 13000, "13.0"),  # and so does an older CuPy than torch
        (12090, 12080, "12.8"),
    ):
        cupy_of(built, driver, torch_cuda)
        kernels.require()


@pytest.mark.fault("K15")
def test_a_cupy_for_rocm_says_which_to_install(cupy_of):
    cupy_of(13020, 13000, "13.0", is_hip=True)
    with pytest.raises(KernelUnavailable, match="built for ROCm\nhint: pip install cupy-cuda13x"):
        kernels.require()


class Module:
    """A RawModule that cannot be built."""

    def __init__(self, error):
        self.error = error

    def get_function(self, name):
        raise self.error


@pytest.mark.fault("K15")
@pytest.mark.parametrize(
    ("log", "ending"),
    [
        ("line 7: no", "no$"),
        (
            'reduce.cuh(16): error: cannot open source file "cuda_bf16.h"',
            r"\nhint: CUDA's headers are missing: pip install 'cupy-cuda13x\[ctk\]'$",
        ),
    ],
)
def test_compiler_errors_carry_architecture_options_and_log(cupy_of, monkeypatch, log, ending):
    cupy_of(13020, 13000, "13.0")
    compiler = pytest.importorskip("cupy.cuda.compiler")
    error = compiler.CompileException(log, "", "k", ("-std=c++17", "-ftz=true"))
    monkeypatch.setattr(kernels, "_module", lambda file, expressions: Module(error))
    with pytest.raises(KernelCompileError) as caught:
        kernels._function("segment_sum", ())
    start = "NVRTC refused segment_sum for sm_90, options -std=c++17 -ftz=true:\n" + log
    assert str(caught.value).startswith(start)
    assert re.search(ending, str(caught.value))


@pytest.mark.fault("K15")
@pytest.mark.parametrize(
    ("built", "driver", "torch_cuda", "message"),
    [
        (
            13020,
            13000,
            "13.0",
            r"cannot load NVRTC.*libnvrtc.*\nhint: install a CUDA build of torch",
        ),
        (
            12090,
            13000,
            "13.0",
            r"CuPy is built for CUDA 12\.9, torch for CUDA 13\.0, and no NVRTC can be loaded: .*"
            r"\nhint: pip uninstall cupy-cuda12x, then pip install cupy-cuda13x$",
        ),
    ],
    ids=["same", "another"],
)
def test_without_nvrtc_the_error_says_what_to_install(
    cupy_of, monkeypatch, built, driver, torch_cuda, message
):
    cupy_of(built, driver, torch_cuda)
    missing = RuntimeError("CuPy failed to load libnvrtc.so.12: OSError: no such file")
    monkeypatch.setattr(kernels, "_module", lambda file, expressions: Module(missing))
    with pytest.raises(KernelUnavailable, match=message):
        kernels._function("segment_sum", ())
    other = RuntimeError("an illegal memory access was encountered")
    monkeypatch.setattr(kernels, "_module", lambda file, expressions: Module(other))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        kernels._function("segment_sum", ())


@pytest.mark.slow
@pytest.mark.fault("K15")
def test_importing_the_kernels_loads_no_cupy():
    code = "import sys, dpo_ext.torch.logps.ops; sys.exit('cupy' in sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
