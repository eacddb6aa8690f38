"""Models whose logits are more than a product: scored by their own logits, or refused; never another number."""

import io
import os
import pickle

import pytest
import torch
import warm
from torch import nn

transformers = pytest.importorskip("transformers")

import tiny_models  # noqa: E402
from tiny_models import NAMED, Unbuilt, V, batch, build  # noqa: E402

from dpo_ext import TensorError  # noqa: E402
from dpo_ext.torch import (  # noqa: E402
    ModelScores,
    ScoreTable,
    attach_scoring,
    preference_loss,
    sequence_logps,
    token_scores,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
BY_LOGITS = {"RobertaForCausalLM", "BertLMHeadModel", "ElectraForCausalLM", "ModernBertDecoderForCausalLM", "T5ForConditionalGeneration"}  # fmt: skip


def table_of(model, labels):
    shift = {"shift": False} if model.config.is_encoder_decoder else {}
    return ScoreTable.from_labels(labels, **shift)


def tiny(**options):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    config = transformers.LlamaConfig(vocab_size=V, initializer_range=0.3, **sizes, **options)
    return transformers.LlamaForCausalLM(config).eval()


def moe(**options):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
    }
    config = transformers.MixtralConfig(
        vocab_size=V, num_local_experts=4, initializer_range=0.3, **sizes, **options
    )
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("name", NAMED)
def test_a_class_is_scored_as_its_own_logits_say(name):
    if not hasattr(transformers, name):
        pytest.skip("not in this transformers")
    try:
        model, right = build(name)
    except Unbuilt as why:
        pytest.skip(str(why))
    inputs, labels = batch(model)
    with torch.no_grad():
        scores = attach_scoring(model)(**inputs, score_table=table_of(model, labels))
    assert (scores.logps.double() - right).abs().max() < 1e-3
    assert right.std() > 1e-2
    if name in BY_LOGITS:
        assert scores.plan == "logits"


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("DPO_EXT_DEEP"), reason="minutes: `make deep`")
def test_no_class_of_transformers_is_scored_otherwise_in_silence():
    outcomes = {}
    for name in tiny_models.names():
        try:
            model, right = build(name)
        except Unbuilt:
            continue
        inputs, labels = batch(model)
        try:
            with torch.no_grad():
                got = attach_scoring(model)(**inputs, score_table=table_of(model, labels)).logps
        except (TypeError, ValueError):
            outcomes[name] = "refused"
            continue
        outcomes[name] = "right" if (got.double() - right).abs().max() < 1e-3 else "silent"
    assert [name for name, what in outcomes.items() if what == "silent"] == []
    assert sum(what == "right" for what in outcomes.values()) >= 150


# ---- heads ----------------------------------------------------------------------------------------


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


class Capped(nn.Linear):
    def forward(self, x):
        return 30.0 * torch.tanh(super().forward(x) / 30.0)


def subclassed(kind, size=1.0):
    model = tiny()
    model.set_output_embeddings(kind(16, V, bias=False))
    with torch.no_grad():
        model.lm_head.weight.mul_(size)
    return model


def hooked():
    model = tiny()
    model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)
    return model


def patched():
    model = tiny()
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x) + 3.0 * (torch.arange(V) % 2)
    return model


def cut():
    """A head with columns that the forward leaves out."""
    model = tiny()
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: plain(x)[..., : V - 2]
    return model


