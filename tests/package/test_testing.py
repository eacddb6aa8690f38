"""`dpo_ext.testing` accepts what is right, and what it raises can be pasted."""

import json
import math
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import places
import pytest
import torch
from collators import collate_packed, collate_trl
from hypothesis import given
from loss_cases import BUILT_IN, FINITE_UP_TO, parameters_of
from torch.nn.functional import logsigmoid

from dpo_ext.testing import (
    bradley_terry_world,
    check_layouts,
    check_logps,
    check_loss_invariants,
    logits,
    pair_logps,
    pairs,
    score_tables,
    texts,
)
from dpo_ext.torch import ScoreTable, preference_loss, sequence_logps
from dpo_ext.torch.losses.registry import LOSSES

WORLD = json.loads((places.GOLDEN / "golden_world.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_loss_of_the_table_keeps_the_invariants_and_its_flags(name):
    check_loss_invariants(
        name,
        parameters=parameters_of(name),
        finite_up_to=FINITE_UP_TO.get(name, 1e4),
        examples=20,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "cdpo", "ipo_sum", "simpo", "kto_pair_z", "dpop"])
def test_flags_that_a_loss_does_not_have_are_refuted(name):
    row, parameters = LOSSES[name], parameters_of(name)
    for flag, has in {
        "only_margin": row.only_margin,
        "monotone": row.falls_in_chosen and row.rises_in_rejected,
        "convex": row.convex,
    }.items():
        if not has:
            with pytest.raises(AssertionError, match=f"^{flag}: "):
                check_loss_invariants(name, parameters=parameters, **{flag: True})


def dpo(logps, ref_logps):
    ratios = logps - ref_logps
    return -logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "claims"),
    [
        (dpo, {"only_margin": True, "monotone": True, "convex": True, "step0": math.log(2), "bounds": (0, None), "swap": lambda d: -0.1 * d}),
        (lambda logps, ref: dpo(logps, ref).mean(), {"only_margin": True, "monotone": True}),
        (lambda logps, ref: ((logps - ref) @ logps.new_tensor([1.0, -1.0]) - 5) ** 2, {"only_margin": True, "convex": True, "swap": lambda d: -20 * d}),
        (lambda logps, ref: (1 - 0.1 * ((logps - ref)[:, 0] - (logps - ref)[:, 1])).relu(), {"only_margin": True, "monotone": True, "step0": 1.0}),
        (lambda logps, _, n: -logsigmoid(2 * (logps / n.clamp(min=1)) @ logps.new_tensor([1.0, -1.0]) - 0.5), {"reference_free": True, "needs_lengths": True, "monotone": True}),
        (lambda logps, _: -logps[:, 0], {"reference_free": True, "monotone": True, "convex": True}),
        (lambda logps, ref: -torch.logsumexp(-dpo(logps, ref), 0) + math.log(len(logps)), {"couples_batch": True, "only_margin": True}),
    ],
    ids=["dpo", "mean", "ipo", "hinge", "simpo", "nll", "coupled"],
)  # fmt: skip
def test_right_losses_of_a_user_are_accepted(loss, claims):
    check_loss_invariants(loss, **claims)


def test_a_counterexample_can_be_pasted_and_fails_again():
    def wrong(logps, ref_logps):
        return dpo(logps, ref_logps) * (1 + (logps[:, 0] < logps[:, 1]))

    with pytest.raises(AssertionError) as error:
        check_loss_invariants(wrong, only_margin=True, step0=math.log(2))
    message, _, code = str(error.value).partition("\n\n")
    assert "at policy == reference" in message
    names = {"loss": wrong}
    *lines, call = code.splitlines()
    exec("\n".join([*lines, f"got = {call}"]), names)
    assert names["logps"].shape == (1, 2)  # shrunk to one pair
    assert abs(names["got"].item() - math.log(2)) > 0.1


def pasted(error):
    """What the pasted lines of a message leave behind; ``got`` is the value of the last one."""
    _, _, code = str(error.value).partition("\n\n")
    *lines, call = code.splitlines()
    return "\n".join([*lines, f"got = {call}"])


