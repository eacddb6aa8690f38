"""Adapters on the head: LoRA and DoRA by the linear plans, with the model's own logits as the measure."""

import itertools

import pytest
import torch
import warm
from linear_cases import Watch
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tiny_models import V, batch  # noqa: E402

from dpo_ext import TensorError  # noqa: E402
from dpo_ext.torch import (  # noqa: E402
    ScoreTable,
    attach_scoring,
    preference_loss,
    sequence_logps,
    token_scores,
)
from dpo_ext.torch import forward as scored  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
}


def base(dtype=torch.float64, bias=False, **options):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options)).eval()
    if bias:
        model.lm_head = nn.Linear(16, V)
    return model.to(dtype)


def adapted(model=None, adapters=1, scale=0.3, cast=False, **options):
    """A model with random adapters on its head, all of them active."""
    torch.manual_seed(1)
    model = base() if model is None else model
    config = {"task_type": "CAUSAL_LM", "target_modules": ["lm_head", "q_proj"], "r": 3, **options}
    several = config.pop("several", [{}] * adapters)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(**{**config, **several[0]}), autocast_adapter_dtype=cast
    )
    for number, other in enumerate(several[1:]):
        wrapped.add_adapter(f"more{number}", peft.LoraConfig(**{**config, **other}))
    if len(several) > 1:
        names = ["default", *(f"more{number}" for number in range(len(several) - 1))]
        wrapped.base_model.set_adapter(names)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand_like(p))
            elif "lora_" in name:
                p.copy_(scale * torch.randn_like(p))
    return wrapped.eval()


KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dora": {"use_dora": True},
    "lora with a bias": {"lora_bias": True},
    "several": {"several": [{}, {"r": 2, "lora_alpha": 3}, {"r": 5}]},
    "several of both": {"several": [{}, {"use_dora": True}, {"r": 2}, {"use_dora": True}]},
}


def scores_of(model, table, inputs, **options):
    return model(**inputs, score_table=table, **options)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_as_its_logits(model, plan, atol=1e-8, loss=None):
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    ref = torch.full((2, 2), -9.0, dtype=torch.float64)
    options = {} if loss is None else {"ref_logps": ref}
    scores = model(**inputs, score_table=table, **options)
    assert scores.plan == plan
    want = sequence_logps(model(**inputs, use_cache=False).logits, table)
    torch.testing.assert_close(scores.logps, want, atol=atol, rtol=atol)
    value = scores.loss
    if loss is None:
        value = preference_loss(scores.logps, ref.to(scores.logps)).loss
    got = gradients(model, value)
    right = gradients(model, preference_loss(want, ref.to(want)).loss)
    assert got.keys() == right.keys()
    for name, grad in right.items():
        torch.testing.assert_close(got[name], grad, atol=atol, rtol=atol)
        if "lm_head" in name:
            assert grad.abs().sum() > 0
    return got


