"""The fixed cases of `dpo_ext.testing`: what they hold, that they go first, and what is told of them."""

import importlib.util
import itertools
import sys

import numpy as np
import pytest
import torch
from collators import collate_trl
from torch.nn.functional import logsigmoid
from wrong_losses import Upstream

from dpo_ext.testing import (
    check_layouts,
    check_list_loss,
    check_logps,
    check_loss_invariants,
    check_unpaired_loss,
)
from dpo_ext.testing.corpus import FORMS, logit_cases, row_cases
from dpo_ext.torch import sequence_logps


def dpo(logps, ref_logps):
    ratios = logps - ref_logps
    return -logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1]))


def simpo(logps, ref_logps, lengths):
    average = logps / lengths.clamp(min=1)
    return -logsigmoid(2 * (average[:, 0] - average[:, 1]))


def sign_kto(logps, ref_logps, labels):
    return torch.sigmoid(0.1 * (1 - 2 * labels.to(logps.dtype)) * (logps - ref_logps))


def best_first(logps, ref_logps):
    x = 0.1 * (logps - ref_logps)
    return torch.logsumexp(x, 1) - x[:, 0]


class Seen:
    """A function that keeps copies of what it is given."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, logps, ref_logps, *others):
        self.calls.append([t.detach().clone() for t in (logps, ref_logps, *others)])
        return self.function(logps, ref_logps, *others)

    def rows(self):
        return torch.cat([torch.cat([t.double() for t in call], 1) for call in self.calls])


@pytest.fixture
def corpus_alone(monkeypatch):
    """Hypothesis draws nothing: what is found is found by the fixed cases."""
    monkeypatch.setattr("dpo_ext.testing.search.search_drawn", lambda *_: None)


@pytest.mark.parametrize("reach", [1e4, 60.0])
def test_pairs_are_seen_at_their_ends(corpus_alone, reach):
    seen = Seen(simpo)
    check_loss_invariants(seen, needs_lengths=True, reference_free=True, finite_up_to=reach)
    assert {1, 2, 3, 4, 5} <= {len(logps) for logps, *_ in seen.calls}
    values, lengths = seen.rows()[:, :4], seen.rows()[:, 4:]
    for column in range(4):  # alone, at its end
        others = [k for k in range(4) if k != column]
        assert ((values[:, column] == -reach) & (values[:, others] > -1).all(1)).any()
    margins = (values[:, 0] - values[:, 2]) - (values[:, 1] - values[:, 3])
    assert margins.max() >= reach - 1
    assert margins.min() <= 1 - reach
    for column, exactly in itertools.product(range(2), (0.0, -1e-6)):
        assert (values[:, column] == exactly).any()
    assert ((values[:, :2] == 0).all(1)).any()
    for pair in itertools.product((0, 1, 10**5), repeat=2):
        assert (lengths == torch.tensor(pair)).all(1).any()


def test_logits_are_seen_at_their_ends():
    cases = logit_cases(weighted=True)
    assert {1, 2, 1025, 4099} <= {case.values.shape[1] for case in cases}
    assert {case.form for case in cases} == set(FORMS)
    weights = torch.cat([case.table.weights for case in cases if case.table.weights is not None])
    assert {-1.0, 0.0, 3.0} <= set(weights.tolist())
    lengths = torch.cat([case.table.lengths.reshape(-1) for case in cases])
    assert {0, 1, 10**5} <= set(lengths.tolist())
    assert all(case.table.weights is None for case in logit_cases(weighted=False))


def test_rows_are_seen_at_their_ends():
    batches = row_cases(97, 0, 70)
    assert {1, 2, 3, 4, 5} <= {len(batch) for batch in batches}
    rows = [row for batch in batches for row in batch]
    assert any(not len(row["prompt_ids"]) for row in rows)
    assert any(len(row["prompt_ids"]) == 70 for row in rows)
    assert any(np.array_equal(row["chosen_ids"], row["rejected_ids"]) for row in rows)
    assert any((row["chosen_ids"] == 0).all() for row in rows)


@pytest.mark.parametrize("check", [check_loss_invariants, check_unpaired_loss, check_list_loss])
def test_upstreams_of_both_signs_are_seen(corpus_alone, check):
    function = {
        check_loss_invariants: dpo,
        check_unpaired_loss: sign_kto,
        check_list_loss: best_first,
    }[check]
    seen = set()

    def loss(*given):
        return Upstream.apply(
            function(*given), lambda g: (seen.update(g.sign().reshape(-1).tolist()), g)[1]
        )

    check(loss)
    assert seen == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("check", [check_unpaired_loss, check_list_loss])
def test_single_completions_and_lists_are_seen_at_their_ends(corpus_alone, check):
    sizes, extremes = set(), set()

    def loss(logps, ref_logps, *others):
        sizes.add(len(logps))
        extremes.update((logps - ref_logps).detach().reshape(-1).tolist())
        extremes.update(logps.detach().reshape(-1).tolist())
        return (sign_kto if others else best_first)(logps, ref_logps, *others)

    check(loss)
    assert {1, 2, 3, 4, 5} <= sizes
    assert {0.0, -1e-6} <= extremes
    assert min(extremes) <= -9999
    assert max(extremes) >= 9999


def literals_of(folder, number):
    """A user's module full of literals, imported."""
    lines = [f"A{k} = {number * 97 + k}" for k in range(200)]
    lines += [f"B{k} = {number + k + 0.5}" for k in range(200)]
    file = folder / f"user_{number}.py"
    file.write_text("\n".join(lines))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_cases_do_not_depend_on_literals_of_the_users_file(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_ext.testing.losses.pair_cases", lambda *_, **__: [])

    def drawn():
        seen = Seen(dpo)
        check_loss_invariants(seen, examples=20)
        return seen.calls

    before = drawn()
    for number in (96, 12345):
        monkeypatch.setitem(sys.modules, f"user_{number}", literals_of(tmp_path, number))
        for ours, theirs in zip(before, drawn(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class WritesBackwards(torch.autograd.Function):
    """Changes the reference when the gradient is taken."""

    @staticmethod
    def forward(ctx, logps, ref_logps):
        ctx.save_for_backward(logps)
        ctx.ref = ref_logps
        return dpo(logps, ref_logps)

    @staticmethod
    def backward(ctx, upstream):
        ctx.ref.mul_(1.5)
        return torch.stack((upstream, -upstream), 1), None


CHANGES = {
    "the policy": (check_loss_invariants, lambda c, f: dpo(c.sub_(1), f), {}, "the loss changes `logps`"),
    "the reference": (check_loss_invariants, lambda c, f: dpo(c, f.sub_(1)), {}, "the loss changes `ref_logps`"),
    "the reference, behind autograd": (check_loss_invariants, lambda c, f: dpo(c, f.data.sub_(1)), {}, "the loss changes `ref_logps`"),
    "the reference, on the way back": (check_loss_invariants, WritesBackwards.apply, {}, "the loss changes `ref_logps`"),
    "the reference, and then raises": (check_loss_invariants, lambda c, f: [f.sub_(1)][1], {}, "the loss changes `ref_logps`"),
    "the lengths": (check_loss_invariants, lambda c, f, n: simpo(c, f, n.clamp_(min=2)), {"needs_lengths": True, "reference_free": True}, "the loss changes `lengths`"),
    "the labels": (check_unpaired_loss, lambda c, f, y: sign_kto(c, f, y.logical_not_()), {}, "the loss changes `labels`"),
    "the scores": (check_list_loss, lambda c, f, s: best_first(c, f) * s.softmax(1)[:, 0] + s.mul_(0).sum(), {"needs_scores": True}, "the loss changes `scores`"),
    "the counts": (check_list_loss, lambda c, f, n: best_first(c, f) + n.fill_(2), {"needs_counts": True}, "the loss changes `counts`"),
    "the logits": (check_logps, lambda z, t: sequence_logps(z.sub_(1), t), {}, "the function changes the logits"),
    "the logits, behind autograd": (check_logps, lambda z, t: sequence_logps(z.data.sub_(1) + z, t), {}, "the function changes the logits"),
    "the targets": (check_logps, lambda z, t: (sequence_logps(z, t), t.targets.clamp_(min=0))[0], {}, "the function changes `table.targets`"),
    "the rows": (check_layouts, lambda rows: collate_trl(rows[:1] if rows.pop() else rows), {}, "the collator changes its rows"),
    "the ids": (check_layouts, lambda rows: (collate_trl(rows), rows[0]["chosen_ids"].fill(1))[0], {}, "the collator changes its rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_function_that_changes_its_inputs_is_told_as_that(name):
    check, function, claims, told = CHANGES[name]
    with pytest.raises(AssertionError, match=f"^{told} in place"):
        check(function, **claims)


def test_what_a_changing_function_was_given_is_told_as_it_was(corpus_alone):
    with pytest.raises(AssertionError) as error:
        check_loss_invariants(lambda logps, ref_logps: dpo(logps, ref_logps.fill_(-77.0)))
    assert "-77" not in str(error.value)


EMPTY = {"needs_lengths": True, "reference_free": True}


def test_an_empty_completion_may_be_refused_with_a_value_error_alone(corpus_alone):
    def refusing(error):
        def loss(logps, ref_logps, lengths):
            if bool((lengths == 0).any()):
                raise error
            return simpo(logps, ref_logps, lengths)

        return loss

    check_loss_invariants(refusing(ValueError("empty")), **EMPTY)
    with pytest.raises(AssertionError, match="the loss raised ZeroDivisionError"):
        check_loss_invariants(refusing(ZeroDivisionError("empty")), **EMPTY)


def test_an_empty_prompt_may_be_refused_with_a_value_error_alone(corpus_alone):
    def refusing(error):
        def collate(rows):
            if any(not len(row["prompt_ids"]) for row in rows):
                raise error
            return collate_trl(rows)

        return collate

    check_layouts(refusing(ValueError("empty")))
    with pytest.raises(AssertionError, match="collating and scoring raised KeyError"):
        check_layouts(refusing(KeyError("empty")))


def test_a_loss_is_looked_at_where_a_log_prob_is_exactly_0(corpus_alone):
    with pytest.raises(AssertionError, match="log-prob of pair 0 is exactly 0, the gradient is"):
        check_loss_invariants(lambda logps, ref_logps: dpo(logps * (logps != 0), ref_logps))
    with pytest.raises(
        AssertionError, match="log-prob of pair 0 is exactly 0, the loss jumps from"
    ):
        check_loss_invariants(lambda logps, ref: dpo(logps, ref) * (logps != 0).all(1))


@pytest.mark.slow
def test_a_named_loss_brings_its_flags():
    check_unpaired_loss("kto", parameters={"z": 0.5}, examples=1)
    check_list_loss("nca", examples=1, sizes=(3,))
    with pytest.raises(ValueError, match="found 'ktoo'"):
        check_unpaired_loss("ktoo")
    with pytest.raises(TypeError, match=r"functools\.partial"):
        check_list_loss(best_first, parameters={"beta": 0.1})
