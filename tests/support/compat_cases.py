"""What is drawn for the functions of `dpo_ext.compat`, and the slow formula that each must equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from compare import assert_no_worse
from compat_formulas import (
    slow_both,
    slow_entropy,
    slow_head,
    slow_linear_cross_entropy,
    slow_llamafactory,
    slow_mean,
    slow_packed,
    slow_pairs,
    slow_rows,
    slow_selective,
)
from torch import Tensor

from dpo_ext.compat import dpo, llamafactory, open_instruct, openrlhf, torchtune, trl, verl
from dpo_ext.compat import torch as compat_torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    name: str
    ours: Callable[..., Any]
    slow: Callable[..., Any]
    draw: Callable[[Draw], dict[str, Any]]
    grads: tuple[str, ...]
    theirs: str = ""
    """Name of the peer's function, if it is not that of ours."""


class Draw:
    """Numbers of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = DTYPES[seed % 4]

    def int(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def of(self, *values: Any) -> Any:
        return values[self.int(0, len(values) - 1)]

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def ids(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, max(high, 1), shape, generator=self.generator)

    def mask(self, *shape: int, share: float = 0.6) -> Tensor:
        return torch.rand(shape, generator=self.generator) < share

    def vocabulary(self) -> int:
        return self.of(1, 2, 7, 8, 33, 130)

    def logits(self, *shape: int) -> Tensor:
        """Also a slice, or every second row of a larger one."""
        scale = self.of(1.0, 8.0, 40.0)
        kind = self.int(0, 3) if len(shape) == 3 else 0
        if kind == 1:
            return self.normal(shape[0], shape[1] + 1, shape[2], scale=scale)[:, :-1]
        if kind == 2:
            return self.normal(shape[0], 2 * shape[1], shape[2], scale=scale)[:, ::2]
        if kind == 3:
            return self.normal(shape[1], shape[0], shape[2], scale=scale).transpose(0, 1)
        return self.normal(*shape, scale=scale)

    def labels(self, high: int, rows: int, T: int, pad: int = -100) -> Tensor:
        """At least two scored labels a row where there is room."""
        keep = self.mask(rows, T)
        keep[:, -2:] = True
        return torch.where(keep, self.ids(high, rows, T), pad)


def run(function: Callable[..., Any], args: dict[str, Any], grads: tuple[str, ...], dtype=None):
    """Outputs, and the gradients of a fixed mixture of those outputs that have one."""
    made = {}
    for name, value in args.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value if dtype is None else value.to(dtype)
            leaf = value.detach().clone(memory_format=torch.contiguous_format)
            made[name] = leaf.requires_grad_() if name in grads else leaf
        elif isinstance(value, Tensor):
            made[name] = value.clone()
        else:
            made[name] = value
    passed = {k: as_laid_out(v, args[k]) if isinstance(v, Tensor) else v for k, v in made.items()}
    out = flat(function(**passed))
    mixed, leaves = [], [made[name] for name in grads if isinstance(made.get(name), Tensor)]
    for i, value in enumerate(out):
        if value.requires_grad:
            upstream = torch.linspace(-1.0, 2.0, value.numel() + i + 1)[: value.numel()]
            mixed.append((value * upstream.reshape(value.shape).to(value.dtype)).sum())
    found = []
    if mixed and leaves:
        total = torch.stack([m.to(mixed[0].dtype) for m in mixed]).sum()
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        found = [
            torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)
        ]
    return out, list(found)


def as_laid_out(leaf: Tensor, like: Tensor) -> Tensor:
    """The values of a leaf with the strides of another tensor; no leaf, as some write in place."""
    if not leaf.is_floating_point():
        return leaf
    shape, steps = like.shape, like.stride()
    size = 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    memory = torch.as_strided_scatter(leaf.new_zeros(size), leaf, shape, steps)
    return memory.as_strided(shape, steps)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value if part is not None for x in flat(part)]


def draw_rows(d: Draw) -> dict[str, Any]:
    V, shape = d.vocabulary(), d.of((d.int(1, 9),), (d.int(1, 4), d.int(1, 6)), (2, 2, 3))
    return {"logits": d.logits(*shape, V), "index": d.ids(V, *shape)}


def draw_selective(d: Draw) -> dict[str, Any]:
    args = draw_rows(d)
    if d.int(0, 2) == 0:
        V, K = args["logits"].shape[-1], d.int(1, 4)
        return {**args, "index": d.ids(V, *args["index"].shape, K)}
    return args


def draw_masked(d: Draw) -> dict[str, Any]:
    args = draw_selective(d)
    args["temperature"] = d.of(1.0, 0.7, 1.3)
    if d.int(0, 1):
        args["row_mask"] = d.mask(*args["index"].shape).to(d.of(torch.bool, torch.int64))
    return args


def draw_both(d: Draw) -> dict[str, Any]:
    args = {**draw_rows(d), "temperature": d.of(1.0, 0.7, 1.3)}
    args["entropy_requires_grad"] = bool(d.int(0, 1))
    if d.int(0, 1):
        args["row_mask"] = d.mask(*args["index"].shape)
    return args


def draw_entropy(d: Draw) -> dict[str, Any]:
    return {"logits": draw_rows(d)["logits"], "chunk_size": d.of(1, 2, 128)}


def draw_head(d: Draw) -> dict[str, Any]:
    R, H, V = d.int(1, 9), d.int(1, 6), d.vocabulary()
    return {
        "hidden": d.normal(R, H),
        "weight": d.normal(V, H, scale=d.of(1.0, 4.0)),
        "bias": d.normal(V) if d.int(0, 1) else None,
        "targets": d.ids(V, R),
        "temperature": d.of(1.0, 0.7),
        "chunk_size": d.of(1, 5, 64),
        "final_logit_softcapping": d.of(None, 5.0),
        "logit_scale": d.of(1.0, 0.25),
        "outputs": d.of(
            trl.OPTIONAL_OUTPUTS,
            ("entropy",),
            (),
            ("log_sum_sq_probs",),
            ("mean_logits", "is_top1"),
        ),
    }


def draw_batch(d: Draw) -> dict[str, Any]:
    B, T, V = 2 * d.int(1, 3), d.int(2, 7), d.vocabulary()
    return {"logits": d.logits(B, T, V), "labels": d.labels(V, B, T)}


def draw_llamafactory(d: Draw) -> dict[str, Any]:
    args = draw_batch(d)
    if d.int(0, 2) == 0:
        args["labels"] = args["labels"].masked_fill(args["labels"] == -100, -7)
        args["label_pad_token_id"] = -7
    return {**args, "ld_alpha": d.of(None, 0.0, 0.3)}


def draw_average(name: str):
    return lambda d: {**draw_batch(d), name: bool(d.int(0, 1))}


def draw_pairs(d: Draw) -> dict[str, Any]:
    N, scale = d.int(1, 6), d.of(1.0, 20.0, 200.0)
    scale = min(scale, 20.0) if d.dtype == torch.float16 else scale  # a square leaves its range
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    args: dict[str, Any] = {f"{name}_logps": -d.normal(N, scale=scale).abs() for name in names}
    if d.int(0, 4) == 0:  # policy == reference
        args["reference_chosen_logps"] = args["policy_chosen_logps"]
        args["reference_rejected_logps"] = args["policy_rejected_logps"]
    return {**args, "beta": d.of(0.1, 0.5), "label_smoothing": d.of(0.0, 0.1, 0.6)}


def draw_original(d: Draw) -> dict[str, Any]:
    return {**draw_pairs(d), "ipo": bool(d.int(0, 1)), "reference_free": d.int(0, 3) == 0}


def draw_openrlhf(d: Draw) -> dict[str, Any]:
    return {**draw_pairs(d), "ipo": bool(d.int(0, 1))}


def draw_packed(d: Draw) -> dict[str, Any]:
    sizes = [d.int(2, 5) for _ in range(d.int(1, 4))]
    T = sum(sizes)
    borders = torch.tensor([0, *sizes]).cumsum(0).to(d.of(torch.int32, torch.int64))
    return {
        "per_token_logps": -d.normal(1, T, scale=3.0).abs(),
        "labels": d.labels(50, 1, T),
        "cu_seq_lens": borders,
        "average_log_prob": bool(d.int(0, 1)),
    }


def draw_aggregate(d: Draw) -> dict[str, Any]:
    B, T = d.int(1, 4), d.int(2, 7)
    return {
        "per_token_logps": -d.normal(B, T, scale=3.0).abs(),
        "labels": d.labels(50, B, T),
        "average_log_prob": bool(d.int(0, 1)),
    }


def draw_cross_entropy(d: Draw) -> dict[str, Any]:
    R, H, V = d.int(1, 9), d.int(1, 6), d.of(2, 7, 33, 130)
    kind = d.int(0, 9)
    if kind == 0:  # one row
        return {"input": d.normal(H), "linear_weight": d.normal(V, H), "target": d.ids(V, 1)[0]}
    if kind == 1:  # probabilities
        target = d.normal(R, V).float().softmax(-1).to(d.dtype)
        return {"input": d.normal(R, H), "linear_weight": d.normal(V, H), "target": target}
    if kind == 2:  # two dimensions
        return {
            "input": d.normal(R, H),
            "linear_weight": d.normal(V, 3, H),
            "target": d.ids(V, R, 3),
        }
    ignored = d.of(None, -100, 1)
    target = d.ids(V, R)
    keep = d.mask(R)
    keep[0] = True
    target[0] = 0
    return {
        "input": d.normal(R, H),
        "linear_weight": d.normal(V, H, scale=d.of(1.0, 4.0)),
        "target": torch.where(keep, target, -100 if ignored is None else ignored),
        "linear_bias": d.normal(V) if d.int(0, 1) else None,
        "weight": d.normal(V).abs() + 0.1 if d.int(0, 1) else None,
        "reduction": d.of("mean", "sum", "none"),
        "ignore_index": ignored,
        "label_smoothing": d.of(0.0, 0.1),
    }


SIDES = ("policy_chosen_logps", "policy_rejected_logps")
ALL_SIDES = (*SIDES, "reference_chosen_logps", "reference_rejected_logps")
HEAD = ("hidden", "weight", "bias")


def module(cls, *names: str):
    """A module of torch as one function of all its arguments."""

    def call(**args):
        return cls(**{n: args.pop(n) for n in names if n in args})(**args)

    return call


def meaned(slow):
    return lambda **args: (lambda out: (out[0].mean(), *out[1:]))(slow(**args))


def as_labels(function):
    return lambda logits, index, **more: function(logits=logits, labels=index, **more)


def head_without_names(apply):
    return lambda **a: apply(*a.values())


TRL = (
    Case(
        "selective_log_softmax",
        trl.selective_log_softmax,
        slow_selective,
        draw_selective,
        ("logits",),
    ),
    Case("entropy_from_logits", trl.entropy_from_logits, slow_entropy, draw_entropy, ("logits",)),
)
TRL_115 = (
    Case(
        "selective_log_softmax", trl.selective_log_softmax, slow_selective, draw_masked, ("logits",)
    ),
    Case(
        "selective_log_softmax_and_entropy",
        trl.selective_log_softmax_and_entropy,
        slow_both,
        draw_both,
        ("logits",),
    ),
)
TRL_HEAD = Case(
    "ChunkedLogProbFunction",
    head_without_names(trl.ChunkedLogProbFunction.apply),
    head_without_names(slow_head),
    draw_head,
    HEAD,
)
LLAMAFACTORY = (
    Case(
        "get_batch_logps",
        llamafactory.get_batch_logps,
        slow_llamafactory,
        draw_llamafactory,
        ("logits",),
    ),
)
OPENRLHF = (
    Case(
        "log_probs_from_logits",
        as_labels(openrlhf.log_probs_from_logits),
        slow_selective,
        lambda d: {**draw_rows(d), "temperature": d.of(1.0, 0.7)},
        ("logits",),
    ),
    Case(
        "DPOLoss",
        module(openrlhf.DPOLoss, "beta", "label_smoothing", "ipo"),
        meaned(slow_pairs),
        draw_openrlhf,
        ALL_SIDES,
    ),
)
ORIGINAL = (
    Case(
        "_get_batch_logps",
        dpo._get_batch_logps,
        slow_mean("average_log_prob"),
        draw_average("average_log_prob"),
        ("logits",),
    ),
    Case("preference_loss", dpo.preference_loss, slow_pairs, draw_original, ALL_SIDES),
)
TORCHTUNE = (
    Case(
        "get_batch_log_probs",
        torchtune.get_batch_log_probs,
        slow_mean("return_average_logprobs", 1e-8),
        draw_average("return_average_logprobs"),
        ("logits",),
    ),
    Case(
        "DPOLoss",
        module(torchtune.DPOLoss, "beta", "label_smoothing"),
        slow_pairs,
        draw_pairs,
        SIDES,
    ),
)
VERL = (
    Case(
        "logprobs_from_logits",
        as_labels(verl.logprobs_from_logits),
        slow_selective,
        draw_rows,
        ("logits",),
    ),
)
OPEN_INSTRUCT = (
    Case(
        "log_softmax_and_gather",
        open_instruct.log_softmax_and_gather,
        slow_selective,
        draw_rows,
        ("logits",),
    ),
    Case(
        "_get_batch_logps",
        open_instruct._get_batch_logps,
        slow_rows,
        draw_aggregate,
        ("per_token_logps",),
    ),
    Case(
        "get_batch_logps",
        open_instruct.get_batch_logps,
        slow_packed,
        draw_packed,
        ("per_token_logps",),
    ),
)
TORCH = (
    Case(
        "linear_cross_entropy",
        compat_torch.linear_cross_entropy,
        slow_linear_cross_entropy,
        draw_cross_entropy,
        ("input", "linear_weight", "linear_bias"),
    ),
)
GROUPS = {
    "trl": (*TRL, *TRL_115, TRL_HEAD),
    "llamafactory": LLAMAFACTORY,
    "openrlhf": OPENRLHF,
    "dpo": ORIGINAL,
    "torchtune": TORCHTUNE,
    "verl": VERL,
    "open_instruct": OPEN_INSTRUCT,
    "torch": TORCH,
}


# ---- ours beside theirs ----

SLACK = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 3e-5, torch.float16: 3e-5}


def compare_with(case, theirs, seeds):
    """Values, dtypes, and gradients of ours are no worse than theirs of the same dtype."""
    for seed in seeds:
        draw, head = Draw(seed), any("weight" in name for name in case.grads)
        args = case.draw(draw)
        got, grads = run(case.ours, args, case.grads)
        base, base_grads = run(theirs, args, case.grads)
        truth, true_grads = run(case.slow, args, case.grads, torch.float64)
        assert len(got) == len(base) == len(truth), (seed, len(got), len(base))
        for i, (a, b, t) in enumerate(zip(got, base, truth, strict=True)):
            assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad), (
                seed,
                i,
            )
            assert_no_worse(a, b, t, slack(a, t, draw.dtype, head))
        assert len(grads) == len(base_grads)
        for a, b, t in zip(grads, base_grads, true_grads, strict=True):
            assert a.dtype == b.dtype, seed
            assert_no_worse(a, b, t, slack(a, t, draw.dtype, head))


def slack(got, truth, dtype, head):
    """Rounding of sums, one unit in the last place of what is returned in half precision, and of a
    head its logits, which two ways of adding a bias round in two ways.
    """
    size = float(truth.detach().double().abs().nan_to_num(0, 0, 0).max()) if truth.numel() else 0.0
    unit = torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
    base = max(SLACK[dtype], SLACK.get(got.dtype, 0.0))
    rounded = 2.0 * torch.finfo(dtype).eps * (1.0 + size) if head and dtype.itemsize == 2 else 0.0
    return base * (1.0 + size / 10) + unit * size + rounded
