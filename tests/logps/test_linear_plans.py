"""What a plan of the head costs and keeps: products, memory, and what autograd may ask of it."""

import os
import subprocess
import sys

import pytest
import torch
from linear_cases import PLANS, Watch, random_head
from torch.utils.checkpoint import checkpoint

from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    pairwise,
    preference_loss,
)
from dpo_ext.torch.logps import head, linear, products
from dpo_ext.torch.logps.head import SCRATCH_BYTES, Head, HeadOptions, Linear, row_width
from dpo_ext.torch.logps.scores import Transform


@pytest.mark.parametrize(
    ("plan", "forward", "backward"), [("frozen", 2, 0), ("recompute", 1, 3)], ids=PLANS
)
def test_products_and_memory_are_those_of_the_plan(plan, forward, backward):
    """4MHV and 8MHV less the last chunk's logits, which are still there; nothing larger than a chunk
    of logits, the weight's gradient or the hidden states."""
    R, H, V, C = 64, 4, 1000, 8
    table = ScoreTable(
        logit_rows=torch.randperm(R),
        targets=torch.randint(0, V, (R,), dtype=torch.int32),
        seq_offsets=torch.tensor([0, 40, R], dtype=torch.int32),
    )
    hidden = torch.randn(R, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=plan == "recompute")
    kept = []
    with (
        Watch() as watch,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        value = linear_sequence_logps(hidden, weight, table, plan=plan, chunk_rows=C)
    assert watch.products == forward * R // C
    assert watch.largest <= C * V
    known = {hidden.data_ptr(), weight.data_ptr()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in known) <= R * H + 8 * R
    with Watch() as watch:
        value.sum().backward()
    assert watch.products == backward * R // C - (plan == "recompute")
    assert watch.largest <= C * V
    for off in (torch.no_grad, torch.inference_mode):  # 2MHV: nothing for a gradient
        with off(), Watch() as watch:
            linear_sequence_logps(hidden, weight.detach(), table, plan=plan, chunk_rows=C)
        assert watch.products == R // C


def test_rows_of_scratch_begin_at_whole_lines_on_a_gpu_alone():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [row_width(V, gpu) for V in (1, 64, 50_257, 128_256)] == [64, 64, 50_304, 128_256]
    assert row_width(50_257, cpu) == 50_257


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [3, None])
def test_scratch_with_gaps_between_its_rows_gives_the_same_bits(monkeypatch, dtype, chunk_rows):
    R, H, V = 8, 16, 101
    table = ScoreTable(
        logit_rows=torch.arange(R),
        targets=torch.randint(0, V, (R,), dtype=torch.int32),
        seq_offsets=torch.tensor([0, 3, R], dtype=torch.int32),
    )
    ref = torch.zeros(1, 2)
    x, w = torch.randn(R, H).to(dtype), torch.randn(V, H).to(dtype)

    def gradients(plan):
        hidden, weight = x.clone().requires_grad_(), w.clone().requires_grad_(plan != "frozen")
        if plan == "pairwise":
            how = {"plan": plan, "chunk_rows": chunk_rows}
            linear_preference_loss(hidden, weight, table, ref, **how).loss.backward()
        else:
            linear_sequence_logps(
                hidden, weight, table, plan=plan, chunk_rows=chunk_rows
            ).sum().backward()
        return [t.grad for t in (hidden, weight) if t.grad is not None]

    plans = ("frozen", "recompute", "pairwise")
    dense = [gradients(plan) for plan in plans]
    monkeypatch.setattr(head, "row_width", lambda vocabulary, device: -(-vocabulary // 64) * 64)
    for plan, expected in zip(plans, dense, strict=True):
        for found, other in zip(gradients(plan), expected, strict=True):
            assert torch.equal(found, other)


@pytest.mark.parametrize("chunk_rows", [2, 5, None])
def test_a_second_backward_pass_multiplies_again(chunk_rows):
    """The first one has written over the logits of the last chunk."""
    hidden, weight, bias, table = random_head(7, dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    value = linear_sequence_logps(hidden, weight, table, bias=bias, chunk_rows=chunk_rows)
    g = torch.randn_like(value)
    first = torch.autograd.grad(value, inputs, g, retain_graph=True)
    again = torch.autograd.grad(value, inputs, -2 * g, retain_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(b, -2 * a)


def test_auto_is_frozen_for_a_frozen_weight_and_recompute_otherwise():
    hidden, weight, bias, table = random_head(0, dtype=torch.float32)
    hidden.requires_grad_()
    for w, b, per_chunk in (
        (weight, bias, 2),
        (weight.clone().requires_grad_(), bias, 1),
        (weight, bias.clone().requires_grad_(), 1),
    ):
        with Watch() as watch:
            linear_sequence_logps(hidden, w, table, bias=b, chunk_rows=1)
        assert watch.products == per_chunk * table.n_tokens


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(plan, reentrant):
    hidden, weight, _, table = random_head(6, dtype=torch.float32)
    weight.requires_grad_(plan == "recompute")
    grads = []
    for wrap in (False, True):
        x = hidden.clone().requires_grad_()

        def score(x):
            return linear_sequence_logps(x, weight, table, plan=plan)

        value = checkpoint(score, x, use_reentrant=reentrant) if wrap else score(x)
        value.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_compile_fullgraph(plan):
    torch._dynamo.reset()
    hidden, weight, _, table = random_head(9, dtype=torch.float32)
    weight.requires_grad_(plan == "recompute")

    def score(x):
        return linear_sequence_logps(x.tanh(), weight, table, plan=plan, chunk_rows=4)

    results = []
    for function in (score, torch.compile(score, fullgraph=True, backend="aot_eager")):
        x = hidden.clone().requires_grad_()
        value = function(x)
        value.sum().backward()
        results.append((value.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_default_chunk_keeps_the_scratch_within_its_budget():
    options = HeadOptions(Transform.of(1.0, None, 1.0), "torch")
    for V, dtype, rows in (
        (128256, torch.bfloat16, 4096),
        (256000, torch.bfloat16, 2048),
        (7, torch.float32, None),
    ):
        hidden = torch.empty(1, 8, dtype=dtype)
        head = Head.of(Linear(hidden, torch.empty(V, 8, device="meta"), None), options)
        assert head.chunk_rows * V * dtype.itemsize <= SCRATCH_BYTES
        assert rows is None or head.chunk_rows == rows


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_width_on_the_cpu_are_rounded_once(monkeypatch, dtype, tiled):
    """In tiles of the vocabulary or not: logits and dX within one rounding of float64, dW in float32."""
    monkeypatch.setattr(products, "by_tiles", lambda a: tiled)
    monkeypatch.setattr(products, "TILE", 5)
    generator = torch.Generator().manual_seed(0)
    C, H, V = 7, 16, 33
    x, w, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((C, H), (V, H), (V,)))
    dz = torch.randn(C, V, generator=generator).to(dtype)
    once = torch.finfo(dtype).eps / 2 + 1e-6
    for bias in (None, b):
        z = products.logits_into(torch.full((C, V), torch.nan, dtype=dtype), x, w, bias)
        exact = x.double() @ w.double().t() + (0.0 if bias is None else b.double())
        torch.testing.assert_close(z.double(), exact, rtol=once, atol=1e-5)
    dx = products.product(dz, w)
    torch.testing.assert_close(dx.double(), dz.double() @ w.double(), rtol=once, atol=1e-5)
    dw = torch.full((V, H), torch.nan)
    for first in (True, False):
        products.add_product(dw, dz, x, first=first)
    exact = 2 * dz.double().t() @ x.double()
    torch.testing.assert_close(dw.double(), exact, rtol=1e-5, atol=1e-5)


def test_widening_takes_a_tile_at_a_time():
    """No float32 copy of the weight, the logits or their gradient."""
    C, H, V = 64, 8, 4 * products.TILE
    table = ScoreTable(
        logit_rows=torch.arange(C),
        targets=torch.randint(0, V, (C,), dtype=torch.int32),
        seq_offsets=torch.tensor([0, 40, C], dtype=torch.int32),
    )
    hidden = torch.randn(C, H, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.bfloat16, requires_grad=True)

    class Wide(Watch):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            before, out = self.largest, super().__torch_dispatch__(func, types, args, kwargs)
            if isinstance(out, torch.Tensor) and out.dtype != torch.float32:
                self.largest = before
            return out

    with Wide() as watch:
        linear_sequence_logps(hidden, weight, table, chunk_rows=C).sum().backward()
    assert watch.largest <= max(C * products.TILE, V * H)


def multiplies_bfloat16():
    return not products.SLOW_HALVES[torch.bfloat16]


@pytest.mark.parametrize("fast", [False, True])
def test_one_product_of_bfloat16_is_rounded_once_and_has_no_wide_copy(monkeypatch, fast):
    """Of a weight's gradient that one chunk makes; several are added in float32."""
    monkeypatch.setitem(products.SLOW_HALVES, torch.bfloat16, not fast)
    generator = torch.Generator().manual_seed(0)
    C, H, V = 24, 16, 70
    table = ScoreTable(
        logit_rows=torch.arange(C),
        targets=torch.randint(0, V, (C,), dtype=torch.int32, generator=generator),
        seq_offsets=torch.tensor([0, 8, 12, 18, C], dtype=torch.int32),
    )
    given = [
        torch.randn(*s, generator=generator).bfloat16().requires_grad_() for s in ((C, H), (V, H))
    ]
    exact = [g.detach().double().requires_grad_() for g in given]
    linear_preference_loss(*exact, table, torch.zeros(2, 2), impl="torch").loss.backward()
    once = torch.finfo(torch.bfloat16).eps
    for chunk_rows in (C, 6):
        for way in ("pairwise", "recompute"):
            made = []
            monkeypatch.setattr(
                pairwise if way == "pairwise" else linear,
                "new_sum",
                lambda *a, made=made: made.append(products.new_sum(*a)) or made[-1],
            )
            for g in given:
                g.grad = None
            if way == "pairwise":
                how = {"chunk_rows": chunk_rows, "plan": way}
                linear_preference_loss(*given, table, torch.zeros(2, 2), **how).loss.backward()
            else:
                logps = linear_sequence_logps(*given, table, plan=way, chunk_rows=chunk_rows)
                preference_loss(logps, torch.zeros(2, 2)).loss.backward()
            (total,) = made
            is_one = chunk_rows == C
            assert total.dtype == (torch.bfloat16 if fast and is_one else torch.float32)
            for g, e in zip(given, exact, strict=True):
                error = (g.grad.double() - e.grad).abs().max() / e.grad.abs().max()
                assert error < 4 * once  # logits and dz are bfloat16, too


ISA = """
import torch
from dpo_ext.torch.logps import products
print(int(products.SLOW_HALVES[torch.bfloat16]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not multiplies_bfloat16(), reason="this CPU has no products of bfloat16")
@pytest.mark.parametrize(
    ("variables", "slow"),
    [
        ({}, 0),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, 1),
        ({"ONEDNN_MAX_CPU_ISA": "avx2"}, 1),
        ({"DNNL_MAX_CPU_ISA": "AVX2"}, 1),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, 0),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, 0),
    ],
)
def test_what_the_products_may_use_counts_and_not_what_torchs_loops_may(variables, slow):
    done = subprocess.run(
        [sys.executable, "-c", ISA],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(slow)
