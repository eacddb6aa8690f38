"""Random hidden states, heads and score tables, float64's answers, and what a pass multiplies."""

from __future__ import annotations

import os

import reference
import torch
from logps_cases import device_of, fields, random_case
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_ext.torch import linear_sequence_logps

PLANS = ["frozen", "recompute"]
CHUNKS = [1, 2, 5, None]
EXAMPLES = int(os.environ.get("DPO_EXT_EXAMPLES", "24"))


def random_head(seed, *, H=6, V=9, dtype=torch.float64, weights=False, spread=1.0, **table):
    """(hidden (R, H), weight (V, H), bias (V,), table)."""
    logits, table = random_case(seed, V=V, weights=weights, **table)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(logits), H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64) * spread
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), table


def run(hidden, weight, bias, table, upstream, plan, impl="auto", score=None, **options):
    """(values, dX, dW, db); under ``frozen`` only the hidden states need a gradient."""
    where = device_of(impl)
    x = hidden.detach().to(where).clone().requires_grad_()
    w, b = (None if p is None else p.detach().to(where).clone() for p in (weight, bias))
    if plan != "frozen":
        w.requires_grad_()
        if b is not None:
            b.requires_grad_()
    score = score or linear_sequence_logps
    options = {"plan": plan, "impl": impl, **options} if score is linear_sequence_logps else options
    value = score(x, w, table.to(where), bias=b, **options)
    value.backward(upstream.to(where, value.dtype))
    grads = [None if p is None or p.grad is None else p.grad.cpu() for p in (x, w, b)]
    return value.detach().cpu(), *grads


def oracle(hidden, weight, bias, table, upstream, **how):
    x, w, b = (None if p is None else p.double().numpy() for p in (hidden, weight, bias))
    f = fields(table)
    z = x @ w.T + (0.0 if b is None else b)
    g = reference.token_upstream(upstream.double().numpy(), f["weights"], f["seq_offsets"])
    value = reference.sequence_logps(z, f, **how)
    return value, *reference.linear_grads(x, w, b, f["logit_rows"], f["targets"], g, **how)


class Watch(TorchDispatchMode):
    """Counts products and remembers the largest tensor that was made."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor) and not func.is_view:
                self.largest = max(self.largest, value.numel())
        return out
