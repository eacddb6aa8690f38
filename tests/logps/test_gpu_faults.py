"""Faults and hazards on a device, each as its form on the CPU in test_faults_*.py; needs what test_gpu.py needs."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import reference
import torch
from compare import assert_no_worse
from device_cases import OPS, batch, forward_backward, place, same_bits
from kernel_cases import DTYPES, PLAIN

from dpo_ext.torch.logps import ops

pytestmark = pytest.mark.gpu


def scored_by_plan(hidden, weight, table, plan, upstream=1.0, **how):
    """(log-probs, dX, dW) of a head on the device of its inputs."""
    from dpo_ext.torch import linear_preference_loss, linear_sequence_logps

    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(plan != "frozen")
    if plan == "pairwise":
        ref = torch.zeros(table.n_groups, 2, device=x.device)
        out = linear_preference_loss(x, w, table, ref, plan=plan, **how)
        (out.loss * upstream).backward()
        return out.logps, x.grad, w.grad
    value = linear_sequence_logps(x, w, table, plan=plan, **how)
    (value.sum() * upstream).backward()
    return value.detach(), x.grad, w.grad


def rows_in_order(tokens, V, per_sequence=1):
    from dpo_ext.torch import ScoreTable

    return ScoreTable(
        logit_rows=torch.arange(tokens),
        targets=(torch.arange(tokens) * 7 % V).int(),
        seq_offsets=torch.arange(0, tokens + 1, per_sequence).int(),
    ).to("cuda")


PLANS = ["frozen", "recompute", "pairwise"]


@pytest.mark.fault("K3")
def test_nothing_to_do_and_more_rows_than_a_grid_is_high():
    none = torch.empty(0, dtype=torch.int64, device="cuda")
    for shape in ((0, 5), (3, 5), (3, 0)):
        z = torch.randn(shape, device="cuda")
        scores = OPS.token_stats(z, none, none.int(), *PLAIN, True)
        assert [len(c) for c in scores] == [0] * 7
        assert not OPS.logits_grad(z, none, none.int(), *[none.float()] * 3, *PLAIN).any()
    offsets = torch.zeros(1, dtype=torch.int32, device="cuda")
    assert OPS.segment_sum(none.float(), None, offsets).shape == (0,)
    z = torch.randn(70_000, 9, device="cuda")
    rows = torch.arange(70_000, device="cuda")
    logps = OPS.token_stats(z, rows, torch.zeros_like(rows).int(), *PLAIN, False)[0]
    torch.testing.assert_close(logps, z.log_softmax(-1)[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.fault("K7")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_scored_is_not_read(dtype):
    results = []
    for poison in (0.0, math.nan, math.inf):
        values, rows, targets, grad = batch(dtype, 5000, seed=2)
        values[[r for r in range(7) if r not in rows[targets != -100].tolist()]] = poison
        scores, dz, _ = forward_backward(place(values), rows, targets, grad)
        results.append([*scores, dz])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.fault("K9")
def test_every_device_is_served_whatever_the_current_one_is():
    values, rows, targets, grad = batch(torch.float32, 40_003, seed=1)
    expected, expected_dz, _ = forward_backward(place(values), rows, targets, grad)
    count = torch.cuda.device_count()
    for index in range(count):
        with torch.cuda.device((index + 1) % count):
            on = [t.to(f"cuda:{index}") for t in (values, rows, targets, grad)]
            scores = OPS.token_stats(*on[:3], *PLAIN, True)
            dz = OPS.logits_grad(*on[:3], *scores[1:3], on[3], *PLAIN)
        assert dz.device.index == index
        assert all(same_bits(a.cpu(), b) for a, b in zip(scores, expected, strict=True))
        assert same_bits(dz.cpu(), expected_dz)
    with pytest.raises(ValueError, match="must be on cuda:0, found cpu"):
        ops._token_stats_cuda(values.to("cuda:0"), rows, targets, *PLAIN, False)


@pytest.mark.fault("K14")
@pytest.mark.parametrize("inplace", [False, True])
def test_without_memory_nothing_is_written_and_a_retry_works(inplace):
    from dpo_ext.torch import sequence_logps

    tokens, V = 1024, 65_536
    leaf = torch.randn(tokens, V, device="cuda").bfloat16().requires_grad_()
    table, upstream = rows_in_order(tokens, V), torch.ones(tokens // 2, 2, device="cuda")
    (expected,) = torch.autograd.grad(sequence_logps(leaf, table), leaf, upstream)
    expected = expected.cpu()
    z = leaf * 1
    value = sequence_logps(z, table, inplace_grad=inplace)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # All that the limit leaves is taken, by blocks of two sizes: torch keeps pools of them.
    taken, total = [], torch.cuda.mem_get_info()[1]
    limit = (torch.cuda.memory_reserved() + (64 << 20)) / total
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        for size in (8 << 20, 2 << 20, 512):
            try:
                while True:
                    taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                pass
        with pytest.raises(torch.OutOfMemoryError):
            torch.autograd.grad(value, z, upstream, retain_graph=True)
    finally:
        taken.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(z, leaf)
    (grad,) = torch.autograd.grad(value, z, upstream)
    assert torch.equal(grad.cpu(), expected)


COLD = """
import torch, dpo_ext.torch.logps.ops
z = torch.linspace(-9, 9, 8 * 5000, device="cuda").sin().mul(7).view(8, 5000)
rows = torch.arange(8, device="cuda")
s = torch.ops.dpo_ext.token_stats(z, rows, rows.int(), 1.0, 0.0, 1.0, True)
d = torch.ops.dpo_ext.logits_grad(z, rows, rows.int(), s[1], s[2], s[0], 1.0, 0.0, 1.0)
total = torch.ops.dpo_ext.segment_sum(s[0], None, torch.tensor([0, 8], device="cuda").int())
import hashlib
print(hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in (*s, d, total))).hexdigest())
"""


@pytest.mark.fault("K16")
def test_eight_processes_on_a_cold_cache_and_flipped_bytes_in_it(tmp_path):
    env = os.environ | {"CUPY_CACHE_DIR": str(tmp_path)}

    def start():
        command = [sys.executable, "-W", "ignore", "-c", COLD]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    processes = [start() for _ in range(8)]
    results = {p.communicate(timeout=300)[0] for p in processes}
    assert [p.returncode for p in processes] == [0] * 8
    assert len(results) == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    again = start()
    assert again.communicate(timeout=300)[0] in results
    assert again.returncode == 0


@pytest.mark.fault("K17")
def test_random_batches_agree_with_the_twin_in_float64():
    from logps_cases import HOWS, random_case

    from dpo_ext.torch import sequence_logps

    for seed in range(2000):
        dtype, V = DTYPES[seed % 3], (1, 2, 7, 9, 33, 130, 5003)[seed // 3 % 7]
        logits, table = random_case(seed, V=V, dtype=dtype, weights=seed % 2 == 0, spread=3.0)
        how, g = HOWS[seed % len(HOWS)], torch.randn(table.n_groups, 2)
        x, twin = logits.cuda().requires_grad_(), logits.double().requires_grad_()
        value = sequence_logps(x * 1, table.to("cuda"), inplace_grad=seed % 4 == 0, **how)
        (grad,) = torch.autograd.grad(value, x, g.cuda())
        expected = sequence_logps(twin, table, impl="torch", **how)
        (truth,) = torch.autograd.grad(expected, twin, g.double())
        torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=2e-5)
        rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        atol = 2e-6 * float(truth.abs().max() if truth.numel() else 0) + 2**-24
        torch.testing.assert_close(grad.cpu().double(), truth, rtol=rtol * 1.001, atol=atol)


@pytest.mark.fault("K18")
@pytest.mark.parametrize("plan", PLANS)
def test_the_loss_is_log_2_at_the_reference_and_every_option_moves_the_result(plan):
    from dpo_ext.torch import linear_preference_loss, linear_sequence_logps

    hidden = torch.randn(64, 32, device="cuda")
    weight = torch.randn(300, 32, device="cuda", requires_grad=plan != "frozen")
    table = rows_in_order(64, 300, per_sequence=4)
    ref = linear_sequence_logps(hidden, weight, table).detach()
    with torch.no_grad():
        out = linear_preference_loss(hidden, weight, table, ref, plan=plan)
    assert abs(out.loss.item() - math.log(2)) <= 1e-7
    away = ref + torch.tensor([1.0, -2.0], device="cuda")
    options = {"temperature": 1.5, "softcap": 3.0, "logit_scale": 1.5, "beta": 0.3, "num_pairs": 3}
    options |= {"loss": "ipo_sum", "bias": torch.randn(300, device="cuda")}

    def loss(**how):
        return linear_preference_loss(hidden, weight, table, away, plan=plan, **how).loss.item()

    plain = loss()
    for name, value in options.items():
        assert abs(loss(**{name: value}) - plain) > 1e-3, name


@pytest.mark.fault("H4", "H6", "H16")
@pytest.mark.parametrize("tokens", [2, 8, 64])
@pytest.mark.parametrize("plan", PLANS[:2])
def test_a_half_precision_head_of_few_rows(plan, tokens):
    """dX has K = V, which cuBLAS may split and add in bfloat16: it must not. Twice: the same bits."""
    V, H = 128_256, 64
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, H, generator=generator).bfloat16().cuda()
    weight = torch.randn(V, H, generator=generator).bfloat16().cuda()
    table = rows_in_order(tokens, V)
    value, dx, _ = scored_by_plan(hidden, weight, table, plan)
    assert (value <= 0).all()
    z = hidden @ weight.T
    rows = torch.arange(tokens, device="cuda")
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)[rows, table.targets.long()]
    base = z.float().log_softmax(-1)[rows, table.targets.long()]
    assert_no_worse(value.flatten(), base, exact, slack=1e-4)
    by_exact, _, _ = scored_by_plan(hidden, weight, table, plan, exact_target=True)
    assert (by_exact <= 0).all()
    # what is left is the rounding of the other columns, weighted by their shares
    assert (by_exact.flatten() - exact).abs().max() <= 2**-8 * z.abs().max()
    p = z.double().softmax(-1)
    truth = weight[table.targets.long()].double() - p @ weight.double()
    torch.testing.assert_close(dx.double(), truth, rtol=2**-7, atol=4e-3)
    again = scored_by_plan(hidden, weight, table, plan)
    assert torch.equal(again[0], value)
    assert torch.equal(again[1], dx)


@pytest.mark.fault("H5")
def test_the_weight_gradient_of_64_chunks_is_rounded_once_on_the_device():
    hidden = torch.rand(256, 8, device="cuda").bfloat16()
    weight = torch.randn(16, 8, device="cuda").bfloat16()
    table = rows_in_order(256, 16, per_sequence=128)
    exact = scored_by_plan(hidden.double(), weight.double(), table, "recompute")[2]
    large = exact.abs() > exact.abs().max() / 20
    got = scored_by_plan(hidden, weight, table, "recompute", chunk_rows=4)[2].double()
    assert ((got - exact).abs() / exact.abs())[large].max() < 5 * 2**-8


@pytest.mark.fault("H7")
@pytest.mark.parametrize(("precision", "unit"), [("highest", 2e-6), ("high", 2e-3)])
def test_float32_products_are_as_exact_as_the_user_set(precision, unit):
    hidden, weight = torch.randn(16, 64, device="cuda"), torch.randn(300, 64, device="cuda")
    table = rows_in_order(16, 300)
    exact = scored_by_plan(hidden.double(), weight.double(), table, "frozen")[0]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        value = scored_by_plan(hidden, weight, table, "frozen")[0]
    finally:
        torch.set_float32_matmul_precision(before)
    largest = float((hidden @ weight.T).abs().max())
    assert (value - exact).abs().max() <= 2 * unit * largest + 1e-6


@pytest.mark.fault("H12")
@pytest.mark.parametrize("plan", ["frozen", "pairwise"])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_small_float16_gradients_are_kept(plan, scale):
    hidden = torch.randn(512, 16, device="cuda").half()
    weight = (torch.randn(200, 16, device="cuda") * 0.1).half()
    table = rows_in_order(512, 200)
    upstream = scale * (1e-5 if plan == "frozen" else 1e-2)
    got = scored_by_plan(hidden, weight, table, plan, upstream)[1].double()
    truth = scored_by_plan(hidden.double(), weight.double(), table, plan, upstream)[1]
    assert (got - truth).abs().max() <= 4e-3 * truth.abs().max() + 2.0**-24


@pytest.mark.fault("H17")
def test_flushed_denormal_probabilities_cost_no_more_than_their_size():
    z = torch.zeros(1, 64)
    z[0, 1:] = -torch.linspace(80, 110, 63)
    rows, targets = torch.tensor([0]), torch.tensor([0], dtype=torch.int32)
    _, dz, _ = forward_backward(z.cuda(), rows, targets, torch.ones(1))
    truth = reference.logits_grad(z.double().numpy(), [0], [0], [1.0])
    assert (np.abs(dz.double().numpy() - truth) <= 64 * 2.0**-126 + 1e-5 * np.abs(truth)).all()
