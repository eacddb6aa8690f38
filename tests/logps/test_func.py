"""`torch.func` through the log-probs, the heads and the losses: autograd's own numbers."""

import pytest
import torch
from torch.func import grad, hessian, jacrev

from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    linear_token_kl,
    list_loss,
    preference_loss,
    sequence_logps,
    token_kl,
    token_scores,
    unpaired_loss,
)

V, H, M = 11, 6, 8
G = torch.Generator().manual_seed(0)
Z, X, W = (torch.randn(*s, generator=G) for s in ((M, V), (M, H), (V, H)))
TARGETS = torch.randint(0, V, (M,), generator=G, dtype=torch.int32)
TABLE = ScoreTable(logit_rows=range(M), targets=TARGETS, seq_offsets=[0, 2, 4, 5, M])
REF, LOGPS, ZERO = (
    torch.randn(2, 2, generator=G), torch.randn(4, 2, generator=G), torch.zeros(4, 2)
)  # fmt: skip
LABELS = torch.tensor([0, 1, 0, 1])

SCALARS = {
    "dpo": (lambda a: preference_loss(a, ZERO).loss, LOGPS),
    "aot": (lambda a: preference_loss(a, ZERO, loss="aot_paired").loss, LOGPS),
    "tdpo1": (
        lambda a: preference_loss(ZERO, ZERO, loss="tdpo1", kw=a[:, 0], kl=a[:, 1]).loss, LOGPS,
    ),
    "kto": (lambda a: unpaired_loss(a, ZERO[:, 0], LABELS, z=0.0).loss, LOGPS[:, 0]),
    "list": (lambda a: list_loss(a, ZERO).loss, LOGPS),
    "logits": (lambda a: preference_loss(sequence_logps(a, TABLE), REF).loss, Z),
    "head by weight": (lambda a: linear_preference_loss(X, a, TABLE, REF).loss, W),
    "head by hidden": (lambda a: linear_preference_loss(a, W, TABLE, REF).loss, X),
}  # fmt: skip
MANY = {
    "per_pair": (lambda a: preference_loss(a, ZERO).per_pair, LOGPS),
    "sequence_logps": (lambda a: sequence_logps(a, TABLE), Z),
    "token_scores": (lambda a: token_scores(a, TABLE, stats=("entropy",)).logps, Z),
    "frozen": (lambda a: linear_sequence_logps(a, W, TABLE), X),
    "recompute": (lambda a: linear_sequence_logps(X, a, TABLE, chunk_rows=3), W),
    "token_kl": (lambda a: token_kl(a, torch.zeros_like(Z), TABLE), Z),
    "linear_token_kl": (lambda a: linear_token_kl(X, a, X, 0 * W, TABLE), W),
}


@pytest.mark.parametrize(("function", "at"), SCALARS.values(), ids=SCALARS)
def test_grad_and_jacrev_give_autograds_gradient(function, at):
    leaf = at.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf), leaf)
    assert want.abs().sum() > 0
    torch.testing.assert_close(grad(function)(at), want)
    torch.testing.assert_close(jacrev(function)(at), want)


@pytest.mark.parametrize(("function", "at"), MANY.values(), ids=MANY)
def test_jacrev_gives_autograds_jacobian(function, at):
    want = torch.autograd.functional.jacobian(function, at)
    torch.testing.assert_close(jacrev(function)(at), want)


def test_a_second_derivative_is_refused_by_torch_func_too():
    with pytest.raises(RuntimeError):
        hessian(lambda a: preference_loss(a, ZERO).loss)(LOGPS)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad(lambda a: grad(lambda b: preference_loss(b, ZERO).loss)(a).sum())(LOGPS)