@pytest.mark.parametrize("loss", [None, "dpo"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_models_own_logits(kind, bias, loss):
    model = adapted(base(bias=bias), **KINDS[kind])
    attach_scoring(model, loss=loss, chunk_rows=5)
    got = assert_as_its_logits(model, "recompute" if loss is None else "pairwise", loss=loss)
    assert any("lm_head.lora_B" in name for name in got)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_model_without_its_adapter(kind):
    model = attach_scoring(adapted(**KINDS[kind]))
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    with torch.no_grad():
        policy = model(**inputs, score_table=table)
        with model.disable_adapter():
            scores = model(**inputs, score_table=table)
        again = model(**inputs, score_table=table)
    want = attach_scoring(base())(**inputs, score_table=table).logps
    assert scores.plan == policy.plan == "frozen"
    torch.testing.assert_close(scores.logps, want.detach())
    assert torch.equal(policy.logps, again.logps)
    assert (policy.logps - want).abs().max() > 1e-2


def test_policy_and_reference_are_compared_once_each(monkeypatch):
    seen = []
    monkeypatch.setattr(
        scored, "examine", lambda *args, __own=scored.examine, **how: seen.append(1) or __own(*args, **how)
    )  # fmt: skip
    model = attach_scoring(adapted())
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    for _ in range(3):
        model(**inputs, score_table=table)
        with torch.no_grad(), model.disable_adapter():
            model(**inputs, score_table=table)
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged_adapters_are_part_of_the_weight(kind):
    model = attach_scoring(adapted(**KINDS[kind]))
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    with torch.no_grad():
        before = model(**inputs, score_table=table).logps
        model.merge_adapter()
        merged = model(**inputs, score_table=table)
        torch.testing.assert_close(merged.logps, before)
        with model.disable_adapter():  # whose layers unmerge at their next call
            for plan in ("logits", "frozen"):
                reference = model(**inputs, score_table=table)
                assert reference.plan == plan
                want = sequence_logps(model(**inputs).logits, table)
                torch.testing.assert_close(reference.logps, want)
        torch.testing.assert_close(model(**inputs, score_table=table).logps, before)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_that_acts_takes_the_models_logits(kind):
    model = attach_scoring(adapted(lora_dropout=0.5, **KINDS[kind]))
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    assert model(**inputs, score_table=table).plan == "recompute"
    model.train()
    assert model(**inputs, score_table=table).plan == "logits"
    drawn = [model(**inputs, score_table=table).logps for _ in range(2)]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-2
    with model.disable_adapter():
        assert model(**inputs, score_table=table).plan == "frozen"
    assert model.eval()(**inputs, score_table=table).plan == "recompute"
    assert attach_scoring(adapted().train())(**inputs, score_table=table).plan == "recompute"


def test_an_adapter_that_is_switched_off_or_scaled_is_followed():
    model = attach_scoring(adapted(**KINDS["several"]))
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    seen = []
    for change in (
        lambda: model.base_model.set_adapter(["more0"]),
        lambda: model.base_model.set_adapter(["more1", "default"]),
        lambda: model.base_model.model.lm_head.scale_layer(0.25),
        lambda: model.base_model.model.lm_head.set_scale("default", 3.0),
    ):
        change()
        scores = model(**inputs, score_table=table)
        assert scores.plan == "recompute"
        want = sequence_logps(model(**inputs).logits, table)
        torch.testing.assert_close(scores.logps, want)
        seen.append(want)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="+".join)  # fmt: skip
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_tied_embeddings_and_adapters_on_either_end(kind, targets):
    model = base(tie_word_embeddings=True)
    wrapped = adapted(model, target_modules=targets, **KINDS[kind])
    plan = "recompute" if "lm_head" in targets else "frozen"
    assert_as_its_logits(attach_scoring(wrapped), plan)


def test_a_head_that_is_trained_whole_has_an_adapter_and_a_weight_gradient():
    model = adapted()
    model.base_model.model.lm_head.base_layer.weight.requires_grad_()
    got = assert_as_its_logits(attach_scoring(model, chunk_rows=4), "recompute")
    assert any("base_layer" in name for name in got)
    got = assert_as_its_logits(attach_scoring(model, loss="dpo"), "pairwise", loss="dpo")
    assert any("base_layer" in name for name in got)


@pytest.mark.parametrize("plan", ["recompute", "pairwise", "frozen"])
def test_a_plan_that_was_asked_for_is_taken_or_refused(plan):
    model = adapted()
    attach_scoring(model, plan=plan, loss="dpo")
    if plan == "frozen":
        with pytest.raises(ValueError, match="an adapter without gradient"):
            assert_as_its_logits(model, plan, loss="dpo")
    else:
        assert_as_its_logits(model, plan, loss="dpo")


@pytest.mark.parametrize("cast", [False, True], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["lora", "dora", "several of both"])
def test_adapters_of_a_model_in_bfloat16_have_their_own_dtype(kind, cast):
    """Off by no more than the model's own logits in bfloat16 are."""
    model = adapted(base(torch.bfloat16), cast=cast, **KINDS[kind])
    head = model.base_model.model.lm_head
    assert head.lora_A["default"].weight.dtype == (torch.float32 if cast else torch.bfloat16)
    attach_scoring(model)
    ids = torch.randint(3, V, (16, 33), generator=torch.Generator().manual_seed(0))
    table = ScoreTable.from_labels(ids)
    with torch.no_grad():
        scores = model(input_ids=ids, score_table=table, score_stats="logps")
        assert scores.plan == "frozen"
        own = token_scores(model(input_ids=ids).logits, table).logps
        hidden = model.base_model.model.model(input_ids=ids).last_hidden_state
        exact = token_scores(head.double()(hidden.double()), table).logps
    off, theirs = (
        float((x.double() - exact).square().mean().sqrt()) for x in (scores.tokens.logps, own)
    )
    assert off <= 1.05 * theirs
    assert theirs < 0.1


def test_an_autocast_model_scores_as_it_computes():
    model = attach_scoring(adapted(base(torch.float32), cast=True))
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(**inputs, score_table=table)
        want = sequence_logps(model(**inputs).logits, table)
    assert scores.plan == "recompute"
    assert (scores.logps - want).abs().max() < 0.3
    gradients(model, scores.logps.sum())
    grad = model.base_model.model.lm_head.lora_B["default"].weight.grad
    assert grad.dtype == torch.float32
    assert grad.abs().sum() > 0


def test_a_head_in_float32_has_its_adapter_in_float32():
    model = adapted(base(torch.bfloat16))
    attach_scoring(model, head_dtype=torch.float32)
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    with torch.no_grad():
        scores = model(**inputs, score_table=table)
        hidden = model.base_model.model.model(**inputs).last_hidden_state.float()
        want = sequence_logps(model.base_model.model.lm_head.float()(hidden), table)
    torch.testing.assert_close(scores.logps, want, atol=1e-4, rtol=1e-5)


def quantised():
    class Eighths(nn.Linear):
        """A layer with whole numbers for a weight."""

        def __init__(self, layer):
            super().__init__(layer.in_features, layer.out_features, bias=False)
            whole = (layer.weight.detach() * 8).round().to(torch.int8)
            self.weight = nn.Parameter(whole, requires_grad=False)

        def forward(self, x):
            return x @ (self.weight.to(x.dtype) / 8).t()

    model = adapted()
    head = model.base_model.model.lm_head
    head.base_layer = Eighths(head.base_layer)
    return model


def fanned():
    model = adapted()
    model.base_model.model.lm_head.fan_in_fan_out = True
    return model


def hooked_below():
    model = adapted()
    model.base_model.model.lm_head.base_layer.register_forward_hook(lambda m, args, out: 2 * out)
    return model


def hooked_within():
    model = adapted()
    matrix = model.base_model.model.lm_head.lora_A["default"]
    matrix.register_forward_hook(lambda m, args, out: 2 * out)
    return model


def of_another_kind(config):
    model = peft.get_peft_model(base(), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lm_head" in name and p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


OTHERS = {
    "quantised": (quantised, "its base is quantised"),
    "transposed": (fanned, "fan_in_fan_out"),
    "a hook below": (hooked_below, "log-probs from its head are off by"),
    "a hook within": (hooked_within, "log-probs from its head are off by"),
    "adalora": (
        lambda: of_another_kind(peft.AdaLoraConfig(target_modules=["lm_head"], total_step=10)),
        "the matrices of SVDLinear are no layers",
    ),
    "loha": (lambda: of_another_kind(peft.LoHaConfig(target_modules=["lm_head"])), "neither LoRA nor DoRA"),
    "ia3": (
        lambda: of_another_kind(
            peft.IA3Config(target_modules=["lm_head"], feedforward_modules=["lm_head"])
        ), "neither LoRA nor DoRA",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_product_is_scored_by_logits_and_the_reason_said(name):
    make, why = OTHERS[name]
    model = attach_scoring(make())
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    scores = model(**inputs, score_table=table)
    assert scores.plan == "logits"
    torch.testing.assert_close(scores.logps, sequence_logps(model(**inputs).logits, table))
    with pytest.raises(TensorError, match=why):
        attach_scoring(make(), plan="recompute")(**inputs, score_table=table)


def test_a_hook_within_an_adapter_that_comes_later_is_found():
    model = attach_scoring(adapted())
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    assert model(**inputs, score_table=table).plan == "recompute"
    matrix = model.base_model.model.lm_head.lora_B["default"]
    matrix.register_forward_hook(lambda m, args, out: 2 * out)
    scores = model(**inputs, score_table=table)
    assert scores.plan == "logits"
    torch.testing.assert_close(scores.logps, sequence_logps(model(**inputs).logits, table))


def test_rows_with_adapters_of_their_own_are_scored_by_logits():
    model = attach_scoring(adapted(adapters=2))
    inputs, labels = batch(model)
    names = ["default", "__base__", "more0", "default"]
    scores = model(**inputs, score_table=ScoreTable.from_labels(labels), adapter_names=names)
    assert scores.plan == "logits"
    want = sequence_logps(model(**inputs, adapter_names=names).logits, ScoreTable.from_labels(labels))  # fmt: skip
    torch.testing.assert_close(scores.logps, want)


@pytest.mark.parametrize("loss", [None, "dpo"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_no_logits_of_all_tokens_are_made(kind, loss):
    torch.manual_seed(0)
    wide, C = 4096, 8
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": wide})
    model = adapted(transformers.LlamaForCausalLM(config), **KINDS[kind])
    ids = torch.randint(3, wide, (4, 33))
    labels = ids.clone()
    labels[:, :1] = -100
    table = ScoreTable.from_labels(labels)
    attach_scoring(model, loss=loss, chunk_rows=C, verify=True)
    options = {} if loss is None else {"ref_logps": torch.full((2, 2), -300.0)}
    with Watch() as watch:
        scores = model(input_ids=ids, score_table=table, **options)
        (scores.logps.sum() if loss is None else scores.loss).backward()
    # the embedding's own size is the largest: 128 tokens would make 8 times that of 16 columns
    assert watch.largest <= max(C * wide, wide * 16)
    assert table.n_tokens * wide > 4 * watch.largest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora", "several"])
def test_an_adapted_head_compiles_to_one_graph(kind):
    torch._dynamo.reset()
    targets = ["lm_head"]  # peft's own DoRA compiles to no graph
    model = adapted(base(torch.float32), target_modules=targets, **KINDS[kind])
    attach_scoring(model, verify=True)
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    want = model(**inputs, score_table=table)
    expected = gradients(model, want.logps.sum())
    inner = model.get_base_model()
    compiled = torch.compile(inner, backend="aot_eager", fullgraph=True)
    scores = compiled(**inputs, score_table=table)
    torch.testing.assert_close(scores.logps, want.logps)
    for name, grad in gradients(model, scores.logps.sum()).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


# ---- two processes --------------------------------------------------------------------------------


def two_ranks(rank, store, wrapper, result):
    """Each rank scores one of two pairs; rank 0 writes what the wrapper made of the gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    model = attach_scoring(adapted(base(torch.float32), **KINDS["dora"]), loss="dpo")
    inputs, labels = batch(model)
    rows = [rank, 2 + rank]
    table = ScoreTable.from_labels(labels[rows])
    if wrapper == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_device_mesh("cpu", (2,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
    mine = {name: value[rows] for name, value in inputs.items()}
    scores = wrapped(**mine, score_table=table, ref_logps=torch.full((1, 2), -9.0), num_pairs=2)
    (2 * scores.loss).backward()  # they average over ranks
    grads = {"plan": scores.plan}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grads[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    if rank == 0:
        torch.save(grads, result)
    torch.distributed.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradients_of_one(tmp_path, wrapper):
    if wrapper == "fsdp2" and torch.__version__ < "2.9":
        pytest.skip("FSDP2 of torch 2.8 gives other gradients over gloo")
    model = attach_scoring(adapted(base(torch.float32), **KINDS["dora"]), loss="dpo")
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    scores = model(**inputs, score_table=table, ref_logps=torch.full((2, 2), -9.0))
    one = gradients(model, scores.loss)
    result = tmp_path / "grads.pt"
    imports = (*warm.TORCH, "transformers.models.llama.modeling_llama", "peft")
    warm.ranks(__name__, "two_ranks", tmp_path / "store", wrapper, result, imports=imports)
    two = torch.load(result)
    assert two.pop("plan") == scores.plan == "pairwise"
    assert one.keys() == two.keys()
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad, atol=1e-6, rtol=1e-4)
