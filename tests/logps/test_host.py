"""What a call asks of the host: how many operators, a node only for a gradient, no compiler."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    preference_loss,
    sequence_logps,
    token_scores,
)

ROWS, WIDTH = 8, 64
TABLE = ScoreTable(
    logit_rows=torch.arange(ROWS),
    targets=torch.arange(ROWS, dtype=torch.int32),
    seq_offsets=[0, 2, 4, 6, 8],
)
VALUES, HEAD, REF = torch.ones(ROWS, WIDTH), torch.ones(WIDTH, WIDTH), torch.ones(2, 2)
CALLS = {
    "sequence_logps": lambda x, w: sequence_logps(x, TABLE),
    "token_scores": lambda x, w: token_scores(x, TABLE).logps,
    "linear_sequence_logps": lambda x, w: linear_sequence_logps(x, w, TABLE),
    "linear_preference_loss": lambda x, w: linear_preference_loss(x, w, TABLE, REF).loss,
    "preference_loss": lambda x, w: preference_loss(x[:, :2], 0.5 * VALUES[:, :2]).loss,
}


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        return function(*args, **(kwargs or {}))


def leaves(trained: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return VALUES.clone().requires_grad_(), HEAD.clone().requires_grad_(trained)


# As many as under torch 2.8, which takes a few more. The lines that the first replaces: 10 and 26.
@pytest.mark.parametrize(
    ("name", "forward", "both"),
    [
        ("sequence_logps", 7, 18),
        ("token_scores", 5, 12),
        ("linear_sequence_logps", 27, 58),
        ("linear_preference_loss", 48, 91),
        ("preference_loss", 24, 32),
    ],
)
def test_a_small_call_takes_no_more_operators(name, forward, both):
    x, w = leaves(trained=True)
    with torch.no_grad(), Count() as found:
        CALLS[name](x, w)
    assert found.operators <= forward
    with Count() as found:
        CALLS[name](x, w).sum().backward()
    assert found.operators <= both


@pytest.mark.parametrize("name", CALLS)
def test_what_asks_for_no_gradient_makes_no_node_and_the_same_bits(name, monkeypatch):
    x, w = leaves(trained=True)
    expected = CALLS[name](x, w)
    applied = []
    if name != "linear_preference_loss":  # has a node of its own
        real = torch.autograd.Function.apply.__func__
        monkeypatch.setattr(
            torch.autograd.Function,
            "apply",
            classmethod(lambda cls, *args: applied.append(cls) or real(cls, *args)),
        )
    for call in (
        lambda: CALLS[name](x.detach(), w.detach()),
        torch.no_grad()(lambda: CALLS[name](x, w)),
    ):
        found = call()
        assert not found.requires_grad
        assert torch.equal(found, expected.detach())
    assert not applied


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("trained", [False, True])
def test_a_tangent_of_forward_mode_is_refused_and_not_lost(name, trained):
    x = VALUES.clone().requires_grad_(trained)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
            CALLS[name](dual, HEAD)


@pytest.mark.slow
def test_neither_import_nor_calls_load_the_compiler():
    code = (
        "import sys, torch\n"
        "from dpo_ext.torch import ScoreTable, preference_loss, sequence_logps\n"
        "z = torch.zeros(2, 3, 4, requires_grad=True)\n"
        "table = ScoreTable.from_labels(torch.tensor([[-100, 1, 2], [-100, 3, -100]]))\n"
        "preference_loss(sequence_logps(z, table), torch.zeros(1, 2)).loss.backward()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def names_seen_by_a_profiler(call) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()}


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sequence_logps", "linear_sequence_logps"])
def test_modes_and_profilers_see_the_operators_that_small_calls_pass_by(name):
    x, w = leaves(trained=True)

    def call() -> None:
        CALLS[name](x, w).sum().backward()

    with Names() as mode:
        call()
    for seen in (names_seen_by_a_profiler(call), mode.names):
        assert {"dpo_ext::token_stats", "dpo_ext::segment_sum"} <= seen
        assert any(one.startswith("dpo_ext::logits_grad") for one in seen)


@pytest.mark.parametrize("name", ["sequence_logps", "linear_sequence_logps"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 0.5, 2.0, 1.0, 1.0, 0.25, 1.0]])
def test_a_call_past_the_dispatcher_has_the_bits_of_one_through_it(name, weights):
    table = ScoreTable(
        logit_rows=TABLE.logit_rows,
        targets=TABLE.targets,
        seq_offsets=[0, 2, 2, 3, 8],
        weights=weights,
    )
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3)).requires_grad_()
    w = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4)).requires_grad_()
    call = {
        "sequence_logps": lambda: sequence_logps(x, table),
        "linear_sequence_logps": lambda: linear_sequence_logps(x, w, table),
    }[name]
    asked = (x,) if name == "sequence_logps" else (x, w)
    upstream = torch.tensor([[1.0, -2.0], [0.5, 3.0]])

    def run() -> list[torch.Tensor]:
        logps = call()
        return [logps.detach(), *torch.autograd.grad(logps, asked, upstream)]

    past = run()
    with Names():
        through = run()
    assert all(torch.equal(a, b) for a, b in zip(past, through, strict=True))
