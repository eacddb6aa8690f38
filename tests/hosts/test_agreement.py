"""The comparison of a model with its head: an error with a direction is found in half width, rounding is none."""

import os

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402
from tiny_models import NAMED, V, batch  # noqa: E402

from dpo_ext import TensorError  # noqa: E402
from dpo_ext.torch import ScoreTable, attach_scoring, forward, sequence_logps  # noqa: E402
from dpo_ext.torch.agreement import Drift  # noqa: E402
from dpo_ext.torch.heads import logit_transform  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
HALVES = [torch.bfloat16, torch.float16]
SEEDS = range(2)
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")  # fmt: skip


def tiny(seed, dtype, family="Llama", vocabulary=V, **options):
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocabulary, initializer_range=0.3, pad_token_id=0, **{**sizes, **options}
    )
    return getattr(transformers, f"{family}ForCausalLM")(config).eval().to(dtype)


def with_head(model, change):
    """The same model, whose head gives ``change(logits)``."""
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: change(plain(x))
    return model


def by_a_hook(model, factor):
    model.lm_head.register_forward_hook(lambda module, args, out: out * factor)
    return model


def before_the_head(model, factor):
    class Louder(nn.Linear):
        def forward(self, x):
            return super().forward(x * factor)

    head = Louder(32, V, bias=False).to(model.lm_head.weight.dtype)
    head.weight = model.lm_head.weight
    model.set_output_embeddings(head)
    return model


ODD = torch.arange(V) % 2
WRONG = {
    **{f"scale {f}": lambda m, f=f: with_head(m, lambda z: z * f) for f in (0.99, 0.995, 1.005, 1.01)},
    "a scale by a hook": lambda m: by_a_hook(m, 1.005),
    "a scale before the head": lambda m: before_the_head(m, 0.995),
    "odd columns more": lambda m: with_head(m, lambda z: z + 0.3 * ODD.to(z.dtype)),
    "a cap": lambda m: with_head(m, lambda z: 150 * torch.tanh(z / 150)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("wrong", WRONG)
def test_an_error_with_a_direction_is_found_in_half_width(wrong, dtype):
    for seed in SEEDS:
        model = attach_scoring(WRONG[wrong](tiny(seed, dtype)))
        inputs, labels = batch(model)
        table = ScoreTable.from_labels(labels)
        with torch.no_grad():
            scores = model(**inputs, score_table=table)
        assert scores.plan == "logits"
        torch.testing.assert_close(scores.logps, sequence_logps(model(**inputs).logits, table))
        attach_scoring(model, plan="recompute")
        with pytest.raises(TensorError, match="log-probs from its head"):
            model(**inputs, score_table=table)


FAMILIES = {
    "Gemma2": {"final_logit_softcapping": 30.0},
    "Granite": {"logits_scaling": 7.0},
    "Cohere": {"logit_scale": 0.0417},
}


@pytest.mark.parametrize("factor", [0.994, 1.006])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transform_near_the_right_one_is_found(monkeypatch, family, factor):
    def near(config):
        return {
            name: None if value is None else value * factor
            for name, value in logit_transform(config).items()
        }

    monkeypatch.setattr(forward, "logit_transform", near)
    for seed in SEEDS:
        model = tiny(seed, torch.bfloat16, family, **FAMILIES[family])
        attach_scoring(model, plan="recompute")
        with pytest.raises(TensorError, match=r"is not right for .*: log-probs from its head"):
            attach_scoring(model, plan="recompute", verify=True)


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["Llama", *FAMILIES])
def test_rounding_in_half_width_is_no_error(family, dtype):
    for seed in SEEDS:
        options = {"num_hidden_layers": (1, 4)[seed], **FAMILIES.get(family, {})}
        model = tiny(seed, dtype, family, (997, V)[seed], **options)
        assert attach_scoring(model, verify=True) is model
        inputs, labels = batch(model)
        with torch.no_grad():
            scores = model(**inputs, score_table=ScoreTable.from_labels(labels))
        assert scores.plan != "logits"


def test_rounding_has_no_drift_and_what_has_one_is_measured():
    """Rounded logits of any spread: fewer alarms than 1 in 400, and each error of 0.5 % found."""
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for trial in range(400):
        spread = 2.0 ** (trial % 6)
        exact = spread * torch.randn(16, (33, 64, 500)[trial % 3], generator=generator).double()
        ours, theirs = (
            (exact + 1e-3 * spread * torch.randn(exact.shape, generator=generator))
            .bfloat16()
            .double()
            for _ in range(2)
        )
        alarms += bool(Drift.of(theirs, ours).looks_like())
        for slope in (0.995, 1.005):
            drift = Drift.of((slope * theirs).bfloat16().double(), ours)
            assert drift.scales()
            assert abs(1 + drift.slope - slope) < 2e-3
    assert alarms == 0


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2, 8])
def test_no_class_raises_a_false_alarm_in_bfloat16(monkeypatch, depth):
    """Thirty named classes; every class with DPO_EXT_DEEP."""
    own, seen = Drift.of, []
    monkeypatch.setattr(Drift, "of", staticmethod(lambda *a: seen.append(own(*a)) or seen[-1]))
    for variant in tiny_models.VARIANTS:
        for name in DEPTHS:
            if name in variant:
                monkeypatch.setitem(variant, name, depth)
    compared, alarms = 0, []
    for name in tiny_models.names() if os.environ.get("DPO_EXT_DEEP") else NAMED:
        try:
            model, _ = tiny_models.build(name)
        except (tiny_models.Unbuilt, AttributeError):
            continue
        model.bfloat16()
        for seed in SEEDS:
            torch.manual_seed(seed)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 0.3 * torch.randn_like(p))
            seen.clear()
            attach_scoring(model, verify=True)
            compared += bool(seen)
            alarms += [(name, seed, drift) for drift in seen if drift.looks_like()]
    assert alarms == []
    assert compared > 40