HEADS = {
    "a subclass": (lambda: subclassed(Halved), "a forward of its own (Halved)"),
    "a cap that small logits do not reach": (lambda: subclassed(Capped, 1e-3), "a forward of its own (Capped)"),
    "a hook": (hooked, "a hook on the head"),
    "a patch": (patched, "a forward of its own"),
    "columns cut off": (cut, "columns for 64 rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_no_product_is_scored_by_logits_or_refused(name):
    make, looks = HEADS[name]
    model = make()
    inputs, labels = batch(model)
    labels[labels >= V - 2] = 5
    table = ScoreTable.from_labels(labels)
    for again in range(2):
        expected = sequence_logps(model(**inputs).logits, table)
        scores = attach_scoring(model)(**inputs, score_table=table)
        assert scores.plan == "logits", again
        torch.testing.assert_close(scores.logps, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(TensorError, match='`plan="recompute"` is not right') as caught:
        attach_scoring(model, plan="recompute")(**inputs, score_table=table)
    assert looks in str(caught.value)
    with pytest.raises(TensorError):
        attach_scoring(model, plan="recompute", verify=True)


class Elsewhere(transformers.LlamaForCausalLM):
    """It gives the head the states of another text than the one that it is called with."""

    def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0, **kwargs):
        out = self.model(input_ids=torch.roll(input_ids, 1, 1), **kwargs)
        logits = self.lm_head(out.last_hidden_state)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def test_a_forward_that_asks_its_backbone_for_something_else_is_found():
    torch.manual_seed(0)
    model = Elsewhere(tiny().config).eval()
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    expected = sequence_logps(model(**inputs).logits, table)
    torch.testing.assert_close(attach_scoring(model)(**inputs, score_table=table).logps, expected)
    with pytest.raises(TensorError, match="other hidden states than `base_model`"):
        attach_scoring(model, plan="recompute", verify=True)


def test_a_comparison_draws_no_random_number():
    model = tiny()

    def draw(module, args):
        torch.rand(3)

    model.model.layers[0].register_forward_pre_hook(draw)
    state = torch.random.get_rng_state()
    attach_scoring(model, verify=True)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_hook_that_comes_later_is_found():
    model = attach_scoring(tiny())
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    before = model(**inputs, score_table=table)
    assert before.plan == "recompute"
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)
    scores = model(**inputs, score_table=table)
    assert scores.plan == "logits"
    torch.testing.assert_close(scores.logps, sequence_logps(model(**inputs).logits, table))
    handle.remove()
    assert torch.equal(model(**inputs, score_table=table).logps, before.logps)


def test_a_scale_that_the_configuration_names_and_nobody_applies_is_left_out():
    model = tiny()
    model.config.logit_scale = 0.5
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    scores = attach_scoring(model)(**inputs, score_table=table)
    assert scores.plan == "recompute"
    torch.testing.assert_close(scores.logps, sequence_logps(model(**inputs).logits, table))


def test_a_comparison_that_is_turned_off_is_said():
    model = attach_scoring(hooked(), verify=False)
    inputs, labels = batch(model)
    scores = model(**inputs, score_table=ScoreTable.from_labels(labels))
    assert scores.plan == "recompute (not verified)"


def test_the_comparison_costs_two_forwards_once_and_leaves_everything_as_it_was():
    model = tiny(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    lengths = []
    model.model.layers[1].register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape))
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    attach_scoring(model)
    torch.manual_seed(7)
    first = model(**inputs, score_table=table).logps
    torch.manual_seed(7)
    second = model(**inputs, score_table=table).logps
    assert torch.equal(first, second)
    assert lengths == [(2, 8, 16)] * 2 + [(4, 9, 16)] * 2
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("stats", [(), ("entropy", "is_top1")])
def test_the_plan_logits_gives_gradients_and_statistics_of_the_logits(stats):
    plain, model = hooked(), attach_scoring(hooked())
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels).compact()
    scores = model(**inputs, score_table=table, score_stats=stats)
    logits = plain(**inputs).logits
    expected = token_scores(logits, table, stats=stats)
    if stats:
        torch.testing.assert_close(scores.tokens.entropy, expected.entropy)
        assert torch.equal(scores.tokens.is_top1, expected.is_top1)
    preference_loss(scores.logps, torch.zeros(2, 2)).loss.backward()
    preference_loss(sequence_logps(logits, table), torch.zeros(2, 2)).loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("loss", ["dpo", {"loss": "simpo", "beta": 2.0, "gamma": 0.5}])
def test_a_loss_inside_by_logits_is_the_loss_outside(loss):
    plain, model = attach_scoring(hooked()), attach_scoring(hooked(), loss=loss)
    inputs, labels = batch(model)
    table, ref_logps = ScoreTable.from_labels(labels), torch.randn(2, 2) - 20
    options = loss if isinstance(loss, dict) else {"loss": loss}
    logps = plain(**inputs, score_table=table).logps
    ref = ref_logps if options["loss"] == "dpo" else None
    expected = preference_loss(logps, ref, lengths=table.lengths, num_pairs=5, **options)
    scores = model(**inputs, score_table=table, ref_logps=ref, num_pairs=5)
    assert scores.plan == scores.preference.plan == "logits"
    torch.testing.assert_close(scores.loss, expected.loss)
    scores.loss.backward()
    expected.loss.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("make", [tiny, hooked])
def test_a_table_of_another_batch_is_refused(make):
    model = attach_scoring(make())
    inputs, labels = batch(model)
    for other in (labels[:, :-1], labels[:2], torch.cat([labels[:, :1], labels], 1)):
        with pytest.raises(TensorError, match="as the table"):
            model(**inputs, score_table=ScoreTable.from_labels(other))


