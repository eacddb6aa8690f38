"""What `compat` selects, against the statements about each code base."""

import math
import re
import warnings

import pytest
import torch
from torch.nn.functional import logsigmoid

from dpo_ext.torch import preference_loss
from dpo_ext.torch.losses import compat as loss_compat

G = torch.Generator().manual_seed(3)
LOGPS = -torch.rand(6, 2, generator=G, dtype=torch.float64) * 40
REF = LOGPS + torch.randn(6, 2, generator=G, dtype=torch.float64)
LENGTHS = torch.randint(1, 30, (6, 2), generator=G)
D = (LOGPS - REF)[:, 0] - (LOGPS - REF)[:, 1]


def value(loss, compat, **options):
    return preference_loss(
        LOGPS, REF, lengths=LENGTHS, loss=loss, compat=compat, **options
    ).loss.item()


def explicit(loss, **options):
    return preference_loss(LOGPS, REF, lengths=LENGTHS, loss=loss, **options).loss.item()


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_an_ambiguous_name_is_an_error_that_lists_the_candidates(name):
    with pytest.raises(ValueError, match="`compat`") as error:
        explicit(name)
    for row in {"sigmoid": ("'dpo'", "'cdpo'"), "ipo": ("'ipo_avg'", "'ipo_sum'")}[name]:
        assert row in str(error.value)
    assert "trl-1.16" in str(error.value)


CELLS = [
    ("sigmoid", "trl-1.16", {"beta": 0.3}, "dpo", {"beta": 0.3}),
    ("sigmoid", "trl-0.28", {"label_smoothing": 0.2}, "cdpo", {"label_smoothing": 0.2}),
    ("sigmoid", "openrlhf", {"label_smoothing": 0.2}, "cdpo", {"label_smoothing": 0.2}),
    ("sigmoid", "llamafactory", {"label_smoothing": 0.2}, "cdpo", {"label_smoothing": 0.2}),
    ("sigmoid", "paper", {}, "dpo", {}),
    ("ipo", "trl-1.16", {}, "ipo_avg", {}),
    ("ipo", "trl-0.28", {}, "ipo_avg", {}),
    ("ipo", "openrlhf", {}, "ipo_sum", {}),
    ("ipo", "llamafactory", {"pref_beta": 0.2}, "ipo_avg", {"beta": 0.2}),
    ("ipo", "paper", {}, "ipo_sum", {}),
    ("exo_pair", "trl-1.16", {"label_smoothing": 0.1}, "exo_pair", {"label_smoothing": 0.1}),
    ("exo_pair", "trl-0.28", {}, "exo_pair", {"label_smoothing": 1e-3}),
    ("bco_pair", "trl-1.16", {}, "bco_pair", {"delta": 0.0}),
    ("bco_pair", "trl-0.28", {"delta": 0.4}, "bco_pair", {"delta": 0.4}),
    ("bco_pair", "paper", {"delta": 0.4}, "bco_pair", {"delta": 0.4}),
    ("sft", "openrlhf", {}, "sft", {}),
    ("sft", "llamafactory", {}, "sft", {}),
    ("sigmoid_norm", "trl-1.16", {}, "dpo_norm", {"beta": 0.1}),
    ("aot", "trl-1.16", {}, "aot_paired", {}),
    ("aot", "trl-0.28", {}, "aot_paired", {}),
    ("aot_unpaired", "trl-0.28", {}, "aot_unpaired", {}),
    ("wpo", "trl-1.16", {"aw": 0.3, "al": 0.2}, "wpo", {"aw": 0.3, "al": 0.2, "clamp": 0}),
    ("wpo", "paper", {"aw": 0.3, "al": 0.2}, "wpo", {"aw": 0.3, "al": 0.2, "clamp": 1}),
    ("simpo", "trl-1.16", {"label_smoothing": 0.1, "beta": 2.0}, "simpo", {"label_smoothing": 0.1}),
    ("simpo", "llamafactory", {"beta": 2.0}, "simpo", {}),
    ("orpo", "llamafactory", {"pref_beta": 0.2}, "orpo", {"lam": 0.2, "nll": 1.0}),
    ("orpo", "paper", {}, "orpo", {"nll": 1.0}),
    ("hinge", "trl-1.16", {}, "hinge", {}),
    ("robust", "trl-0.28", {"label_smoothing": 0.1}, "robust", {"label_smoothing": 0.1}),
    ("discopop", "trl-1.16", {"discopop_tau": 0.5}, "discopop", {"tau": 0.5, "beta": 0.1}),
    ("dpo", "trl-1.16", {}, "dpo", {}),
    ("fdpo_js", "paper", {}, "fdpo_js", {}),
]


