"""The error of a token's log-prob: 4e-6 or half a unit in the last place; and memory that is not written over."""

import numpy as np
import pytest
import torch

from dpo_ext import TensorError
from dpo_ext.torch import ScoreTable, sequence_logps, token_scores

R = 32


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("V", [7, 1025, 4099])
@pytest.mark.parametrize("spread", [1.0, 10.0, 100.0, 1e3, 1e5])
def test_token_log_probs_are_off_by_4e_6_or_half_a_unit(spread, V, impl):
    generator = torch.Generator().manual_seed(V)
    z = torch.randn(R, V, generator=generator) * spread
    targets = torch.randint(0, V, (R,), generator=generator, dtype=torch.int32)
    table = ScoreTable(logit_rows=range(R), targets=targets, seq_offsets=[0, R // 2, R])
    want = torch.log_softmax(z.double(), -1)[torch.arange(R), targets.long()].numpy()
    error = np.abs(token_scores(z, table, impl=impl).logps.double().numpy() - want)
    units = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
    allowed = (0.5 if impl == "cpu" else 1.0) * units
    assert (error <= np.maximum(4e-6, allowed * (1 + 1e-3))).all()


VIEWS = {
    "view": lambda p: p.view(8, 11), "slice": lambda p: p[:8], "expand": lambda p: p.expand(8, 11),
    "unsqueeze": lambda p: p.unsqueeze(0), "view of a view": lambda p: p.view(2, 44).view(8, 11),
}  # fmt: skip


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_in_place_gradients_refuse_views_of_leaves(view):
    table = ScoreTable(logit_rows=range(8), targets=[1] * 8, seq_offsets=[0, 2, 4, 6, 8])
    p = torch.nn.Parameter(torch.randn(8, 11))
    with pytest.raises(TensorError, match="a view of a leaf"):
        sequence_logps(view(p), table, inplace_grad=True)
    sequence_logps(view(p * 1.0), table, inplace_grad=True).sum().backward()
    assert p.grad.any()
