"""Logits where a kernel reads them, on the host, with float64's answers; what must not be read is NaN."""

from __future__ import annotations

import math

import numpy as np
import reference
import torch

from dpo_ext.torch.logps import cuda as kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = (1.0, 0.0, 1.0)
TRANSFORMS = {"plain": PLAIN, "scaled": (0.7, 0.0, 1.3), "capped": (2.0, 5.0, 0.7)}
STATS = ("entropy", "mean_logit", "log_sum_sq")


def place(values: torch.Tensor, offset: int = 0, gap: int = 0) -> torch.Tensor:
    """`values` (R, V) in memory of their own: `offset` elements past a 16-byte boundary, NaN in every gap."""
    rows, columns = values.shape
    stride = columns + gap
    flat = torch.full((offset + rows * stride + 8,), math.nan, dtype=values.dtype)
    assert flat.data_ptr() % 16 == 0
    placed = flat.as_strided((rows, columns), (stride, 1), offset)
    placed.copy_(values)
    return placed


def batch(dtype, columns: int, seed: int, tokens: int = 4, spread: float = 4.0):
    """Logits of tokens + 1 rows in another order than the table, token 1 not scored and its row NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(tokens + 1, columns, generator=generator) * spread).to(dtype)
    rows = torch.randperm(tokens + 1, generator=generator)[:tokens]
    targets = torch.randint(0, columns, (tokens,), generator=generator, dtype=torch.int32)
    targets[0] = columns - 1
    targets[1] = -100
    values[rows[1]] = math.nan
    grad = torch.randn(tokens, generator=generator)
    return values, rows, targets, grad


def oracle(values, rows, targets, grad, transform):
    how = dict(zip(("logit_scale", "softcap", "temperature"), transform, strict=True))
    how["softcap"] = how["softcap"] or None
    z = values.double().numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        stats = reference.token_stats(z, rows.tolist(), targets.tolist(), **how)
        return stats, reference.logits_grad(
            z, rows.tolist(), targets.tolist(), grad.tolist(), **how
        )


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous()
    return (flat.view(torch.uint8) if flat.dtype != torch.bool else flat).numpy().tobytes()


def gradient(logits, rows, targets, scores, grad, transform, in_place=False):
    out = logits if in_place else torch.full(logits.shape, math.nan, dtype=logits.dtype)
    kernels.logits_grad(logits, rows, targets, scores[1], scores[2], grad, *transform, out)
    return out


def check_gradient(got, expected, dtype, grad):
    """Within the rounding of the dtype, plus float32's error on the largest coefficient."""
    eps = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    tiny = {torch.float32: 1e-8, torch.bfloat16: 1e-8, torch.float16: 2**-24}[dtype]
    error = np.abs(got.double().numpy() - expected)
    limit = eps * np.abs(expected) + tiny * float(grad.abs().numpy().max(initial=1.0))
    assert (error <= limit).all(), f"off by {(error - limit).max():.2e} more than allowed"
