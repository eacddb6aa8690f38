"""Bad input of every loss of the table: a typed error that names the parameter and what was expected."""

import math
import re

import pytest
import torch
from loss_cases import BUILT_IN, COUPLED, LISTS, SCORED, SINGLE, arrays_of, batch_of, parameters_of

from dpo_ext import TensorError
from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    list_loss,
    preference_loss,
    unpaired_loss,
)
from dpo_ext.torch.losses.lists import LISTWISE
from dpo_ext.torch.losses.registry import LOSSES
from dpo_ext.torch.losses.single import UNPAIRED

PAIRS = 3
OUTSIDE = {
    "> 0": [0.0, -0.5, math.inf], ">= 0": [-0.5, math.inf], "finite": [math.inf], "not 0": [0.0],
    "in (0, 1)": [0.0, 1.0], "in [0, 1]": [-0.1, 1.1], "in [0, 0.5)": [0.5, -0.1], "0 or 1": [2.0],
}  # fmt: skip
NAMES = pytest.mark.parametrize("name", BUILT_IN)


def call(name, **changes):
    logps, ref, lengths = batch_of(PAIRS)
    given = {"logps": logps, "ref_logps": ref, "lengths": lengths, **parameters_of(name)}
    return preference_loss(**{**given, "loss": name, **changes})


def refused(kind, message, name, **changes):
    with pytest.raises(kind, match=re.escape(message)):
        call(name, **changes)


@NAMES
def test_wrong_tensors(name):
    logps, ref, lengths = batch_of(PAIRS)
    row = LOSSES[name]
    for bad in (logps[:, :1], logps.bfloat16(), logps.long(), logps[0], torch.zeros(3, 3)):
        refused(TensorError, "`logps` must be float32 or float64 of shape (N, 2)", name, logps=bad)
    for bad in (ref[:2], ref.double(), ref[:, :1]):
        refused(TensorError, "`ref_logps` must be float32 of shape (3, 2)", name, ref_logps=bad)
    refused(TensorError, "`ref_logps` must be on cpu", name, ref_logps=ref.to("meta"))
    asks = ref.clone().requires_grad_()
    refused(TensorError, "`ref_logps` asks for a gradient", name, ref_logps=asks)
    refused(TypeError, "`logps` must be a torch tensor", name, logps=logps.numpy())
    refused(TypeError, "`ref_logps` must be a torch tensor", name, ref_logps=1.0)
    for bad in (lengths[:1], lengths[:, 0], lengths.bool()):
        refused(TensorError, "`lengths` must be integers of shape (3, 2)", name, lengths=bad)
    refused(TensorError, "`lengths` must be on cpu", name, lengths=lengths.to("meta"))
    refused(TypeError, "`lengths` must be a torch tensor", name, lengths=lengths.tolist())
    refused(TensorError, "pair 0: `lengths` must be >= 1", name, lengths=lengths * 0)
    if row.reference:
        refused(TensorError, "`ref_logps` is missing", name, ref_logps=None)
    if row.lengths:
        refused(TensorError, "`lengths` is missing", name, lengths=None)


@NAMES
def test_nan_log_probs_are_told_with_their_place(name):
    row = LOSSES[name]
    for tensor in ("logps", "ref_logps") if row.reference else ("logps",):
        # what `sft` and its like do not read may be anything
        for side, word in enumerate(("chosen", "rejected")[: 1 if name.startswith("sft") else 2]):
            values = batch_of(PAIRS)[tensor == "ref_logps"]
            values[1, side] = math.nan
            message = f"pair 1: `{tensor}` must not be NaN, found NaN for {word}"
            refused(TensorError, message, name, **{tensor: values})


@NAMES
def test_every_parameter_has_its_domain(name):
    for key, parameter in LOSSES[name].parameters.items():
        good = arrays_of(name, PAIRS)[key]
        for bad in (*OUTSIDE[parameter.domain], math.nan):
            refused(ValueError, f"`{key}` must be {parameter.domain}, found", name, **{key: bad})
            if parameter.per_pair:
                values = good.clone()
                values[1] = bad
                message = f"pair 1: `{key}` must be {parameter.domain}, found"
                refused(ValueError, message, name, **{key: values})
        refused(TypeError, f"`{key}` must be one number", name, **{key: "a"})
        if parameter.per_pair:
            refused(
                TensorError, f"`{key}` must be a number or of shape (3,)", name, **{key: good[:2]}
            )
            refused(TensorError, f"`{key}` must be on cpu", name, **{key: good.to("meta")})
            if key not in LOSSES[name].differentiable:
                asks = good.clone().requires_grad_()
                refused(TensorError, f"`{key}` asks for a gradient", name, **{key: asks})
        else:
            message = f"`{key}` must be {parameter.domain} for all pairs, found an array"
            refused(ValueError, message, name, **{key: torch.full((PAIRS,), 0.5)})


