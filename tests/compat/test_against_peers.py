"""Every function of `dpo_ext.compat` against the peer's own, out of its wheel.

Values, shapes, dtypes, which outputs carry a gradient, and the gradients by logits, hidden states,
weight and bias: of 500 draws a quarter a run, all in `make deep`. Signatures too.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import sampled
import torch
import wheels
from compat_cases import (
    LLAMAFACTORY,
    OPEN_INSTRUCT,
    OPENRLHF,
    ORIGINAL,
    TORCH,
    TORCHTUNE,
    TRL,
    TRL_115,
    TRL_HEAD,
    VERL,
    Draw,
    compare_with,
    draw_batch,
    head_without_names,
    module,
    run,
)
from liger_cases import LIGER, LIGER_OLD
from liger_cases import module as liger_module

from dpo_ext import compat
from dpo_ext.compat import dpo as original
from dpo_ext.compat import liger, llamafactory, open_instruct, openrlhf, torchtune, trl, verl
from dpo_ext.compat import torch as compat_torch
from dpo_ext.compat.swaps import misfit

DRAWS = 500


def each(*names):
    """Every unpacked version of a peer, or one skipped test."""
    found = [wheel for name in names for wheel in wheels.wheels(name)]
    skip = pytest.param(None, marks=pytest.mark.skip(reason=wheels.NO_PEERS))
    return pytest.mark.parametrize("wheel", found or [skip], ids=str)


def number(wheel):
    return tuple(int(part) for part in wheel.version.split(".")[:2])


def compare_all(cases, theirs):
    done = 0
    for case in cases:
        if case.name in theirs:
            compare_with(case, theirs[case.name], sampled.seeds(DRAWS))
            done += 1
    assert done


def same_parameters(theirs, ours):
    """Name, kind and default of each."""
    a, b = (list(inspect.signature(f).parameters.values()) for f in (theirs, ours))
    assert [(p.name, p.kind, p.default) for p in a] == [(p.name, p.kind, p.default) for p in b]


@each("trl")
def test_trl(wheel):
    theirs = wheels.trl_functions(wheel)
    newer = number(wheel) >= (1, 15)
    draws = TRL if number(wheel) >= (0, 29) else (one_token(TRL[0]), TRL[1])
    compare_all(TRL_115 if newer else draws, theirs)
    for name in (
        "selective_log_softmax",
        "entropy_from_logits",
        "selective_log_softmax_and_entropy",
    ):
        if name in theirs:
            assert misfit(theirs[name], getattr(trl, name)) is None
            if newer:
                same_parameters(theirs[name], getattr(trl, name))


def one_token(case):
    """Before 0.29 an index of K tokens a row was no argument."""

    def draw(d):
        args = case.draw(d)
        if args["index"].dim() == args["logits"].dim():
            args["index"] = args["index"][..., 0]
        return args

    return case._replace(draw=draw)


@each("trl")
def test_trl_head(wheel):
    theirs = wheels.trl_functions(wheel).get("_ChunkedLogProbFunction")
    kernels = wheels.trl_kernels(wheel)
    if kernels is None and theirs is None:
        pytest.skip("this version has no fused head that runs without Triton")
    if kernels is not None:
        compare_with(TRL_HEAD, head_without_names(kernels.apply), sampled.seeds(DRAWS))
        assert misfit(kernels, trl.ChunkedLogProbFunction) is None
        return
    biased = "bias" in inspect.signature(theirs.forward).parameters
    ours = trl.ChunkedLogProbFunction1_13 if biased else trl.ChunkedLogProbFunction1_5
    assert misfit(theirs, ours) is None
    assert misfit(theirs, trl.ChunkedLogProbFunction) is not None or biased

    def draw(d):
        args = {k: v for k, v in TRL_HEAD.draw(d).items() if k != "outputs"}
        if not biased:
            del args["bias"]
        return args

    def slow(**args):
        out = TRL_HEAD.slow(**in_order(args))
        return out[0], out[1] if biased else without_slope(out[0], out[1])

    grads = TRL_HEAD.grads if biased else TRL_HEAD.grads[:2]
    case = TRL_HEAD._replace(ours=head_without_names(ours.apply), slow=slow, draw=draw, grads=grads)
    compare_with(case, head_without_names(theirs.apply), sampled.seeds(DRAWS))


def in_order(args):
    return {"hidden": args["hidden"], "weight": args["weight"], "bias": args.get("bias"), **args}


def without_slope(logps, entropy):
    return entropy.detach() + (logps - logps).where(torch.zeros_like(logps) > 0, 0.0 * logps.sum())


@each("trl")
def test_trl_online_dpo(wheel):
    theirs = wheels.trl_online(wheel)
    assert theirs is not None
    assert misfit(theirs, trl.online_dpo_forward) is None
    pictures = "vision_inputs" in inspect.signature(theirs).parameters
    for seed in sampled.seeds(40):
        d = Draw(seed)
        B, P, C, V = d.int(1, 3), d.int(1, 5), d.int(1, 5), 11
        weight = d.normal(40, V)
        seen = []

        def model(ids, weight=weight, seen=seen, **more):
            seen.append(more)
            return SimpleNamespace(logits=weight[ids])

        args = {
            "prompt_ids": d.ids(40, B, P),
            "prompt_mask": torch.ones(B, P, dtype=torch.int64),
            "completion_ids": d.ids(V, B, C),
            "completion_mask": torch.ones(B, C, dtype=torch.int64),
        }
        me = SimpleNamespace(max_length=d.of(4, 6, 100) + C)
        if pictures and d.int(0, 1) and me.max_length >= P + C:
            args["vision_inputs"] = {"pixel_values": torch.zeros(1), "other": torch.zeros(1)}
        a, b = theirs(me, model, **args), trl.online_dpo_forward(me, model, **args)
        torch.testing.assert_close(a, b, rtol=2e-2 if d.dtype.itemsize == 2 else 1e-5, atol=1e-5)
        assert a.dtype == b.dtype
        assert [sorted(more) for more in seen[:1]] == [sorted(more) for more in seen[1:]]


@each("llamafactory")
def test_llamafactory(wheel):
    theirs = wheels.llamafactory_functions(wheel)
    compare_all(LLAMAFACTORY, theirs)
    same_parameters(theirs["get_batch_logps"], llamafactory.get_batch_logps)


@each("openrlhf")
def test_openrlhf(wheel):
    theirs = wheels.openrlhf_functions(wheel)
    same_parameters(theirs["log_probs_from_logits"], openrlhf.log_probs_from_logits)
    same_module(theirs["DPOLoss"], openrlhf.DPOLoss)
    calls = {
        "log_probs_from_logits": lambda **a: theirs["log_probs_from_logits"](
            labels=a.pop("index"), **a
        ),
        "DPOLoss": module(theirs["DPOLoss"], "beta", "label_smoothing", "ipo"),
    }
    compare_all(OPENRLHF, calls)


def same_module(theirs, ours):
    same_parameters(theirs.__init__, ours.__init__)
    same_parameters(theirs.forward, ours.forward)


@each("verl")
def test_verl(wheel):
    theirs = wheels.verl_functions(wheel)["logprobs_from_logits"]
    same_parameters(theirs, verl.logprobs_from_logits)
    compare_all(VERL, {"logprobs_from_logits": lambda logits, index: theirs(logits, index)})


@each("torchtune")
def test_torchtune(wheel):
    theirs = wheels.torchtune_functions(wheel)
    same_parameters(theirs["get_batch_log_probs"], torchtune.get_batch_log_probs)
    same_module(theirs["DPOLoss"], torchtune.DPOLoss)
    loss = module(theirs["DPOLoss"], "beta", "label_smoothing")
    cases = TORCHTUNE
    if number(wheel) < (0, 6):  # its average is that of the original code: no 1e-8
        batch, pairs = TORCHTUNE
        cases = (batch._replace(draw=draw_batch), pairs)
    compare_all(cases, {**theirs, "DPOLoss": loss})


@each("open_instruct")
def test_open_instruct(wheel):
    theirs = wheels.open_instruct_functions(wheel)
    for case in OPEN_INSTRUCT:
        same_parameters(theirs[case.name], getattr(open_instruct, case.name))
    compare_all(OPEN_INSTRUCT, theirs)


@each("direct-preference-optimization")
def test_the_original(wheel):
    theirs = wheels.original_functions(wheel)
    for case in ORIGINAL:
        same_parameters(theirs[case.name], getattr(original, case.name))
    compare_all(ORIGINAL, theirs)


@each("liger_kernel")
def test_liger(wheel):
    theirs = wheels.liger_modules(wheel)
    newest = number(wheel) >= (0, 8)
    for case in LIGER if newest else LIGER_OLD:
        cls = theirs[case.name]
        assert misfit(cls, getattr(liger, case.name)) is None or not newest
        if newest:
            same_module(cls, getattr(liger, case.name))
        compare_with(case, liger_module(cls), sampled.seeds(DRAWS))


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="torch has no such function"
)
def test_torch():
    theirs = torch.nn.functional.linear_cross_entropy
    same_parameters(theirs, compat_torch.linear_cross_entropy)
    compare_all(TORCH, {"linear_cross_entropy": theirs})


def test_the_installed_trl_too():
    utils = pytest.importorskip("trl.trainer.utils")
    same_parameters(utils.selective_log_softmax, trl.selective_log_softmax)
    assert set(compat.PEERS) >= {"trl", "liger"}
    out, grads = run(utils.selective_log_softmax, TRL_115[0].draw(Draw(0)), ("logits",))
    ours, our_grads = run(trl.selective_log_softmax, TRL_115[0].draw(Draw(0)), ("logits",))
    torch.testing.assert_close(out, ours)
    torch.testing.assert_close(grads, our_grads)
