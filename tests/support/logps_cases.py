"""Random logits and score tables, and the two ways to score them, for the tests of the log-probs."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from dpo_ext.torch import ScoreTable

IMPLS = ["torch", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KERNELS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around the widths of a vector load, a warp and a block; 1 and 2 have no or one other column.
WIDTHS = [1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 127, 128, 129, 1000]
HOWS = [
    {},
    {"temperature": 0.7},
    {"softcap": 30.0},
    {"logit_scale": 0.0625},
    {"temperature": 1.3, "softcap": 5.0, "logit_scale": 2.0},
]

LABELS = torch.tensor([[-100, 3, 1, 2], [-100, -100, 0, 4], [-100, 3, -100, -100], [-100, 2, 2, 1]])
UPSTREAM = torch.tensor([[1.0, -0.5], [0.25, 2.0]])


def name_of(how: dict) -> str:
    return "+".join(how) or "plain"


def device_of(impl: str) -> str:
    return "cuda" if impl == "cuda" else "cpu"


def random_case(seed: int, *, V=7, S=4, longest=3, spread=2.0, dtype=torch.float32, weights=False):
    """(logits (R, V), table): permuted rows with gaps, ignored and missing tokens, empty sequences."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest + 1, S)
    M = int(lengths.sum())
    R = M + int(rng.integers(0, 4))
    logits = torch.tensor(rng.normal(0, spread, (R, V)), dtype=dtype)
    targets = rng.integers(0, V, M).astype(np.int32)
    targets[rng.random(M) < 0.2] = -100
    w = np.round(rng.normal(1, 1, M), 2).astype(np.float32)
    w[rng.random(M) < 0.3] = 0
    table = ScoreTable(
        logit_rows=rng.permutation(R)[:M].astype(np.int64),
        targets=targets,
        seq_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        weights=w if weights else None,
    )
    return logits, table


def fields(table: ScoreTable) -> dict:
    """The table as the oracle takes it."""
    return {
        "logit_rows": table.logit_rows.cpu().numpy(),
        "targets": table.targets.cpu().numpy(),
        "seq_offsets": table.seq_offsets.cpu().numpy(),
        "weights": None if table.weights is None else table.weights.cpu().numpy(),
        "group_size": table.group_size,
    }


def oracle(logits, table, upstream=None, **how):
    """float64 (sequence log-probs, dL/dlogits) for dL/d(sequence log-prob) = upstream."""
    z, f = logits.detach().double().cpu().numpy(), fields(table)
    value = reference.sequence_logps(z, f, **how)
    if upstream is None:
        return value, None
    g = reference.token_upstream(upstream.double().cpu().numpy(), f["weights"], f["seq_offsets"])
    return value, reference.logits_grad(z, f["logit_rows"], f["targets"], g, **how)


def ordinary(logits, table, upstream=None, **how):
    """The same from torch's log_softmax in the dtype of the logits: what users have today."""
    z = logits.detach().clone().requires_grad_()
    y = z * how.get("logit_scale", 1.0)
    if how.get("softcap"):
        y = how["softcap"] * torch.tanh(y / how["softcap"])
    log_p = torch.log_softmax(y / how.get("temperature", 1.0), -1)
    scored = table.targets != -100
    if table.weights is not None:
        scored &= table.weights != 0
    tokens = log_p[table.logit_rows[scored], table.targets[scored].long()].double()
    sequence = torch.repeat_interleave(
        torch.arange(table.n_sequences), table.seq_offsets.diff().long()
    )[scored]
    if table.weights is not None:
        tokens = tokens * table.weights[scored]
    value = torch.zeros(table.n_sequences, dtype=torch.float64).index_add(0, sequence, tokens)
    value = value.reshape(-1, table.group_size).to(logits.dtype)
    if upstream is not None:
        value.backward(upstream.to(value.dtype))
    return value, z.grad


def logits_like(dtype=torch.float32, seed=0):
    return torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on(impl, *things):
    return [thing.to(device_of(impl)) for thing in things]