@pytest.mark.slow
def test_counterexamples_of_log_probs_and_layouts_can_be_pasted():
    def doubled(logits, table):
        return 2 * sequence_logps(logits, table)

    with pytest.raises(AssertionError, match="must be") as error:
        check_logps(doubled)
    names = {"function": doubled}
    exec(pasted(error), names)
    right = sequence_logps(names["logits"], names["table"])
    assert not torch.equal(names["got"], right)

    def cut(rows):
        return collate_trl([{**r, "prompt_ids": r["prompt_ids"][:1]} for r in rows])

    with pytest.raises(AssertionError, match="the log-prob alone is") as error:
        check_layouts(cut)
    names = {"collate": cut}
    exec(pasted(error), names)
    inputs, _ = names["got"]
    longest = max(
        len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"]))
        for r in names["rows"]
    )
    assert inputs["input_ids"].shape[1] < longest


@pytest.mark.slow
def test_the_same_search_finds_the_same_counterexample():
    messages = []
    for _ in range(2):
        with pytest.raises(AssertionError) as error:
            check_loss_invariants(lambda logps, ref: -dpo(logps, ref), monotone=True)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_parameters_need_a_name():
    with pytest.raises(TypeError, match=r"functools\.partial"):
        check_loss_invariants(dpo, parameters={"beta": 0.1})
    with pytest.raises(ValueError, match="unknown loss 'dpoo'"):
        check_loss_invariants("dpoo")


def test_sequence_logps_is_the_definition():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if (
            dtype == torch.float16
        ):  # 3e4 + 1/64 and -1e4 differ in float16; the definition reads the rounded ones
            check_logps(sequence_logps, dtype=dtype, examples=25)
        else:
            check_logps(sequence_logps, dtype=dtype, examples=40)


@pytest.mark.parametrize(
    "collate",
    [collate_trl, lambda rows: collate_trl(rows, "left"), collate_packed],
    ids=["right", "left", "packed"],
)
def test_right_collators_are_accepted(collate):
    check_layouts(collate)


def test_our_padded_batches_keep_the_log_probs():
    data = pytest.importorskip("dpo_ext.data.dataset")

    def collate(rows):
        fields = (
            [row[key].tolist() for row in rows]
            for key in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        dataset = data.PairDataset.from_ids(*fields, vocab_size=97)
        (batch,) = dataset.plan(layout="padded", pairs_per_batch=len(rows), shuffle=False)
        return dict(batch.model_inputs), batch.table

    check_layouts(collate, examples=30)


def test_the_world_is_the_golden_one():
    world = bradley_terry_world()
    golden = WORLD["integer_bt_world"]
    assert list(world.strengths) == golden["strengths_a"]
    assert [16 * r for r in world.reference] == golden["pi_ref_weights"]
    assert len(world.pairs()) == 45
    assert math.isclose(world.loss_floor(), golden["loss_floor"], rel_tol=1e-15)
    for key, optimum in golden["optima"].items():
        beta = Fraction(key.removeprefix("beta="))
        assert world.optimum(beta) == [float(Fraction(p)) for p in optimum["pi_star"]]
        shifted = float(beta) * (1 + 1e-12)  # the road of logarithms
        assert np.allclose(world.optimum(shifted), world.optimum(beta), rtol=1e-9)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25])
def test_dpo_trains_to_the_known_optimum(beta):
    world = bradley_terry_world()
    world.check("dpo", beta=beta, tolerance=1e-8)
    world.check(
        lambda logps, ref: dpo(logps * beta / 0.1, ref * beta / 0.1), beta=beta, tolerance=1e-8
    )
    got = world.train(
        "dpo", beta=beta, logps=sequence_logps, dtype=torch.float32, optimizer="descent"
    )
    assert max(abs(g - w) for g, w in zip(got, world.optimum(beta), strict=True)) <= 2e-7


