"""Every kernel on a device against float64. Needs torch, CuPy, NumPy and pytest alone; skipped and counted without a GPU."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from compare import assert_no_worse
from device_cases import OPS, batch, forward_backward, place, same_bits
from kernel_cases import DTYPES, PLAIN, STATS, TRANSFORMS

from dpo_ext.torch.logps import cuda as kernels

pytestmark = pytest.mark.gpu

SIZES = [1, 2, 7, 8, 9, 31, 32, 33, 127, 128, 129, 1000, 32_769, 50_257, 128_256, 151_936]


@pytest.mark.fault("K5", "K17", "H11", "H14")
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_agree_with_float64(dtype, columns):
    for seed, transform in enumerate(TRANSFORMS.values()):
        values, rows, targets, grad = batch(dtype, columns, seed)
        scale, softcap, temperature = transform
        how = {"logit_scale": scale, "softcap": softcap or None, "temperature": temperature}
        scores, dz, _ = forward_backward(
            place(values, seed, (0, 3, 8)[seed]), rows, targets, grad, transform
        )
        z = values.double().numpy()
        with np.errstate(invalid="ignore"):
            expected = reference.token_stats(z, rows.tolist(), targets.tolist(), **how)
            truth = reference.logits_grad(z, rows.tolist(), targets.tolist(), grad.tolist(), **how)
        assert np.abs(scores[0].numpy() - expected["logp"]).max() <= 4e-6
        for column, name in zip(scores[3:6], STATS, strict=True):
            np.testing.assert_allclose(column.numpy(), expected[name], rtol=3e-6, atol=2e-5)
        np.testing.assert_array_equal(scores[6].numpy(), expected["is_top1"])
        assert_no_worse(dz, torch.from_numpy(truth).to(dtype), truth, slack=4e-6)


@pytest.mark.fault("K4", "K13", "H15")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_row_alone(dtype):
    """Alignment, stride, neighbours, run, split over blocks or not: the same bits; in place too."""
    many = 2 * kernels.processors(torch.device("cuda")) + 7
    for columns in (9, 50_257, 100_003):
        values, rows, targets, grad = batch(dtype, columns, seed=columns)
        scores, dz, _ = forward_backward(place(values), rows, targets, grad)
        for offset, gap in itertools.product(range(8), (0, 3)):
            logits = place(values, offset, gap)
            got, placed_dz, saved = forward_backward(logits, rows, targets, grad)
            assert all(same_bits(a, b) for a, b in zip(scores, got, strict=True))
            assert same_bits(dz, placed_dz)
            OPS.logits_grad_(logits, *saved, *PLAIN)
            assert same_bits(logits.cpu(), dz)
        filler = torch.randn(many, columns).to(dtype)
        got, batched_dz, _ = forward_backward(
            place(torch.cat([values, filler])),
            torch.cat([rows, torch.arange(7, 7 + many)]),
            torch.cat([targets, torch.zeros(many, dtype=torch.int32)]),
            torch.cat([grad, torch.ones(many)]),
        )
        assert all(same_bits(a, b[:6]) for a, b in zip(scores, got, strict=True))
        assert same_bits(dz, batched_dz[:7])


@pytest.mark.fault("K13")
def test_a_hundred_runs_give_the_same_bits():
    values, rows, targets, grad = batch(torch.bfloat16, 128_256, seed=0, tokens=64)
    logits = place(values)
    first = forward_backward(logits, rows, targets, grad)
    for _ in range(100):
        again = forward_backward(logits, rows, targets, grad)
        assert all(same_bits(a, b) for a, b in zip(first[0], again[0], strict=True))
        assert same_bits(first[1], again[1])


@pytest.mark.fault("K6", "H9", "H10")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_stay_in_their_row(dtype):
    inf = math.inf
    values, rows, targets, grad = batch(dtype, 5000, seed=1, tokens=10)
    values[rows[2], 0] = -inf
    values[rows[3], int(targets[3])] = -inf
    values[rows[4]] = -inf
    values[rows[5], 4700] = math.nan
    values[rows[6], int(targets[6])] = math.nan
    values[rows[7], 3] = inf
    values[rows[8]] = -inf
    values[rows[8], int(targets[8])] = 1.0
    scores, dz, _ = forward_backward(place(values, 1, 2), rows, targets, grad)
    with np.errstate(invalid="ignore"):
        z = values.double().numpy()
        expected = reference.token_stats(z, rows.tolist(), targets.tolist())
        truth = reference.logits_grad(z, rows.tolist(), targets.tolist(), grad.tolist())
    for column, name in zip((scores[0], *scores[3:6]), ("logp", *STATS), strict=True):
        np.testing.assert_allclose(
            column.numpy(), expected[name], rtol=3e-6, atol=2e-5, err_msg=name
        )
    np.testing.assert_array_equal(np.isnan(dz.double().numpy()), np.isnan(truth))
    np.testing.assert_allclose(dz.double().numpy(), truth, rtol=2**-8, atol=1e-5)


@pytest.mark.fault("H1", "H2", "H3")
@pytest.mark.parametrize("shift", [0.0, 40.0, 200.0])
def test_complement_of_a_peaked_row_keeps_its_digits(shift):
    columns = 128_256
    for complement in (1e-1, 1e-3, 1e-6):
        values = torch.full((1, columns), shift)
        values[0, 77] = shift + math.log((columns - 1) * (1 - complement) / complement)
        rows, targets = torch.tensor([0]), torch.tensor([77], dtype=torch.int32)
        scores, dz, _ = forward_backward(place(values), rows, targets, torch.ones(1))
        z = values.double().numpy()
        np.testing.assert_allclose(
            scores[0], reference.token_stats(z, [0], [77])["logp"], rtol=1e-5
        )
        np.testing.assert_allclose(
            dz[0, 77], reference.logits_grad(z, [0], [77], [1.0])[0, 77], rtol=1e-5
        )


@pytest.mark.fault("K1")
def test_what_does_not_exist_is_nan_and_not_read():
    values, rows, targets, grad = batch(torch.float32, 33, seed=0, tokens=10)
    targets[:] = torch.tensor([33, 38, -1, 2**31 - 1, -(2**31), -101, 0, 0, 0, 5])
    rows[6:9] = torch.tensor([len(values), 2**62, -1])
    scores, dz, _ = forward_backward(place(values, 1), rows, targets, grad)
    assert torch.isnan(scores[0][:9]).all()
    assert torch.isfinite(scores[0][9])
    assert torch.isnan(dz[rows[:6]]).all()
    others = [r for r in range(len(values)) if r not in rows[:6].tolist() and r != rows[9]]
    assert (dz[others] == 0).all()


@pytest.mark.fault("K1", "H8", "H13")
def test_segment_sums_have_the_bits_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(100_000, generator=generator) * -20
    weights = torch.rand(100_000, generator=generator)
    weights[::3] = 0
    values[::3] = math.nan
    offsets = torch.tensor([0, 0, 1, 50_000, 100_000, 5, 100_001, 3, -1], dtype=torch.int32)
    for w in (weights, None):
        cpu = OPS.segment_sum(values, w, offsets)
        gpu = OPS.segment_sum(values.cuda(), None if w is None else w.cuda(), offsets.cuda()).cpu()
        np.testing.assert_array_equal(cpu.numpy(), gpu.numpy())
        values = values.nan_to_num()


@pytest.mark.fault("K2")
def test_more_than_2_to_the_31_elements():
    rows, columns = 14_200, 151_936  # 2.16e9 bfloat16 logits, 4.3 GB
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB of free device memory")
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    row = torch.randn(columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[-1] = row.cuda()
    table, targets = torch.tensor([rows - 1, 0]), torch.tensor([columns - 1, 3], dtype=torch.int32)
    grad = torch.tensor([2.0, 1.0])
    scores, dz, saved = forward_backward(logits, table, targets, grad)
    z = torch.stack([row, torch.zeros(columns).bfloat16()]).double().numpy()
    expected = reference.token_stats(z, [0, 1], targets.tolist())
    assert np.abs(scores[0].numpy() - expected["logp"]).max() <= 4e-6
    truth = reference.logits_grad(z, [0, 1], targets.tolist(), grad.tolist())
    np.testing.assert_allclose(dz[-1].double(), truth[0], rtol=2**-8, atol=1e-9)
    np.testing.assert_allclose(dz[0].double(), truth[1], rtol=2**-8, atol=1e-9)
    assert not dz[1:-1].any()
    del dz
    OPS.logits_grad_(logits, *saved, *PLAIN)
    np.testing.assert_allclose(logits[-1].double().cpu(), truth[0], rtol=2**-8, atol=1e-9)


@pytest.mark.fault("K10")
def test_launches_follow_torchs_current_stream():
    """A kernel on another stream than its producer would read what a sleeping stream has not written yet.

    Two streams work at the same time on data of their own; every round's result is compared.
    """
    jobs = []
    for seed in (3, 4):
        values, rows, targets, grad = batch(torch.bfloat16, 50_257, seed)
        expected, expected_dz, _ = forward_backward(place(values), rows, targets, grad)
        jobs.append(
            {
                "stream": torch.cuda.Stream(),
                "values": values.cuda(),
                "table": [t.cuda() for t in (rows, targets, grad)],
                "logits": torch.zeros(values.shape, dtype=values.dtype, device="cuda"),
                "expected": [expected[0].cuda(), expected_dz.nan_to_num(7.0).cuda()],
                "wrong": torch.zeros((), dtype=torch.int64, device="cuda"),
            }
        )
    torch.cuda.synchronize()
    for n in range(1000):
        job = jobs[n % 2]
        logits, (rows, targets, grad) = job["logits"], job["table"]
        with torch.cuda.stream(job["stream"]):
            logits.zero_()
            torch.cuda._sleep(20_000)
            logits.copy_(job["values"])
            scores = OPS.token_stats(logits, rows, targets, *PLAIN, False)
            OPS.logits_grad_(logits, rows, targets, *scores[1:3], grad, *PLAIN)
            job["wrong"] += (scores[0] != job["expected"][0]).sum()
            job["wrong"] += (logits.nan_to_num(7.0) != job["expected"][1]).sum()
    torch.cuda.synchronize()
    assert [int(job["wrong"]) for job in jobs] == [0, 0]


@pytest.mark.fault("K10", "K12")
def test_backward_runs_on_the_stream_of_its_forward():
    from dpo_ext.torch import ScoreTable, sequence_logps

    values, rows, targets, _ = batch(torch.float32, 1000, seed=3)
    table = ScoreTable(
        logit_rows=rows.cuda(),
        targets=targets.cuda(),
        seq_offsets=torch.tensor([0, 3, 6], dtype=torch.int32, device="cuda"),
    )
    leaf = torch.nan_to_num(values).cuda().requires_grad_()
    twin = torch.nan_to_num(values).double().cuda().requires_grad_()
    with torch.cuda.stream(torch.cuda.Stream()):
        ours = sequence_logps(leaf, table)
        (ours * torch.tensor([[1.0, -2.0]], device="cuda")).sum().backward()
        theirs = sequence_logps(twin, table, impl="torch")
        (theirs * torch.tensor([[1.0, -2.0]], device="cuda")).sum().backward()
    torch.cuda.synchronize()
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-5, atol=1e-6)


def test_memory_is_torchs_and_in_place_takes_none():
    logits = torch.randn(512, 128_256, device="cuda").bfloat16()
    rows = torch.arange(512, device="cuda")
    targets = torch.zeros(512, dtype=torch.int32, device="cuda")
    scores = OPS.token_stats(logits, rows, targets, *PLAIN, False)
    grad = torch.ones(512, device="cuda")
    OPS.logits_grad_(logits, rows, targets, *scores[1:3], grad, *PLAIN)  # loads the module
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    scores = OPS.token_stats(logits, rows, targets, *PLAIN, True)
    OPS.logits_grad_(logits, rows, targets, *scores[1:3], grad, *PLAIN)
    assert torch.cuda.max_memory_allocated() - start < 1 << 20


def test_a_cuda_graph_replays_the_kernels():
    values, rows, targets, grad = batch(torch.bfloat16, 50_257, seed=4)
    expected, expected_dz, saved = forward_backward(place(values), rows, targets, grad)
    logits = torch.zeros(values.shape, dtype=values.dtype, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = OPS.token_stats(logits, saved[0], saved[1], *PLAIN, True)
        dz = OPS.logits_grad(logits, *saved[:2], scores[1], scores[2], saved[4], *PLAIN)
    logits.copy_(values)
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a.cpu(), b) for a, b in zip(scores, expected, strict=True))
    assert same_bits(dz.cpu(), expected_dz)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [33, 128_256])
def test_without_rows_each_row_has_one_target(dtype, columns):
    """As rows 0, 1, ... by bits, with unscored rows, a gradient of 0 and a target that is none."""
    values, _, targets, grad = batch(dtype, columns, seed=columns)
    logits, rows = torch.nan_to_num(values[:6]).cuda(), torch.arange(6).cuda()
    targets[2], grad[3], targets[4] = columns, 0.0, -100
    targets, grad = targets.cuda(), grad.cuda()
    found = []
    for which in (None, rows):
        torch.full((6, 4), 7, dtype=torch.int32, device="cuda")  # what the table may find
        scores = OPS.token_stats(logits, which, targets, *PLAIN, True)
        dz = OPS.logits_grad(logits, which, targets, scores[1], scores[2], grad, *PLAIN)
        found.append([t.cpu() for t in (*scores, dz)])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.fault("K11")
def test_opcheck_on_the_device():
    values, rows, targets, grad = batch(torch.float32, 40, seed=0)
    logits = torch.nan_to_num(values).cuda()
    _, _, saved = forward_backward(logits, rows, targets, grad)
    torch.library.opcheck(OPS.token_stats, (logits, *saved[:2], 0.7, 5.0, 1.3, True))
    torch.library.opcheck(OPS.logits_grad, (logits, *saved, *PLAIN))
    torch.library.opcheck(OPS.logits_grad_, (logits.clone(), *saved, *PLAIN))
