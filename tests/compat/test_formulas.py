"""Every function of `dpo_ext.compat` against a slow formula in float64: holds with no peer here."""

import pytest
import sampled
import torch
from compare import assert_no_worse
from compat_cases import GROUPS, Draw, run
from liger_cases import LIGER

from dpo_ext.compat.parts import entropy, several

ALL = {**GROUPS, "liger": LIGER}
CASES = [(group, case) for group, cases in ALL.items() for case in cases]
NAMES = [f"{group}.{case.name}-{case.draw.__name__}" for group, case in CASES]
SLACK = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 3e-5, torch.float16: 3e-5}


def compare(case, theirs, seeds):
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


@pytest.mark.parametrize(("group", "case"), CASES, ids=NAMES)
def test_it_is_the_slow_formula(group, case):
    compare(case, same_dtype(case.slow, case), sampled.seeds(200))


@pytest.mark.parametrize("case", GROUPS["trl"], ids=lambda case: case.draw.__name__)
def test_chunks_of_one_row_change_nothing(case, monkeypatch):
    monkeypatch.setattr(entropy, "CHUNK_BYTES", 4)
    monkeypatch.setattr(entropy, "HEAD_BYTES", 4)
    monkeypatch.setattr(several, "CHUNK_BYTES", 4)
    compare(case, same_dtype(case.slow, case), sampled.seeds(60))


def same_dtype(slow, case):
    """The slow formula in the dtype of the input, with the dtypes that ours gives."""

    def call(**args):
        out = slow(**args)
        wanted = case.ours(
            **{k: v.detach() if hasattr(v, "detach") else v for k, v in args.items()}
        )
        return cast(out, wanted)

    return call


def cast(value, like):
    if isinstance(value, torch.Tensor):
        return value.to(like.dtype)
    return [None if v is None else cast(v, w) for v, w in zip(value, like, strict=True)]
