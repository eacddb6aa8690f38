"""Logits where a kernel reads them, on a CUDA device, and both passes over them."""

from __future__ import annotations

import math

import kernel_cases
import numpy as np
import torch
from kernel_cases import PLAIN

from dpo_ext.torch.logps import ops

assert ops.DTYPES  # importing registers the operators

OPS = torch.ops.dpo_ext


def batch(dtype, columns, seed, tokens=6):
    """As `kernel_cases.batch`, of seven rows."""
    return kernel_cases.batch(dtype, columns, seed, tokens)


def place(values, offset=0, gap=0):
    """On the device, `offset` elements past an aligned address, NaN between rows."""
    rows, columns = values.shape
    flat = torch.full(
        (offset + rows * (columns + gap) + 8,), math.nan, dtype=values.dtype, device="cuda"
    )
    placed = flat.as_strided((rows, columns), (columns + gap, 1), offset)
    placed.copy_(values)
    return placed


def forward_backward(logits, rows, targets, grad, transform=PLAIN, stats=True):
    rows, targets, grad = rows.cuda(), targets.cuda(), grad.cuda()
    scores = OPS.token_stats(logits, rows, targets, *transform, stats)
    dz = OPS.logits_grad(logits, rows, targets, scores[1], scores[2], grad, *transform)
    return [c.cpu() for c in scores], dz.cpu(), (rows, targets, scores[1], scores[2], grad)


def same_bits(a, b):
    as_bytes = [t.contiguous().view(torch.uint8).numpy() for t in (a, b)]
    return a.dtype == b.dtype and np.array_equal(*as_bytes)