def test_a_lora_on_the_head_is_right():
    peft = pytest.importorskip("peft")
    for options in ({}, {"use_dora": True}):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"], init_lora_weights=False, **options
        )  # fmt: skip
        model = peft.get_peft_model(attach_scoring(tiny()), config).eval()
        inputs, labels = batch(model)
        table = ScoreTable.from_labels(labels)
        scores = model(**inputs, score_table=table)
        expected = sequence_logps(model(**inputs).logits, table)
        torch.testing.assert_close(scores.logps, expected, atol=1e-5, rtol=1e-5)
        with torch.no_grad(), model.disable_adapter():
            reference = model(**inputs, score_table=table).logps
            want = sequence_logps(model(**inputs).logits, table)
        torch.testing.assert_close(reference, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny, hooked, moe])
def test_a_model_that_was_compared_before_compiles_to_one_graph(make):
    if make is moe and transformers.__version__ < "5":
        pytest.skip("its experts are chosen by values, which no graph holds")
    torch._dynamo.reset()
    model = attach_scoring(make(), verify=True)
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    expected = attach_scoring(make())(**inputs, score_table=table)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs, score_table=table).logps, expected.logps)
    torch._dynamo.reset()
    late = torch.compile(attach_scoring(make()), backend="eager")  # the comparison breaks the graph
    torch.testing.assert_close(late(**inputs, score_table=table).logps, expected.logps)