@pytest.mark.parametrize("wrong", ["reference left out", "sides swapped", "ipo_sum"])
def test_the_world_refuses_another_optimum(wrong):
    losses = {
        "reference left out": lambda logps, _: dpo(5 * logps, torch.zeros_like(logps)),
        "sides swapped": lambda logps, ref: dpo(5 * logps.flip(1), 5 * ref.flip(1)),
        "ipo_sum": "ipo_sum",
    }
    with pytest.raises(AssertionError, match="the trained policy must be"):
        bradley_terry_world().check(losses[wrong])


@given(pair_logps())
def test_drawn_log_probs_are_below_0_and_exact_in_float32(case):
    for t in (case.logps, case.ref_logps):
        assert (t < 0).all()
        assert torch.equal(t.float().double(), t)
    assert (case.lengths >= 1).all()


@given(pairs(vocab_size=11, pad_id=0))
def test_drawn_pairs_are_token_ids(row):
    for ids in row.values():
        assert ids.dtype == np.int32
        assert len(ids) >= 1
        assert ((ids >= 0) & (ids < 11)).all()


@given(texts(max_size=30))
def test_drawn_texts_are_encodable(text):
    assert len(text) <= 30
    text.encode("utf-8")


@given(logits().flatmap(lambda z: score_tables(*z.shape)))
def test_drawn_tables_are_accepted_by_the_table(table):
    assert isinstance(table, ScoreTable)


@pytest.mark.slow
def test_it_says_which_extra_is_missing():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import dpo_ext\n"
        "assert 'torch' not in sys.modules and 'dpo_ext.testing' not in sys.modules\n"
        "from dpo_ext.testing import check_loss_invariants, bradley_terry_world\n"
        "bradley_terry_world().optimum(1)\n"
        "check_loss_invariants('dpo')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.search(
        r"ModuleNotFoundError: dpo_ext.testing needs hypothesis\nhint: .*\[testing\]", run.stderr
    ), run.stderr


def test_a_registered_loss_is_checked_under_its_flags():
    from dpo_ext.torch import register_loss

    name = "shifted_dpo_of_this_test"
    register_loss(name, lambda logps, ref: dpo(logps, ref) + logps[:, 0] ** 2, only_margin=True)
    try:
        with pytest.raises(AssertionError, match="only_margin"):
            check_loss_invariants(name)
        assert preference_loss(
            torch.zeros(1, 2), torch.zeros(1, 2), loss=name
        ).loss.item() == pytest.approx(math.log(2))
    finally:
        del LOSSES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUILT_IN if "margin" in LOSSES[name].parameters])
def test_margin_and_label_smoothing_move_value_and_gradient_alike(name):
    parameters = {**parameters_of(name), "margin": 0.3, "label_smoothing": 0.2}

    def loss(logps, ref_logps, lengths):
        return preference_loss(logps, ref_logps, loss=name, lengths=lengths, **parameters).per_pair

    reach = FINITE_UP_TO.get(name, 1e4)
    free = not LOSSES[name].reference
    needs = {"needs_lengths": True} if LOSSES[name].lengths else {}
    function = loss if needs else lambda logps, ref: loss(logps, ref, None)
    check_loss_invariants(function, reference_free=free, finite_up_to=reach, examples=8, **needs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*")
def test_check_layouts_takes_a_model_and_tells_which_layout_it_breaks():
    transformers = pytest.importorskip("transformers")
    import tiny

    model = tiny.model(vocab_size=31, pad_token_id=None, eos_token_id=None).train()
    check_layouts(model, examples=8)
    assert model.training
    with pytest.raises(ValueError, match="`model` belongs to a collator"):
        check_layouts(model, model=model)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2)
    other = transformers.GPT2LMHeadModel(config)
    check_layouts(other, layouts=["padded"], examples=8)
    forward = other.forward
    other.forward = lambda position_ids=None, **inputs: forward(**inputs)
    with pytest.raises(AssertionError, match=r"layout='packed'") as error:
        check_layouts(other, layouts=["padded", "packed"], examples=8)
    names = {}
    exec(pasted(error), names)
    assert names["got"].n_pairs == len(names["rows"])
