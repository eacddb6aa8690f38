"""Implementations and plans agree over random batches, give log 2 at the reference, and ignore no option."""

import math

import numpy as np
import pytest
import torch
from logps_cases import HOWS, IMPLS, device_of, random_case
from sampled import seeds

from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    preference_loss,
    sequence_logps,
)
from dpo_ext.torch.logps import cuda as kernels

PLANS = ["frozen", "recompute"]
LOG2 = math.log(2)


def check_batch(logits, table, upstream, how, got_value, got_grad):
    """Against the twin in float64 on the same logits, which test_logps holds against the oracle."""
    x = logits.double().requires_grad_()
    value = sequence_logps(x, table, impl="torch", **how)
    (grad,) = torch.autograd.grad(value, x, upstream.double())
    torch.testing.assert_close(got_value.double(), value.detach(), rtol=1e-5, atol=2e-5)
    # one rounding of the dtype, at most half a unit of its last place, is all that is lost
    relative = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[logits.dtype]
    largest = float(grad.abs().max()) if grad.numel() else 0.0
    smallest = 2e-6 * largest + (2**-24 if logits.dtype == torch.float16 else 1e-9)
    torch.testing.assert_close(got_grad.double(), grad, rtol=relative * 1.001, atol=smallest)


def random_batch(seed):
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    V = (1, 2, 7, 8, 9, 33, 64, 130)[seed // 3 % 8]
    logits, table = random_case(seed, V=V, dtype=dtype, weights=seed % 2 == 0, spread=3.0)
    upstream = torch.randn(
        table.n_groups, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )
    return logits, table, upstream, HOWS[seed % len(HOWS)]


@pytest.mark.fault("K17")
@pytest.mark.parametrize(("impl", "count"), [("cpu", 4500), ("torch", 2000)])
def test_thousands_of_random_batches_agree_with_float64(impl, count):
    """With the host-compiled CUDA kernels and the plans below: 10,000, a quarter of them a run."""
    for seed in seeds(count):
        logits, table, g, how = random_batch(seed)
        inplace = impl == "cpu" and seed % 4 == 0
        x = logits.clone().requires_grad_()
        value = sequence_logps(x * 1, table, impl=impl, inplace_grad=inplace, **how)
        (grad,) = torch.autograd.grad(value, x, g)
        check_batch(logits, table, g, how, value.detach(), grad)


@pytest.mark.fault("K17")
def test_random_batches_through_the_cuda_kernels_on_the_host_agree_with_float64(emulator):
    for seed in seeds(500):
        logits, table, g, how = random_batch(seed)
        transform = (
            how.get("logit_scale", 1.0),
            how.get("softcap", 0.0),
            how.get("temperature", 1.0),
        )
        scored = table.without_zero_weights()
        parts = (scored.logit_rows, scored.targets)
        scores = kernels.token_stats(logits, *parts, *transform, seed % 2 == 0)
        sums = kernels.segment_sum(scores[0], table.weights, table.seq_offsets)
        f = np.diff(table.seq_offsets.numpy())
        upstream = g.flatten().repeat_interleave(torch.from_numpy(f))
        if table.weights is not None:
            upstream = upstream * table.weights
        dz = torch.empty_like(logits)
        kernels.logits_grad(logits, *parts, *scores[1:3], upstream, *transform, dz)
        check_batch(logits, table, g, how, sums.view(-1, 2), dz)


@pytest.mark.fault("K17")
@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("plan", [*PLANS, "pairwise"])
def test_random_heads_agree_with_float64(impl, plan):
    for seed in seeds(500):
        rng = torch.Generator().manual_seed(seed)
        logits, table, _, how = random_batch(seed)
        V, with_bias = logits.shape[1], seed % 3 == 0
        shapes = [(len(logits), 4), (V, 4)] + [(V,)] * with_bias
        parts = [torch.randn(s, generator=rng) for s in shapes]
        ref = torch.randn(table.n_groups, 2, generator=rng)
        results = []
        for dtype, kind, its_plan in (
            (torch.float32, impl, plan),
            (torch.float64, "torch", "recompute"),
        ):
            x, w, *b = (p.to(dtype, copy=True) for p in parts)
            leaves = [p.requires_grad_() for p in ([x] if plan == "frozen" else [x, w, *b])]
            out = linear_preference_loss(
                *(x, w, table, ref.to(dtype)),
                bias=b[0] if b else None,
                plan="recompute" if plan == "frozen" and dtype == torch.float64 else its_plan,
                impl=kind,
                chunk_rows=1 + seed % 5,
                **how,
            )
            results.append((out.loss.detach(), *torch.autograd.grad(out.loss, leaves)))
        for got, expected in zip(*results, strict=True):
            largest = float(expected.abs().max()) if expected.numel() else 0.0
            torch.testing.assert_close(
                got.double(), expected, rtol=1e-5, atol=2e-5 * max(largest, 1e-2)
            )


# ---- K18: log 2, and options --------------------------------------------------------------------


def head(seed=3):
    logits, table = random_case(seed, V=9, S=4, longest=4)
    rng = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(len(logits), 6, generator=rng), torch.randn(9, 6, generator=rng)
    return hidden, weight, torch.randn(9, generator=rng), table


@pytest.mark.fault("K18")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", ["logits", *PLANS, "pairwise"])
def test_a_policy_that_equals_its_reference_has_the_loss_log_2(impl, plan):
    hidden, weight, _, table = (p.to(device_of(impl)) for p in head())
    if plan == "pairwise":
        weight.requires_grad_()
    with torch.no_grad():
        ref = linear_sequence_logps(hidden, weight, table, impl=impl)
    if plan == "logits":
        z = hidden @ weight.T
        ref = sequence_logps(z, table, impl=impl)
        out = preference_loss(sequence_logps(z, table, impl=impl), ref)
    else:
        out = linear_preference_loss(hidden, weight, table, ref, plan=plan, impl=impl)
    assert abs(out.loss.item() - LOG2) <= 1e-7


WEIGHTS = torch.tensor([2.0, 0.5])
HEAD_OPTIONS = {
    "temperature": {"temperature": 1.5},
    "softcap": {"softcap": 1.5},
    "logit_scale": {"logit_scale": 1.5},
    "bias": {"bias": head()[2]},
    "beta": {"beta": 0.3},
    "pair_weight": {"pair_weight": WEIGHTS},
    "num_pairs": {"num_pairs": 5},
    "label_smoothing": {"loss": "cdpo", "label_smoothing": 0.3},
    "loss": {"loss": "ipo_sum"},
    "loss_weights": {"loss": ["dpo", "ipo_sum"], "loss_weights": [0.5, 2.0]},
    "lengths": {"loss": "simpo", "gamma": 0.5, "lengths": torch.tensor([[3, 1], [2, 7]])},
    "compat": {"loss": "ipo", "compat": "trl-1.16"},
}
BASES = {
    "label_smoothing": {"loss": "cdpo", "label_smoothing": 0.1},
    "loss_weights": {"loss": ["dpo", "ipo_sum"], "loss_weights": [0.5, 1.0]},
    "lengths": {"loss": "simpo", "gamma": 0.5},
}


@pytest.mark.fault("K18")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", [*PLANS, "pairwise"])
@pytest.mark.parametrize("option", [*HEAD_OPTIONS, "weights", "ref_logps"])
def test_every_option_of_the_loss_with_the_head_moves_loss_and_gradient(impl, plan, option):
    hidden, weight, _, table = (p.to(device_of(impl)) for p in head())
    if plan != "frozen":
        weight.requires_grad_()
    ref = torch.tensor([[-4.0, -6.0], [-5.0, -3.0]], device=hidden.device)

    def step(t=table, r=ref, **options):
        x = hidden.clone().requires_grad_()
        moved = {k: v.to(x.device) if torch.is_tensor(v) else v for k, v in options.items()}
        r = None if options.get("loss") == "simpo" else r
        out = linear_preference_loss(x, weight, t, r, plan=plan, impl=impl, **moved)
        return out.loss.detach(), torch.autograd.grad(out.loss, x)[0]

    if option == "compat" and plan == "pairwise":
        with pytest.raises(ValueError, match="`compat` may average over the batch"):
            step(**HEAD_OPTIONS[option])
        return
    plain = step(**BASES.get(option, {}))
    if option == "weights":
        half = {"weights": torch.full((table.n_tokens,), 0.5, device=table.device)}
        names = ("logit_rows", "targets", "seq_offsets")
        other = step(ScoreTable(**{n: getattr(table, n) for n in names}, **half))
    elif option == "ref_logps":
        other = step(r=ref * 2)
    else:
        other = step(**HEAD_OPTIONS[option])
    for a, b in zip(plain, other, strict=True):
        assert (a - b).abs().max() > 1e-3 * max(float(a.abs().max()), 1e-2)


@pytest.mark.fault("K18")
@pytest.mark.parametrize("plan", [*PLANS, "pairwise"])
def test_every_option_of_scoring_inside_a_model_acts(plan):
    transformers = pytest.importorskip("transformers")
    from dpo_ext.torch import attach_scoring

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 23}
    ids = torch.randint(1, 23, (4, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = -100
    table, ref = ScoreTable.from_labels(labels), torch.tensor([[-9.0, -14.0], [-11.0, -8.0]])

    def loss(family="Gemma2", config=None, step=None, **options):
        torch.manual_seed(0)
        kind = getattr(transformers, f"{family}Config")
        extra = {"head_dim": 8} if family == "Gemma2" else {"pad_token_id": 0}
        config = kind(**small, initializer_range=0.3, **extra, **(config or {}))
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        if plan == "frozen":
            model.get_output_embeddings().weight.requires_grad_(False)
        attach_scoring(model, plan=plan, loss={"loss": "dpo", "beta": 0.1, **options})
        return model(input_ids=ids, score_table=table, ref_logps=ref, **(step or {})).loss.item()

    plain, cohere = loss(), loss("Cohere")
    moved = [
        plain - loss(config={"final_logit_softcapping": 1.0}),
        cohere - loss("Cohere", config={"logit_scale": 1.0}),
        plain - loss(beta=0.3),
        plain - loss(loss="ipo_sum"),
        plain - loss(loss="cdpo", label_smoothing=0.2),
        plain - loss(step={"num_pairs": 5}),
    ]
    assert min(map(abs, moved)) > 1e-3
