"""Every function of `dpo_ext.compat` against a slow formula in float64: holds with no peer here."""

import pytest
import sampled
import torch
from compat_cases import GROUPS, compare_with
from liger_cases import LIGER

from dpo_ext.compat.parts import entropy, several

ALL = {**GROUPS, "liger": LIGER}
CASES = [(group, case) for group, cases in ALL.items() for case in cases]
NAMES = [f"{group}.{case.name}-{case.draw.__name__}" for group, case in CASES]


@pytest.mark.parametrize(("group", "case"), CASES, ids=NAMES)
def test_it_is_the_slow_formula(group, case):
    compare_with(case, same_dtype(case.slow, case), sampled.seeds(200))


@pytest.mark.parametrize("case", GROUPS["trl"], ids=lambda case: case.draw.__name__)
def test_chunks_of_one_row_change_nothing(case, monkeypatch):
    monkeypatch.setattr(entropy, "CHUNK_BYTES", 4)
    monkeypatch.setattr(entropy, "HEAD_BYTES", 4)
    monkeypatch.setattr(several, "CHUNK_BYTES", 4)
    compare_with(case, same_dtype(case.slow, case), sampled.seeds(60))


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
