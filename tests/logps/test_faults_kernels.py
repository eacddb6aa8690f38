"""Every kernel meets K1 to K7, by enumeration."""

from __future__ import annotations

import ast
import itertools
import math
import platform
import re
import shutil
import subprocess
from typing import NamedTuple

import numpy as np
import pytest
import reference
import torch
from kernel_cases import PLAIN, batch, bits, check_gradient, oracle, place
from places import TESTS

from dpo_ext import _core
from dpo_ext.torch.logps import cuda as kernels

KERNELS = sorted(kernels.FILES)


# ---- K1 to K7 over all kernels ------------------------------------------------------------------


class Problem(NamedTuple):
    """Six tokens of seven rows, token 1 not scored; and three sequences of their log-probs."""

    logits: torch.Tensor
    values: torch.Tensor  # the same, dense
    rows: torch.Tensor
    targets: torch.Tensor
    grad: torch.Tensor
    terms: torch.Tensor
    weights: torch.Tensor | None
    offsets: torch.Tensor

    @staticmethod
    def of(kernel, dtype=torch.bfloat16, seed=0, columns=None, offset=1, gap=3):
        # The finishing kernel runs where a row has several tiles, which the fixture cuts to 2048 columns.
        columns = columns or (2055 if kernel == "token_stats_finish" else 37)
        values, rows, targets, grad = batch(dtype, columns, seed, tokens=6)
        generator = torch.Generator().manual_seed(seed)
        terms = torch.rand(700, generator=generator) * -9
        weights = torch.rand(700, generator=generator)
        offsets = torch.tensor([0, 1, 1, 300, 700], dtype=torch.int32)
        logits = place(values, offset, gap)
        return Problem(logits, values, rows, targets, grad, terms, weights, offsets)

    @property
    def oracle(self):
        return oracle(self.values, self.rows, self.targets, self.grad, PLAIN)


