"""Deliberately wrong losses, log-prob functions and collators, which `dpo_ext.testing` catches, and right ones.

Each wrong one is one edit away from a right one; many have happened in a published code base.
"""

import places
import pytest
import torch
import unusual
import wrong_collators
import wrong_groups
import wrong_logps
import wrong_losses

from dpo_ext.testing import check_layouts, check_logps, check_loss_invariants, search
from dpo_ext.torch import preference_loss, sequence_logps

WRONG = {
    **{f"pairs: {k}": (check_loss_invariants, *v) for k, v in wrong_losses.ALL.items()},
    **wrong_groups.ALL,
    **{f"log-probs: {k}": (check_logps, *v) for k, v in wrong_logps.ALL.items()},
    **{f"layouts: {k}": (check_layouts, *v) for k, v in wrong_collators.ALL.items()},
}

# Not caught, and why. docs/testing.md names them.
MISSED = {
    "pairs: no gradient above a margin of 200": "the gradient is 2e-10, below what finite differences see",
}


@pytest.fixture(autouse=True)
def do_not_shrink(monkeypatch):
    """Catching is the question here; test_testing looks at how the counterexamples read."""
    monkeypatch.setattr(search, "SHRINKS", 0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def some_slow(names, every):
    """All names; `make test-fast` runs one of ``every``."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (k % every > 0))
        for k, name in enumerate(names)
    ]


@pytest.mark.parametrize("name", some_slow([name for name in WRONG if name not in MISSED], 8))
def test_a_wrong_function_is_caught(name):
    check, function, claims = WRONG[name]
    with pytest.raises(AssertionError, match=r"loss|gradient|must|raised|in place|alone|table"):
        check(function, **claims)


@pytest.mark.slow
@pytest.mark.parametrize("name", MISSED)
def test_a_wrong_function_that_is_named_as_missed_is_accepted(name):
    check, function, claims = WRONG[name]
    check(function, **claims)


def test_of_100_wrong_functions_97_are_caught_and_the_page_names_the_others():
    assert len(WRONG) >= 150
    assert len(MISSED) <= 0.03 * len(WRONG)
    page = (places.DOCS / "testing.md").read_text(encoding="utf-8")
    for told in (f"{len(WRONG)} wrong functions", f"{len(unusual.RIGHT)} right functions"):
        assert told in page
    for name in MISSED:
        assert f'"{name.partition(": ")[2]}"' in page


@pytest.mark.parametrize("name", some_slow(unusual.RIGHT, 24))
def test_a_right_function_is_accepted_however_it_is_written(name):
    check, function, claims = unusual.RIGHT[name]
    check(function, **claims, examples=15)


@pytest.mark.slow
def test_the_functions_that_the_wrong_ones_are_made_from_are_right():
    M = wrong_losses.M
    check_loss_invariants(wrong_losses.dpo, **M)
    check_loss_invariants(lambda c, f: preference_loss(c, f).loss, **M)
    check_loss_invariants(lambda c, _, n: wrong_losses.simpo(c, n), **wrong_losses.SIMPO)
    check_loss_invariants(wrong_losses.ipo_avg, **wrong_losses.IPO)
    check_loss_invariants(wrong_losses.above(lambda g: g), **M)
    check_loss_invariants(wrong_losses.below(lambda g, c: g), **M)
    wrong_groups.check_unpaired_loss(wrong_groups.kto, **wrong_groups.KTO)
    wrong_groups.check_list_loss(wrong_groups.ranking, **wrong_groups.R)
    for function in (
        sequence_logps,
        wrong_logps.scored,
        wrong_logps.gather,
        wrong_logps.online(1024),
        wrong_logps.above(lambda g: g),
        wrong_logps.below(lambda g: g),
    ):
        check_logps(function)
    for collate in (
        wrong_collators.laid,
        wrong_collators.edited(lambda i, t, _: (i, t)),
        wrong_collators.renamed(lambda row, k, rows: row),
        wrong_collators.positions(lambda at, i: at),
    ):
        check_layouts(collate)