def test_a_head_in_float32_on_a_backbone_in_bfloat16_rounds_no_logits():
    model = tiny().bfloat16()
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    hidden = model.model(**inputs).last_hidden_state.float()
    want = sequence_logps(hidden @ model.lm_head.weight.float().T, table)
    scores = attach_scoring(model, head_dtype=torch.float32)(**inputs, score_table=table)
    torch.testing.assert_close(scores.logps, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(attach_scoring(model)(**inputs, score_table=table).logps, want)
    preference_loss(scores.logps, torch.zeros(2, 2)).loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16
    with pytest.raises(TensorError, match="scored by its own logits"):
        attach_scoring(hooked(), head_dtype=torch.float32)(**inputs, score_table=table)
    with pytest.raises(TypeError, match=r"a torch\.dtype"):
        attach_scoring(model, head_dtype="float32")


@pytest.mark.parametrize("first", ["attached", "offloaded"])
def test_an_offloaded_head_is_scored_by_logits(first):
    accelerate = pytest.importorskip("accelerate")
    model = tiny()
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    expected = attach_scoring(tiny())(**inputs, score_table=table).logps
    if first == "attached":
        attach_scoring(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    with torch.no_grad():
        scores = attach_scoring(model)(**inputs, score_table=table)
    assert scores.plan == "logits"
    torch.testing.assert_close(scores.logps, expected)


class Int8(nn.Module):
    """A head whose weight is whole numbers and a scale."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_a_quantised_head_is_scored_by_logits():
    model = tiny()
    model.lm_head = Int8(model.lm_head)
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    scores = attach_scoring(model)(**inputs, score_table=table)
    assert scores.plan == "logits"
    torch.testing.assert_close(scores.logps, sequence_logps(model(**inputs).logits, table))


def test_logits_that_depend_on_the_cache_want_a_word():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
            out = super().forward(input_ids, attention_mask, use_cache=False, **kwargs)
            out.logits = out.logits * (1.0 if use_cache is False else 0.5)
            return out

    torch.manual_seed(0)
    model = attach_scoring(Odd(tiny().config).eval())
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    with pytest.raises(TensorError, match="depend on `use_cache`"):
        model(**inputs, score_table=table)
    for cached in (True, False):
        expected = sequence_logps(model(**inputs, use_cache=cached).logits, table)
        got = model(**inputs, score_table=table, use_cache=cached).logps
        torch.testing.assert_close(got, expected)


def two_ranks(rank, store, folder, result):
    """Rank 0 writes log-probs and gradients of a model that transformers shards over both."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=2
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    assert hasattr(model.lm_head.weight, "full_tensor")
    inputs, labels = batch(model)
    scores = attach_scoring(model)(**inputs, score_table=ScoreTable.from_labels(labels))
    preference_loss(scores.logps, torch.zeros(2, 2)).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    found = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}
    if rank == 0:
        torch.save((scores.logps.detach(), found), result)
    torch.distributed.barrier()


@pytest.mark.slow
def test_a_model_that_transformers_shards_is_scored_by_its_gathered_logits(tmp_path):
    model = attach_scoring(tiny())
    model.save_pretrained(tmp_path / "model")
    inputs, labels = batch(model)
    want = model(**inputs, score_table=ScoreTable.from_labels(labels)).logps
    preference_loss(want, torch.zeros(2, 2)).loss.backward()
    result = tmp_path / "found.pt"
    imports = (*warm.TORCH, "transformers.models.llama.modeling_llama")
    arguments = (tmp_path / "store", tmp_path / "model", result)
    warm.ranks(__name__, "two_ranks", *arguments, imports=imports)
    logps, found = torch.load(result)
    torch.testing.assert_close(logps, want.detach(), atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4, msg=name)


# ---- the router loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["configuration", "call"])
def test_the_router_loss_is_the_classs_own(asked):
    model = attach_scoring(moe(output_router_logits=asked == "configuration"))
    inputs, labels = batch(model)
    call = {"output_router_logits": True} if asked == "call" else {}
    table = ScoreTable.from_labels(labels)
    scores = model(**inputs, **call, score_table=table)
    own = moe()(**inputs, output_router_logits=True)
    assert scores.plan == "recompute"
    torch.testing.assert_close(scores.aux_loss, own.aux_loss)
    torch.testing.assert_close(
        scores.logps, sequence_logps(own.logits, table), atol=1e-5, rtol=1e-5
    )
    gate = next(p for name, p in model.named_parameters() if name.endswith("gate.weight"))
    (grad,) = torch.autograd.grad(scores.aux_loss, gate)
    assert grad.abs().max() > 0
    assert moe()(**inputs).aux_loss is None
    assert attach_scoring(moe())(**inputs, score_table=table).aux_loss is None


def test_the_router_loss_is_in_the_loss_inside_with_its_coefficient():
    inputs, labels = batch(moe())
    table, ref = ScoreTable.from_labels(labels), torch.zeros(2, 2)
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    plain = attach_scoring(moe(**options))(**inputs, score_table=table)
    scores = attach_scoring(moe(**options), loss="dpo")(**inputs, score_table=table, ref_logps=ref)
    expected = preference_loss(plain.logps, ref).loss + 0.3 * plain.aux_loss
    torch.testing.assert_close(scores.loss, expected)


# ---- attached anywhere ----------------------------------------------------------------------------


def through_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("carry", [through_torch, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_saved_model_scores_on(carry):
    model = attach_scoring(tiny(), loss="dpo")
    inputs, labels = batch(model)
    table, ref = ScoreTable.from_labels(labels), torch.zeros(2, 2)
    expected = model(**inputs, score_table=table, ref_logps=ref)
    loaded = carry(model)
    for attached in (loaded, attach_scoring(loaded, loss="dpo")):
        scores = attached(**inputs, score_table=table, ref_logps=ref)
        assert isinstance(scores, ModelScores)
        assert torch.equal(scores.loss, expected.loss)
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
    assert torch.equal(model(**inputs, score_table=table, ref_logps=ref).loss, expected.loss)


def test_a_forward_that_was_replaced_does_not_swallow_the_table():
    model = attach_scoring(tiny())
    inputs, labels = batch(model)
    table = ScoreTable.from_labels(labels)
    del model.forward
    assert model(**inputs).logits.shape[-1] == V
    with pytest.raises(TypeError, match="attaches it again"):
        model(**inputs, score_table=table)
    assert isinstance(attach_scoring(model)(**inputs, score_table=table), ModelScores)


@pytest.mark.parametrize("first", ["attached", "prepared"])
def test_scoring_runs_in_the_autocast_of_accelerate(first):
    accelerate = pytest.importorskip("accelerate")
    reset = accelerate.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)  # a trainer of another test may have set it
    inputs, labels = batch(tiny())
    table = ScoreTable.from_labels(labels)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    if first == "attached":
        model = accelerator.prepare(attach_scoring(tiny()))
    else:
        model = attach_scoring(accelerator.prepare(tiny()))
    seen = []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    assert model(**inputs, score_table=table).plan == "recompute"
    assert seen[-1] == torch.bfloat16
    assert isinstance(attach_scoring(model)(**inputs, score_table=table), ModelScores)
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    attach_scoring(bare)
    assert isinstance(bare(**inputs, score_table=table), ModelScores)
    if first == "attached":
        assert seen[-1] == torch.float32
    reset(reset_partial_state=True)