@NAMES
def test_missing_and_unknown_parameters(name):
    row, given = LOSSES[name], parameters_of(name)
    refused(ValueError, f"loss {name!r} has no parameter `gama`", name, gama=1.0)
    logps, ref, lengths = batch_of(PAIRS)
    for key, parameter in row.parameters.items():
        if parameter.default is None:
            rest = {k: v for k, v in given.items() if k != key}
            with pytest.raises(ValueError, match=re.escape(f"loss {name!r} needs `{key}`")):
                preference_loss(logps, ref, loss=name, lengths=lengths, **rest)


@NAMES
def test_weights_counts_and_groups(name):
    if name in COUPLED:
        refused(ValueError, "it does not take `weight`", name, weight=torch.ones(PAIRS))
        refused(ValueError, "it does not take `num_pairs`", name, num_pairs=6)
    else:
        refused(ValueError, "pair 1: `weight` must be >= 0", name, weight=[1.0, -1.0, 1.0])
        refused(TensorError, "`weight` must be a number or of shape (3,)", name, weight=[1.0])
        refused(ValueError, "`num_pairs` must be > 0", name, num_pairs=0)
        refused(ValueError, "`num_pairs` must be > 0", name, num_pairs=math.nan)
    refused(TypeError, '`group` must be a process group or "local"', name, group="all")
    refused(ValueError, "`compat` must be one of", name, compat="trl")
    refused(ValueError, "`loss_weights` needs a list", name, loss_weights=[1.0])


@pytest.mark.parametrize("name", COUPLED)
def test_the_pairwise_plan_of_a_loss_of_the_batch_is_refused(name):
    table = ScoreTable(logit_rows=[0, 1], targets=[1, 2], seq_offsets=[0, 1, 2])
    hidden, weight = torch.zeros(2, 3), torch.zeros(4, 3, requires_grad=True)
    with pytest.raises(
        ValueError, match=rf'`plan="pairwise"` needs another loss: {name!r} couples'
    ):
        linear_preference_loss(hidden, weight, table, torch.zeros(1, 2), loss=name, plan="pairwise")


def of_group(name):
    """A call, its row and what it needs."""
    if name in SINGLE:
        params = {"kto": {"z": 0.5}, "bco": {"delta": 0.1}}.get(name, {})
        args = (torch.zeros(PAIRS) - 1, torch.zeros(PAIRS) - 1, torch.tensor([1, 0, 1]))
        return unpaired_loss, args, UNPAIRED[name], {"loss": name, **params}
    scores = {"scores": torch.zeros(PAIRS, 4)} if name in SCORED else {}
    args = (torch.zeros(PAIRS, 4) - 1, torch.zeros(PAIRS, 4) - 1)
    return list_loss, args, LISTWISE[name], {"loss": name, **scores}


@pytest.mark.parametrize("name", [*SINGLE, *LISTS])
def test_losses_of_single_completions_and_of_lists(name):
    function, args, row, given = of_group(name)

    def wrong(kind, message, *arguments, **changes):
        with pytest.raises(kind, match=re.escape(message)):
            function(*(arguments or args), **{**given, **changes})

    function(*args, **given)
    nan = args[0].clone()
    nan[1] = math.nan
    wrong(TensorError, "example 1: the loss is NaN", nan, *args[1:])
    wrong(TensorError, "`logps` must be float32 or float64", args[0].bfloat16(), *args[1:])
    wrong(TensorError, "the reference's `logps` must be", args[0], args[1].double(), *args[2:])
    wrong(TensorError, "the reference's `logps` must be", args[0], args[1][:2], *args[2:])
    wrong(ValueError, "has no parameter `gama`", gama=1.0)
    wrong(ValueError, "pair 1: `weight` must be >= 0", weight=[1.0, -1.0, 1.0])
    for key, parameter in row.parameters.items():
        for bad in (*OUTSIDE[parameter.domain], math.nan):
            wrong(ValueError, f"`{key}` must be {parameter.domain}, found", **{key: bad})
        wrong(TensorError, f"`{key}` must be a number or of shape (3,)", **{key: torch.ones(2)})
        wrong(TypeError, f"`{key}` must be one number", **{key: "a"})
