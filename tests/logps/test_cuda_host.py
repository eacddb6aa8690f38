"""The CUDA kernels on the host, through the real launch layer, against the float64 oracle.

Host bits are not device bits (NVRTC's exp2f differs in the last place), so values are compared by a tolerance, and
schedules, alignments and launch shapes with each other by bits. What must not be read is NaN.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from kernel_cases import (
    DTYPES,
    PLAIN,
    STATS,
    TRANSFORMS,
    batch,
    bits,
    check_gradient,
    gradient,
    oracle,
    place,
)

from dpo_ext import _core
from dpo_ext.torch.logps import cuda as kernels
from dpo_ext.torch.logps import ops

# Around a group of 8, a warp, a block's 2048 columns, its 8192 in flight, and a tile of 32768.
SIZES = [1, 2, 7, 8, 9, 31, 33, 127, 128, 129, 1000, 2051, 8191, 8193, 32768, 40003]


@pytest.mark.slow
@pytest.mark.fault("K5", "H14")
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_agree_with_float64(emulator, dtype, columns):
    for seed, (name, transform) in enumerate(TRANSFORMS.items()):
        values, rows, targets, grad = batch(dtype, columns, seed)
        logits = place(values, offset=seed, gap=(0, 3, 8)[seed])
        scores = kernels.token_stats(logits, rows, targets, *transform, True)
        expected, expected_grad = oracle(values, rows, targets, grad, transform)
        assert np.abs(scores[0].numpy() - expected["logp"]).max() <= 4e-6, name
        for column, statistic in zip(scores[3:6], STATS, strict=True):
            np.testing.assert_allclose(column.numpy(), expected[statistic], rtol=2e-6, atol=1e-5)
        np.testing.assert_array_equal(scores[6].numpy(), expected["is_top1"])
        check_gradient(
            gradient(logits, rows, targets, scores, grad, transform), expected_grad, dtype, grad
        )
        unscored = [r for r in range(len(values)) if r not in rows[targets != -100].tolist()]
        fresh = gradient(logits, rows, targets, scores, grad, transform)
        assert bits(fresh[unscored]) == bytes(len(bits(fresh[unscored])))  # +0
        written = gradient(logits, rows, targets, scores, grad, transform, in_place=True)
        assert bits(written) == bits(fresh)


@pytest.mark.slow
@pytest.mark.fault("K4", "K13", "H15")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_alignment_schedule_or_neighbours(emulator, dtype):
    for columns in (9, 2051, 10_007):
        values, rows, targets, grad = batch(dtype, columns, seed=columns)
        results = set()
        for offset in range(8):
            for gap in (0, 8):
                logits = place(values, offset, gap)
                scores = kernels.token_stats(logits, rows, targets, *PLAIN, offset % 2 == 0)
                dz = gradient(logits, rows, targets, scores, grad, PLAIN)
                results.add(b"".join(map(bits, (*scores[:3], dz))))
        alone = [
            kernels.token_stats(place(values), rows[i : i + 1], targets[i : i + 1], *PLAIN, False)
            for i in range(4)
        ]
        scores = [torch.cat([row[k] for row in alone]) for k in range(3)]
        dz = gradient(place(values, 3, 5), rows, targets, scores, grad, PLAIN)
        results.add(b"".join(map(bits, (*scores, dz))))
        assert len(results) == 1, f"{len(results)} different results at V = {columns}"


@pytest.mark.fault("K13")
@pytest.mark.parametrize("stats", [False, True])
def test_rows_split_over_blocks_have_the_bits_of_whole_rows(emulator, stats):
    for columns in (32_769, 100_003):
        values, rows, targets, grad = batch(torch.bfloat16, columns, seed=columns, tokens=3)
        targets[2] = columns + 5  # missing
        logits, results = place(values, 1), []
        for processors in (1, 108):
            emulator.processors = processors
            emulator.launched.clear()
            scores = kernels.token_stats(logits, rows, targets, *PLAIN, stats)
            dz = gradient(logits, rows, targets, scores, grad, PLAIN)
            results.append([bits(t) for t in (*scores, dz)])
            grids = [grid for _, grid in emulator.launched]
        assert results[0] == results[1]
        assert grids[0] == (3, kernels.tiles(columns).number)
        assert grids[-1][1] > 1


@pytest.mark.fault("K6", "H9", "H10")
def test_special_values_stay_in_their_row(emulator):
    inf, columns = math.inf, 1000
    for seed, dtype in enumerate(DTYPES):
        values, rows, targets, grad = batch(dtype, columns, seed, tokens=12)
        changes = {  # position of the value in the row of each token: head, body, target, everything
            2: [(0, -inf)],
            3: [(517, -inf), (999, -inf)],
            4: [(int(targets[4]), -inf)],
            5: [(slice(None), -inf)],
            6: [(700, math.nan)],
            7: [(int(targets[7]), math.nan)],
            8: [(3, inf)],
            9: [(int(targets[9]), inf)],
            10: [(slice(None), -inf), (int(targets[10]), 1.0)],
            11: [(slice(None), 60000.0 if dtype == torch.float16 else 1e30)],
        }
        clean = kernels.token_stats(place(values), rows, targets, *PLAIN, True)
        for token, edits in changes.items():
            for where, value in edits:
                values[rows[token], where] = value
        logits = place(values, seed, 2)
        scores = kernels.token_stats(logits, rows, targets, *PLAIN, True)
        expected, expected_grad = oracle(values, rows, targets, grad, PLAIN)
        for column, name in zip((scores[0], *scores[3:6]), ("logp", *STATS), strict=True):
            if name != "mean_logit":
                np.testing.assert_allclose(
                    column.numpy(), expected[name], rtol=1e-6, atol=1e-5, err_msg=name
                )
        np.testing.assert_array_equal(scores[6].numpy(), expected["is_top1"])
        assert scores[0][4] == -inf
        assert scores[0][10] == 0
        assert [bits(c[:2]) for c in scores] == [
            bits(c[:2]) for c in clean
        ]  # rows that were not touched
        got = gradient(logits, rows, targets, scores, grad, PLAIN).double().numpy()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected_grad))
        np.testing.assert_allclose(got, expected_grad, rtol=2**-8, atol=1e-5)


@pytest.mark.fault("H1", "H2", "H3")
@pytest.mark.parametrize("shift", [0.0, 40.0, 200.0])
def test_complement_of_a_peaked_row_keeps_its_digits(emulator, shift):
    columns = 8193
    for complement in (1e-1, 1e-3, 1e-6):
        values = torch.full((1, columns), shift)
        values[0, 77] = shift + math.log((columns - 1) * (1 - complement) / complement)
        rows, targets, grad = (
            torch.tensor([0]),
            torch.tensor([77], dtype=torch.int32),
            torch.ones(1),
        )
        scores = kernels.token_stats(place(values), rows, targets, *PLAIN, False)
        expected, expected_grad = oracle(values, rows, targets, grad, PLAIN)
        np.testing.assert_allclose(scores[0], expected["logp"], rtol=2e-5 if shift else 2e-6)
        dz = gradient(place(values), rows, targets, scores, grad, PLAIN)
        np.testing.assert_allclose(dz[0, 77], expected_grad[0, 77], rtol=2e-5 if shift else 2e-6)


@pytest.mark.fault("K1")
def test_what_does_not_exist_is_not_read(emulator):
    values, rows, targets, grad = batch(torch.float32, 33, seed=0, tokens=10)
    targets[:] = torch.tensor([33, 38, -1, 2**31 - 1, -(2**31), -101, 0, 0, 0, 5])
    rows[6:9] = torch.tensor([len(values), 2**62, -1])
    logits = place(values, 1)
    scores = kernels.token_stats(logits, rows, targets, *PLAIN, True)
    assert all(torch.isnan(column[:9]).all() for column in scores[:6])
    assert not scores[6][:9].any()
    assert torch.isfinite(scores[0][9])
    dz = gradient(logits, rows, targets, scores, grad, PLAIN)
    named = rows[:6].tolist()
    assert torch.isnan(dz[named]).all()
    others = [r for r in range(len(values)) if r not in named and r != rows[9]]
    assert (dz[others] == 0).all()
    assert torch.isfinite(dz[rows[9]]).all()


@pytest.mark.fault("K7", "H13")
def test_a_gradient_of_zero_reads_nothing(emulator):
    values, rows, targets, grad = batch(torch.float32, 33, seed=0)
    scores = kernels.token_stats(place(values), rows, targets, *PLAIN, False)
    grad[2] = -0.0
    values[rows[2]] = math.nan
    dz = gradient(place(values), rows, targets, scores, grad, PLAIN)
    assert bits(dz[rows[2]]) == bytes(4 * 33)
    assert torch.isfinite(dz).all()


@pytest.mark.fault("K1", "K17", "H8", "H13")
def test_segment_sums_have_the_bits_of_the_cpu(emulator):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(3000, generator=generator) * 10
        weights = torch.rand(3000, generator=generator)
        weights[::7] = 0
        values[::7] = math.nan
        offsets = torch.tensor(
            [0, 0, 1, 256, 257, 1500, 3000, 2999, 3001, -1, 5], dtype=torch.int32
        )
        got = kernels.segment_sum(values, weights, offsets)
        cpu = _core.segment_sum(values.numpy(), weights.numpy(), offsets.numpy())
        assert np.isnan(cpu[6:]).all()
        assert np.isfinite(cpu[:6]).all()
        np.testing.assert_array_equal(got.numpy(), cpu)
        exact = reference.segment_sum(values.numpy(), weights.numpy(), offsets[:7].tolist())
        np.testing.assert_array_equal(got[:6].numpy(), exact.astype(np.float32))
        values[::7] = 1.0
        got = kernels.segment_sum(values, None, offsets)
        np.testing.assert_array_equal(
            got.numpy(), _core.segment_sum(values.numpy(), None, offsets.numpy())
        )


@pytest.mark.fault("K17")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_cuda_and_cpu_kernels_agree(emulator, dtype, name):
    transform = TRANSFORMS[name]
    for columns in (33, 5000):
        values, rows, targets, grad = batch(dtype, columns, seed=columns)
        logits = place(values, 1, 7)
        ours = torch.ops.dpo_ext.token_stats(logits, rows, targets, *transform, True)
        theirs = kernels.token_stats(logits, rows, targets, *transform, True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours[6], theirs[6])
        mine = torch.ops.dpo_ext.logits_grad(
            logits, rows, targets, ours[1], ours[2], grad, *transform
        )
        dz = gradient(logits, rows, targets, theirs, grad, transform)
        torch.testing.assert_close(
            mine, dz, rtol={torch.float32: 1e-5}.get(dtype, 2**-7), atol=1e-7
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [33, 40_003])  # of one tile, and of several that are split
def test_without_rows_each_row_has_one_target(emulator, monkeypatch, dtype, columns):
    """The bits of rows 0, 1, ..., whatever stood in the memory of the gradient's table."""
    values, _, targets, grad = batch(dtype, columns, seed=columns, tokens=6)
    values[:2] = values[2:4]
    values, targets[2], grad[3], targets[4] = values[:6], columns, 0.0, -100
    values[4] = math.nan
    logits, rows = place(values, 1, 7), torch.arange(6)
    monkeypatch.setattr(kernels, "processors", lambda device: 6)
    named = kernels.token_stats(logits, rows, targets, *PLAIN, True)
    scores = kernels.token_stats(logits, None, targets, *PLAIN, True)
    assert [bits(a) for a in scores] == [bits(a) for a in named]
    expected = gradient(logits, rows, targets, named, grad, PLAIN)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **of: empty(*a, **of).fill_(7))
    monkeypatch.setattr(kernels, "_nowhere", None)
    assert bits(gradient(logits, None, targets, scores, grad, PLAIN)) == bits(expected)
    assert expected[2].isnan().all()
    assert not expected[[1, 3, 4]].any()


def test_the_operators_reach_the_kernels(emulator, monkeypatch):
    """The CUDA implementations of the ops, called on CPU tensors, give what the CPU ones give."""
    values, rows, targets, grad = batch(torch.float32, 129, seed=1)
    logits = place(values)
    scores = ops._token_stats_cuda(logits, rows, targets, *PLAIN, False)
    fresh = ops._logits_grad_cuda(logits, rows, targets, scores[1], scores[2], grad, *PLAIN)
    version = logits._version
    ops._logits_grad_in_place_cuda(logits, rows, targets, scores[1], scores[2], grad, *PLAIN)
    assert logits._version == version + 1
    assert torch.equal(logits, fresh)
