"""What `dpo-ext doctor` tries out: kernels beside float64, and attention on packed rows.

Shapes: M tokens of V logits each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from dpo_ext.errors import DpoExtError, describe
from dpo_ext.layout.table import ScoreTable
from dpo_ext.torch.logps.logits import sequence_logps, token_scores

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of a size that no vector divides, and such as a GPU cuts into tiles.
SIZES = (33, 5_003, 70_001)
TOKENS = 6
CAPS = (None, 30.0)
LOGPS, STATS = 1e-5, 1e-4
"""What a float32 log-prob and a statistic may be off, of themselves or of 1."""
GRADIENTS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
"""What a gradient may be off, of the largest: one rounding."""


class Trial(NamedTuple):
    """How the kernels did with one dtype."""

    dtype: str
    error: float
    """The largest over all shapes, in units of what is allowed."""
    where: str


def try_kernels(device: str) -> list[Trial]:
    """Log-probs, statistics, sums and gradients of each dtype, beside the twin in float64.

    Raises:
        KernelUnavailable, KernelCompileError: of the CUDA kernels.
    """
    return [_worst(dtype, device) for dtype in DTYPES]


def _worst(dtype: torch.dtype, device: str) -> Trial:
    found = max(_errors(dtype, device), key=lambda one: one[0])
    return Trial(describe(dtype), *found)


def _errors(dtype: torch.dtype, device: str) -> Iterator[tuple[float, str]]:
    for V, softcap in itertools.product(SIZES, CAPS):
        generator = torch.Generator().manual_seed(V)
        logits = (4 * torch.randn(TOKENS + 1, V, generator=generator)).to(dtype)
        table = ScoreTable(
            logit_rows=[5, 0, 1, 2, 3, 6],
            targets=[0, V - 1, 7, 1, V // 2, 2],
            seq_offsets=[0, 2, 6],
            weights=[1.0, 0.5, 1.0, 0.0, 2.0, 1.0],
        )
        ours = logits.to(device).requires_grad_()
        exact = logits.double().requires_grad_()
        where = f"V = {V}" + ("" if softcap is None else f", softcap {softcap:g}")
        sums = sequence_logps(ours, table.to(device), softcap=softcap)
        wanted = sequence_logps(exact, table, softcap=softcap, impl="torch")
        yield _off(sums, wanted, LOGPS), f"sums, {where}"
        stats = ("entropy", "mean_logit", "log_sum_sq", "is_top1")
        scores = token_scores(ours, table.to(device), stats=stats, softcap=softcap)
        twin = token_scores(exact, table, stats=stats, softcap=softcap, impl="torch")
        for name, ours_, twins in zip(scores._fields, scores, twin, strict=True):
            assert ours_ is not None
            assert twins is not None
            yield _off(ours_, twins, LOGPS if name == "logps" else STATS), f"{name}, {where}"
        upstream = torch.tensor([[1.0, -0.5]])
        (grad,) = torch.autograd.grad(sums, ours, upstream.to(device))
        (expected,) = torch.autograd.grad(wanted, exact, upstream.double())
        largest = float(expected.abs().max())
        off = float((grad.cpu().double() - expected).abs().max())
        yield _finite(off / (GRADIENTS[dtype] * largest)), f"gradient, {where}"


def _off(found: torch.Tensor, wanted: torch.Tensor, allowed: float) -> float:
    found, wanted = found.detach().cpu().double(), wanted.detach().double()
    return _finite(float(((found - wanted).abs() / (allowed * wanted.abs().clamp(min=1))).max()))


def _finite(error: float) -> float:
    """NaN is the largest error of all."""
    return error if error == error else float("inf")


class Attention(NamedTuple):
    """How a tiny Llama with one attention implementation does with packed rows."""

    name: str
    works: bool
    said: str


IMPLEMENTATIONS = ("eager", "sdpa", "dpo_ext")
OF_GPUS = ("flex_attention", "flash_attention_2")
"""Written for GPUs; the first takes minutes of a CPU, to compile."""


def try_attention(device: str) -> list[Attention]:
    """Each attention of transformers, and ours, on a packed row: do segments stay apart?"""
    names = IMPLEMENTATIONS if device == "cpu" else (*IMPLEMENTATIONS, *OF_GPUS)
    return [_tried(name, device) for name in names]


def _tried(name: str, device: str) -> Attention:
    from transformers import LlamaConfig, LlamaForCausalLM

    from dpo_ext.torch.attention import assert_packing_safe
    from dpo_ext.torch.interface import choose_segments

    ours = name == "dpo_ext"
    flash = name.startswith("flash")
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    sizes["attn_implementation"] = "sdpa" if ours else name
    config = LlamaConfig(**sizes)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = LlamaForCausalLM(config)
        model = model.to(device, torch.bfloat16 if flash else torch.float32)
        if ours and (reason := choose_segments(model, always=True)) is not None:
            return Attention(name, False, reason)
        assert_packing_safe(model)
    except DpoExtError as error:
        return Attention(name, False, str(error).partition("\n")[0])
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        return Attention(name, False, f"{type(error).__name__}: {said}"[:160])
    return Attention(name, True, "keeps packed segments apart")