def run_stats(p: Problem):
    scores = kernels.token_stats(p.logits, p.rows, p.targets, *PLAIN, True)
    expected, _ = p.oracle
    for column, name in zip(scores[3:6], ("entropy", "mean_logit", "log_sum_sq"), strict=True):
        np.testing.assert_allclose(column.numpy(), expected[name], rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(scores[0].numpy(), expected["logp"], rtol=1e-6, atol=4e-6)
    np.testing.assert_array_equal(scores[6].numpy(), expected["is_top1"])
    return scores


def run_rows_of_grad(p: Problem):
    """The table that `grad_rows` leaves for `logits_grad`: (target, shift, coefficient, at_target)."""
    scores = kernels.token_stats(p.logits, p.rows, p.targets, *PLAIN, False)
    height = len(p.values)
    table = torch.full((height, kernels.ROW_GRAD_INTS), -1, dtype=torch.int32)
    arguments = (p.logits, p.rows, p.targets, *scores[1:3], p.grad, table, len(p.rows))
    more = (*p.values.shape, 1.0, 1.0)
    stride = p.logits.stride(0) if height > 1 else p.values.shape[1]
    kernels.launch(
        "grad_rows",
        (kernels.TYPES[p.logits.dtype], "PLAIN"),
        (1, 1),
        (*arguments, height, stride, *more[1:]),
        p.logits.device,
    )
    _, expected = p.oracle
    seen = dict.fromkeys(range(height), -1)
    for r, t, g in zip(p.rows.tolist(), p.targets.tolist(), p.grad.tolist(), strict=True):
        if t != -100 and g != 0 and 0 <= r < height:
            seen[r] = t if 0 <= t < p.values.shape[1] else -2
    assert table[:, 0].tolist() == list(seen.values())
    at_target = table.view(torch.float32)[:, 3]
    for r, t in seen.items():
        if t >= 0:
            np.testing.assert_allclose(at_target[r], expected[r, t], rtol=1e-5, atol=1e-7)
    return (table,)


def run_gradient(p: Problem):
    scores = kernels.token_stats(p.logits, p.rows, p.targets, *PLAIN, False)
    arguments = (p.rows, p.targets, *scores[1:3], p.grad, *PLAIN)
    fresh = torch.full(p.values.shape, math.nan, dtype=p.logits.dtype)
    kernels.logits_grad(p.logits, *arguments, fresh)
    _, expected = p.oracle
    got = fresh.double().numpy()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    finite = np.isfinite(expected)
    check_gradient(
        torch.from_numpy(got[finite]), expected[finite], p.logits.dtype, p.grad.nan_to_num()
    )
    kernels.logits_grad(p.logits, *arguments, p.logits)
    assert bits(p.logits) == bits(fresh)
    return (fresh,)


def run_segments(p: Problem):
    results = []
    for weights in (p.weights, None):
        got = kernels.segment_sum(p.terms, weights, p.offsets)
        w = None if weights is None else weights.numpy()
        M, offsets = len(p.terms), p.offsets.tolist()
        for s, (a, b) in enumerate(itertools.pairwise(offsets)):
            if 0 <= a <= b <= M:
                part = (p.terms[a:b].numpy(), None if w is None else w[a:b])
                exact = reference.segment_sum(*part, [0, b - a]).astype(np.float32)[0]
                np.testing.assert_array_equal(got[s].numpy(), exact)
            else:
                assert math.isnan(got[s])
        results.append(got)
    return tuple(results)


# A kernel without an entry fails all seven tests.
RUN = {
    "token_stats": run_stats,
    "token_stats_finish": run_stats,
    "grad_rows": run_rows_of_grad,
    "logits_grad": run_gradient,
    "segment_sum": run_segments,
}


@pytest.fixture
def short_tiles(emulator, monkeypatch):
    """Tiles of 2048 columns, and a device on which few rows are split over them."""

    def tiles(columns):
        return kernels.Tiles(2048, max(1, -(-columns // 2048)))

    monkeypatch.setattr(kernels, "tiles", tiles)
    emulator.processors = 108
    return emulator


def run(kernel, problem, emulator):
    emulator.launched.clear()
    results = RUN[kernel](problem)
    assert kernel in {name.partition("<")[0] for name, _ in emulator.launched}
    return results


@pytest.mark.slow
@pytest.mark.fault("K1")
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_answers_nan_for_what_does_not_exist(kernel, short_tiles):
    V = Problem.of(kernel).values.shape[1]
    for bad in (V, V + 5, -1, 2**31 - 1, -(2**31)):
        for row in (7, 2**31, 2**62, -1, -(2**63)):
            p = Problem.of(kernel)
            p.targets[2] = bad
            p.rows[4] = row
            p.offsets[1:] = torch.tensor([0, 5, 4, min(max(bad, -5), 701)])
            run(kernel, p, short_tiles)


@pytest.mark.fault("K2")
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_reaches_beyond_2_to_the_31_elements(kernel, short_tiles):
    """Memory that only a few pages of are ever touched."""
    p = Problem.of(kernel)
    far = 2**31 + 5
    V = p.values.shape[1]
    values = p.values[p.rows[[0, 2]]]
    logits = torch.empty(far + V, dtype=values.dtype).as_strided((2, V), (far, 1))
    logits.copy_(values)
    terms = torch.empty(2**31 - 1)
    terms[-300:] = p.terms[:300]
    p = p._replace(
        logits=logits,
        values=values,
        rows=torch.tensor([1, 0]),
        targets=p.targets[[0, 2]],
        grad=p.grad[[0, 2]],
        terms=terms,
        weights=None,
        offsets=torch.tensor([2**31 - 301, 2**31 - 301, 2**31 - 1], dtype=torch.int32),
    )
    run(kernel, p, short_tiles)


@pytest.mark.fault("K3")
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_kernel_runs_where_there_is_nothing_and_no_grid_is_too_high(kernel, short_tiles):
    p = Problem.of(kernel)
    none = torch.empty(0, dtype=torch.int64)
    empty = p._replace(
        rows=none,
        targets=none.int(),
        grad=none.float(),
        logits=p.logits[:0],
        values=p.values[:0],
        offsets=p.offsets[:1],
    )
    short_tiles.launched.clear()
    if kernel != "grad_rows":  # what runs it here launches it by itself
        RUN[kernel](empty)
        assert not short_tiles.launched
    run(kernel, p, short_tiles)
    assert max(grid[1] for _, grid in short_tiles.launched) <= 65_535


@pytest.mark.slow
@pytest.mark.fault("K4")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
def test_every_kernel_honours_strides_and_addresses(kernel, dtype, short_tiles):
    results = set()
    for offset, gap in itertools.product(range(8), (0, 5)):
        p = Problem.of(kernel, dtype, offset=offset, gap=gap)
        terms = torch.full((offset + 2 * len(p.terms),), math.nan)[offset:].view(-1, 2)[:, 0]
        terms.copy_(p.terms)
        results.add(b"".join(map(bits, run(kernel, p._replace(terms=terms), short_tiles))))
    assert len(results) == 1


@pytest.mark.slow
@pytest.mark.fault("K5", "H14")
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_takes_any_number_of_columns(kernel, short_tiles):
    """Peaked rows, in which a phantom column that adds exp(0) would show."""
    for V in (1, 2, 7, 8, 9, 31, 32, 33, 127, 128, 129, 1000, 2049, 4097):
        if kernel == "token_stats_finish":
            V += 2048
        p = Problem.of(kernel, torch.float32, seed=V, columns=V)
        p.values[p.rows[2:], p.targets[2:].long()] = -25.0
        p.values[p.rows[2:], 0] = -20.0
        p.values[p.rows[2:]] -= 60.0
        p.logits.copy_(p.values)
        p.offsets[2:4] = torch.tensor([min(V, 650), min(V + 1, 700)])
        run(kernel, p, short_tiles)


@pytest.mark.slow
@pytest.mark.fault("K6", "H9", "H10")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", kernels.TYPES, ids=str)
def test_every_kernel_keeps_special_values_in_their_sequence(kernel, dtype, short_tiles):
    big = 60_000.0 if dtype == torch.float16 else 1e30
    for special, everywhere in itertools.product((math.nan, math.inf, -math.inf, big), (0, 1)):
        p = Problem.of(kernel, dtype)
        columns = [0, p.values.shape[1] - 1, int(p.targets[3])][:: 1 + everywhere]
        for where in [slice(None)] if everywhere else columns:
            p.values[p.rows[3], where] = special
        p.logits.copy_(p.values)
        p.terms[500] = special
        run(kernel, p, short_tiles)


@pytest.mark.fault("K7")
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_kernel_reads_what_is_not_scored(kernel, short_tiles):
    results = set()
    for poison in (0.0, math.nan, math.inf):
        p = Problem.of(kernel)
        others = [r for r in range(7) if r not in p.rows[p.targets != -100].tolist()]
        p.values[others] = poison
        p.logits.copy_(p.values)
        p.weights[::3] = 0
        p.terms[::3] = poison
        got = run(kernel, p, short_tiles)
        results.add(b"".join(map(bits, got[:1] if kernel == "segment_sum" else got)))
    assert len(results) == 1


# ---- the same enumeration in the other rungs ----------------------------------------------------


def test_every_kernel_runs_under_the_sanitizers_and_on_the_host():
    host = (TESTS / "cuda_host" / "host.cpp").read_text()
    sanitized = (TESTS / "cuda_host" / "sanitized.cpp").read_text()
    launched = set(re.findall(r"emu::launch\([^&]*\[&\] \{\s*(\w+)[<(]", sanitized))
    assert launched == set(kernels.FILES)
    assert set(re.findall(r"= *entry\((\w+)", host.replace("\\\n", ""))) == set(kernels.FILES)
    nvrtc = ast.parse((TESTS / "logps" / "test_nvrtc.py").read_text())
    templates = next(
        n.value for n in nvrtc.body if isinstance(n, ast.Assign) and n.targets[0].id == "TEMPLATES"
    )
    assert {ast.literal_eval(key) for key in templates.keys} == set(kernels.FILES.values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="masks of AVX-512")
def test_no_constant_is_loaded_under_a_mask():
    """Once the system drops that page of the library, each such load takes an assist of the processor
    and never maps the page: the bfloat16 gradient was 3 to 5 times slower from then on."""
    said = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", _core.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "%zmm" in said
    assert re.findall(r".*\(%rip\).*\{%k.*", said) == []
