"""The table itself: its order, the names of its functions, the words of its flags."""

import inspect

import pytest

from dpo_ext.torch.losses import batch_rows, lists, margin_rows, side_rows, single
from dpo_ext.torch.losses.catalogue import ParameterEntry, losses_table
from dpo_ext.torch.losses.registry import LOSSES
from dpo_ext.torch.losses.row import m_row, plain_row, positive, u_exp_row, u_row

ORDER = [
    "dpo", "dpo_norm", "r_dpo", "odpo", "margin_dpo", "modpo", "hypo", "simpo", "alphapo", "dpop",
    "dpo_shift", "bdpo", "bpo_balanced", "fdpo_forward_kl", "fdpo_js", "fdpo_alpha", "chipo", "tdpo1",
    "tdpo2", "cdpo", "robust", "hinge", "exo_pair", "discopop", "focalpo", "bpo_sba", "rpo_bwd_kl",
    "rpo_fwd_kl", "rpo_sq", "wpo", "ipo_sum", "ipo_avg", "slic", "nca_pair", "bco_pair", "kto_pair_z",
    "sppo_hard", "sppo_soft", "apo_zero", "apo_down", "cpo", "dpo_sft", "orpo", "cal_dpo", "simper", "sft",
    "aot_paired", "aot_unpaired", "dr_dpo", "ld_dpo", "sft_token_mean",
]  # fmt: skip
TABLES = {
    margin_rows: margin_rows.ROWS,
    side_rows: side_rows.ROWS,
    batch_rows: batch_rows.ROWS,
    single: single.UNPAIRED,
    lists: lists.LISTWISE,
}


def test_the_order_of_the_table_stays():
    assert [name for name, row in LOSSES.items() if not row.autograd] == ORDER


def test_every_loss_is_a_function_of_its_name():
    for module, rows in TABLES.items():
        for name, row in rows.items():
            assert row.name == name
            assert inspect.isfunction(getattr(module, name)), name
            assert getattr(module, name).__name__ == name


DECORATORS = pytest.mark.parametrize("decorator", [u_row, u_exp_row, m_row, plain_row])


@DECORATORS
def test_a_flag_is_a_word_that_exists(decorator):
    with pytest.raises(ValueError, match=r"`needs` must be words among reference, .*found 'R'"):
        decorator({}, "L = 0", "nobody", needs="R")
    with pytest.raises(ValueError, match=r"`shape` must be words among only_margin.*'monotone'"):
        decorator({}, "L = 0", "nobody", shape="convex monotone")


@DECORATORS
def test_a_row_has_the_name_of_its_function_and_that_once(decorator):
    rows = {}

    @decorator(rows, "m", "here", needs="reference couples_batch", shape="convex", beta=positive(2))
    def mine(x):
        return x

    row = rows["mine"]
    assert (row.name, row.paper, row.parameters["beta"].default) == ("mine", "here", 2)
    assert (row.reference, row.couples_batch, row.lengths) == (True, True, False)
    assert (row.convex, row.only_margin, row.falls_in_chosen) == (True, False, False)
    with pytest.raises(ValueError, match="there is a row 'mine' already"):
        decorator(rows, "m", "here")(mine)


def test_the_listing_has_each_parameter_with_default_and_domain():
    entries = {entry.name: entry for entry in losses_table()}
    assert list(entries)[: len(ORDER)] == ORDER
    odpo = entries["odpo"]
    assert odpo.parameters == "beta=0.1, alpha=1, score_gap=required, margin=0, label_smoothing=0"
    assert odpo.domains[2] == ParameterEntry("score_gap", None, "> 0", True)
    assert (odpo.needs, odpo.registered) == ("reference, constants of the pair", False)
    assert odpo.shape == "only the margin, falls in chosen, rises in rejected, convex"
    assert entries["cdpo"].domains[-1].name == "margin"  # declared, not added by name
    assert entries["hinge"].parameters == "beta=0.1"
    assert entries["dr_dpo"].needs == "reference, the whole batch"
    assert not entries["dr_dpo"].domains[0].per_pair
    assert (entries["kto"].function, entries["nca"].function) == ("unpaired_loss", "list_loss")