@pytest.mark.parametrize(("name", "compat", "options", "row", "params"), CELLS, ids=str)
def test_a_name_means_what_its_code_base_computes(name, compat, options, row, params):
    assert math.isclose(value(name, compat, **options), explicit(row, **params), rel_tol=1e-12)


def test_trl_sft_is_a_token_mean_over_the_batch():
    want = -LOGPS[:, 0].sum() / LENGTHS[:, 0].sum()
    for compat in ("trl-1.16", "trl-0.28"):
        assert math.isclose(value("sft", compat), want.item(), rel_tol=1e-12)
    assert not math.isclose(want.item(), explicit("sft"), rel_tol=1e-3)


def test_trl_0_28_ipo_logs_averages_and_every_loss_of_the_list_sees_them():
    averages = LOGPS / LENGTHS
    out = preference_loss(
        LOGPS, REF, loss=["ipo", "sigmoid"], lengths=LENGTHS, compat="trl-0.28", beta=0.2
    )
    u = (LOGPS - REF) / LENGTHS
    want = (u[:, 0] - u[:, 1] - 2.5) ** 2 - logsigmoid(0.2 * (u[:, 0] - u[:, 1]))
    assert math.isclose(out.loss.item(), want.mean().item(), rel_tol=1e-12)
    assert torch.allclose(out.metrics["logps/chosen"], averages[:, 0].mean())
    assert torch.allclose(out.chosen_rewards, 0.2 * u[:, 0])
    stays = preference_loss(LOGPS, REF, loss="ipo", lengths=LENGTHS, compat="trl-1.16")
    assert torch.allclose(stays.metrics["logps/chosen"], LOGPS[:, 0].mean())


def test_trl_0_28_keeps_the_smoothing_that_exo_pair_set():
    got = value(["exo_pair", "sigmoid"], "trl-0.28")
    want = explicit("exo_pair", label_smoothing=1e-3) + explicit("cdpo", label_smoothing=1e-3)
    assert math.isclose(got, want, rel_tol=1e-12)
    got = value(["sigmoid", "exo_pair"], "trl-0.28")
    want = explicit("exo_pair", label_smoothing=1e-3) + explicit("dpo")
    assert math.isclose(got, want, rel_tol=1e-12)


def test_exo_pair_without_smoothing_is_an_error_in_trl_1_16():
    with pytest.raises(ValueError, match="`label_smoothing` must be in \\(0, 1\\), found 0"):
        value("exo_pair", "trl-1.16")


@pytest.mark.parametrize(
    ("compat", "option", "nll"),
    [
        ("trl-0.28", "rpo_alpha", "mean"),
        ("openrlhf", "nll_loss_coef", "row"),
        ("llamafactory", "pref_ftx", "row"),
    ],
)
def test_the_nll_option_adds_the_nll_of_the_chosen_one(compat, option, nll):
    by_row = -(LOGPS[:, 0] / LENGTHS[:, 0]).mean()
    by_token = -LOGPS[:, 0].sum() / LENGTHS[:, 0].sum()
    want = explicit("dpo") + 0.3 * (by_row if nll == "row" else by_token).item()
    assert math.isclose(value("sigmoid", compat, **{option: 0.3}), want, rel_tol=1e-12)


def test_llamafactory_mixes_bco_in():
    w = 0.7
    want = (explicit("dpo") + w * explicit("bco_pair", delta=0.2)) / (1 + w)
    got = value("sigmoid", "llamafactory", pref_bco_weight=w, delta=0.2)
    assert math.isclose(got, want, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("compat", "options", "row", "params"),
    [
        ("trl-1.16", {"f_divergence_type": "alpha_divergence"}, "fdpo_alpha", {"alpha": 0.5}),
        (
            "trl-1.16",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.8},
            "fdpo_alpha",
            {"alpha": 1 - 0.8},
        ),
        (
            "trl-0.28",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.8},
            "fdpo_alpha",
            {"alpha": 0.8},
        ),
        ("trl-1.16", {"f_divergence_type": "forward_kl"}, "fdpo_forward_kl", {}),
        ("trl-0.28", {"f_divergence_type": "js_divergence"}, "fdpo_js", {}),
    ],
)
def test_the_divergence_of_sigmoid_selects_a_row(compat, options, row, params):
    assert math.isclose(value("sigmoid", compat, **options), explicit(row, **params), rel_tol=1e-12)


@pytest.mark.parametrize(
    ("name", "compat", "options", "message"),
    [
        (
            "exo_pair",
            "openrlhf",
            {},
            "openrlhf has no loss 'exo_pair'\nhint: it has ipo, sft, sigmoid",
        ),
        ("ipo_sum", "trl-1.16", {}, "trl-1.16 has no loss 'ipo_sum'"),
        ("sigmoid_norm", "trl-0.28", {}, "trl-0.28 has no loss 'sigmoid_norm'"),
        ("wpo", "trl-0.28", {}, "is not reproduced"),
        ("orpo", "trl-1.16", {}, "is not reproduced"),
        ("sigmoid", "paper", {"label_smoothing": 0.1}, "paper has no option `label_smoothing`"),
        ("simpo", "llamafactory", {"gama": 0.1}, "has no option `gama`"),
        ("bco_pair", "trl-1.16", {"delta": 0.1}, "has no option `delta`"),
        ("bco_pair", "trl-0.28", {}, "needs `delta`"),
        ("sigmoid", "trl-9", {}, "`compat` must be one of 'trl-1.16'"),
        ("hinge", "trl-1.16", {"f_divergence_type": "js_divergence"}, "with loss 'sigmoid'"),
        ("sigmoid", "trl-0.28", {"f_divergence_type": "forward_kl"}, "found 'forward_kl'"),
        ("sigmoid", "trl-1.16", {"f_alpha_divergence_coef": 0.5}, "needs f_divergence_type"),
        ("aot", None, {}, "'aot_paired'"),
    ],
)
def test_what_a_code_base_lacks_is_an_error_that_says_what_it_has(name, compat, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        value(name, compat, **options)


def test_an_ignored_option_warns_once(monkeypatch):
    monkeypatch.setattr(loss_compat, "_warned", set())
    with pytest.warns(UserWarning, match="trl-1.16 ignores `label_smoothing` in 'sigmoid'"):
        got = value("sigmoid", "trl-1.16", label_smoothing=0.3)
    assert got == explicit("dpo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value("sigmoid", "trl-1.16", label_smoothing=0.3)


def test_mpo_is_a_weighted_list():
    got = value(["sigmoid", "bco_pair", "sft"], "trl-1.16", loss_weights=[0.8, 0.2, 1.0], beta=0.2)
    nll = (-LOGPS[:, 0].sum() / LENGTHS[:, 0].sum()).item()
    want = 0.8 * explicit("dpo", beta=0.2) + 0.2 * explicit("bco_pair", beta=0.2, delta=0.0) + nll
    assert math.isclose(got, want, rel_tol=1e-12)
