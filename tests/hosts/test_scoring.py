"""Scoring inside a model: what it returns, what it leaves alone, what wrappers make of it."""

import copy
import inspect

import pytest
import torch
import warm
from torch import nn
from torch.nn.functional import cross_entropy

transformers = pytest.importorskip("transformers")

from dpo_ext import TensorError  # noqa: E402
from dpo_ext.torch import (  # noqa: E402
    ScoreTable,
    attach_scoring,
    preference_loss,
    sequence_logps,
    token_scores,
)
from dpo_ext.torch.heads import logit_transform  # noqa: E402

V, T = 23, 7
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore::FutureWarning:torch.*")


def tiny_llama(seed=0, **options):
    """Large initial weights: a nearly uniform model would not notice a wrong label."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        max_position_embeddings=64,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_batch(pairs=2, seed=1):
    """(model inputs, labels): completions of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, V, (2 * pairs, T), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(2 * pairs):
        labels[row, : 2 + row % 2] = -100
        end = T - row % 3
        ids[row, end:], labels[row, end:], mask[row, end:] = 0, -100, 0
    return {"input_ids": ids, "attention_mask": mask}, labels


def by_cross_entropy(logits, labels):
    """Sequence log-probs as a textbook writes them, chosen rows first."""
    losses = cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    sums = -losses.view(len(labels), -1).double().sum(-1)
    return torch.stack(sums.chunk(2), dim=1)


def loss_of(logps):
    return preference_loss(logps, torch.zeros_like(logps), beta=0.1).loss


def gradients(model, scores):
    model.zero_grad()
    loss_of(scores.logps).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [False, True])
def test_scores_and_gradients_are_those_of_the_logits(tied):
    model = attach_scoring(tiny_llama(tie_word_embeddings=tied))
    inputs, labels = tiny_batch()
    table = ScoreTable.from_labels(labels)
    expected = by_cross_entropy(model(**inputs).logits, labels)
    for t in (table, table.compact()):
        scores = model(**inputs, score_table=t)
        assert scores.tokens is None
        torch.testing.assert_close(scores.logps.double(), expected, atol=2e-5, rtol=1e-6)
    assert expected.std() > 1
    got = gradients(model, scores)
    model.zero_grad()
    loss_of(by_cross_entropy(model(**inputs).logits, labels)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=2e-6, rtol=1e-4)


def test_tokens_on_request():
    model = attach_scoring(tiny_llama())
    inputs, labels = tiny_batch()
    table = ScoreTable.from_labels(labels).compact()
    plain = model(**inputs, score_table=table).logps
    scores = model(**inputs, score_table=table, score_stats=("entropy", "is_top1"))
    expected = token_scores(model(**inputs).logits, table, stats=("entropy", "is_top1"))
    torch.testing.assert_close(scores.tokens.logps, expected.logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.tokens.entropy, expected.entropy, atol=1e-5, rtol=1e-5)
    assert torch.equal(scores.tokens.is_top1, expected.is_top1)
    assert scores.tokens.mean_logit is None
    assert torch.equal(scores.logps, plain)
    only_logps = model(**inputs, score_table=table, score_stats="logps").tokens
    assert torch.equal(only_logps.logps, scores.tokens.logps)
    assert only_logps[1:] == (None,) * 4
    with pytest.raises(ValueError, match="`score_stats` must be among logps, entropy"):
        model(**inputs, score_table=table, score_stats=("kl",))


def test_weights_act_on_sequences_with_and_without_tokens():
    model = attach_scoring(tiny_llama())
    inputs, labels = tiny_batch()
    plain = ScoreTable.from_labels(labels)
    table = ScoreTable(
        logit_rows=plain.logit_rows,
        targets=plain.targets,
        seq_offsets=plain.seq_offsets,
        weights=torch.arange(plain.n_tokens) % 3 * 0.5,
    )
    one = model(**inputs, score_table=table)
    two = model(**inputs, score_table=table, score_stats=["logps"])
    assert torch.equal(one.logps, two.logps)
    expected = sequence_logps(model(**inputs).logits, table)
    torch.testing.assert_close(one.logps, expected, atol=2e-5, rtol=1e-6)


def test_without_a_table_nothing_changes():
    plain, model = tiny_llama(), attach_scoring(tiny_llama())
    inputs, labels = tiny_batch()
    assert torch.equal(plain(**inputs).logits, model(**inputs).logits)
    assert torch.equal(plain(**inputs, labels=labels).loss, model(**inputs, labels=labels).loss)
    assert inspect.signature(plain.forward) == inspect.signature(model.forward)
    prompt = inputs["input_ids"][:1, :3]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(plain.generate(prompt, **options), model.generate(prompt, **options))
    with pytest.raises(ValueError, match="`score_stats` needs a `score_table`"):
        model(**inputs, score_stats=("entropy",))


def test_attaching_twice_patches_once_and_sets_the_plan():
    model = tiny_llama()
    assert attach_scoring(attach_scoring(model)) is model
    inputs, labels = tiny_batch()
    table = ScoreTable.from_labels(labels)
    expected = model(**inputs, score_table=table).logps
    attach_scoring(model, plan="frozen")
    with pytest.raises(ValueError, match="needs a weight, a bias and an adapter without gradient"):
        model(**inputs, score_table=table)
    model.lm_head.requires_grad_(False)
    assert torch.equal(model(**inputs, score_table=table).logps, expected)
    assert model.forward.__wrapped__.__func__ is type(model).forward


def test_a_deep_copy_scores_with_its_own_weights():
    model = attach_scoring(tiny_llama())
    inputs, labels = tiny_batch()
    table = ScoreTable.from_labels(labels)
    reference = copy.deepcopy(model)
    before = reference(**inputs, score_table=table).logps
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert torch.equal(reference(**inputs, score_table=table).logps, before)
    assert torch.equal(reference(**inputs).logits, tiny_llama()(**inputs).logits)
    assert not torch.equal(model(**inputs, score_table=table).logps, before)


def test_positional_inputs_and_a_tuple_configuration():
    model = attach_scoring(tiny_llama())
    inputs, labels = tiny_batch()
    table = ScoreTable.from_labels(labels)
    expected = model(**inputs, score_table=table).logps
    by_place = model(inputs["input_ids"], inputs["attention_mask"], score_table=table)
    assert torch.equal(by_place.logps, expected)
    model.config.return_dict = False
    assert torch.equal(model(**inputs, score_table=table).logps, expected)
    assert torch.equal(model(**inputs, score_table=table, use_cache=True).logps, expected)


@pytest.mark.parametrize("given", [{}, {"use_cache": True}])
def test_packed_segments_do_not_see_each_other(given):
    """With a cache, transformers takes a packed row for one text: log-probs off by whole nats."""
    model = attach_scoring(tiny_llama())
    inputs, labels = tiny_batch()
    expected = model(**inputs, score_table=ScoreTable.from_labels(labels)).logps
    real = inputs["attention_mask"].bool()
    order = [0, 2, 1, 3]  # chosen 0, rejected 0, chosen 1, rejected 1
    lengths = [int(real[row].sum()) for row in order]
    ids = torch.cat([inputs["input_ids"][row][real[row]] for row in order])[None]
    targets = torch.cat([labels[row][real[row]] for row in order])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    rows = [
        [t for t in range(starts[s], starts[s + 1] - 1) if targets[t + 1] != -100] for s in range(4)
    ]
    table = ScoreTable(
        logit_rows=[t for r in rows for t in r],
        targets=[int(targets[t + 1]) for r in rows for t in r],
        seq_offsets=torch.tensor([0, *(len(r) for r in rows)]).cumsum(0).int(),
    )
    packed = model(input_ids=ids, position_ids=positions, score_table=table, **given).logps
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_combined_is_refused():
    model = attach_scoring(tiny_llama())
    inputs, labels = tiny_batch()
    table = ScoreTable.from_labels(labels)
    for name, value in (("labels", labels), ("logits_to_keep", 1)):
        with pytest.raises(ValueError, match=f"`{name}` cannot be combined"):
            model(**inputs, score_table=table, **{name: value})
    with pytest.raises(TypeError, match="`table` must be a ScoreTable"):
        model(**inputs, score_table=labels)


def test_models_without_backbone_and_head_are_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        attach_scoring("gpt2")
    for model in (nn.Linear(2, 2), tiny_llama().model):
        with pytest.raises(TypeError, match="`base_model` and `get_output_embeddings"):
            attach_scoring(model)
    with pytest.raises(ValueError, match="`plan`"):
        attach_scoring(tiny_llama(), plan="pairwise")
    with pytest.raises(TypeError, match="`verify` must be"):
        attach_scoring(tiny_llama(), verify="yes")
    broken = tiny_llama()
    broken.lm_head.weight = nn.Parameter(torch.zeros(V, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TensorError, match="floating-point weight"):
        attach_scoring(broken, plan="recompute")


SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
        ("Cohere", {"logit_scale": 0.25, "pad_token_id": 0}),
        ("Granite", {"logits_scaling": 4.0}),
        ("GPTNeoX", {"max_position_embeddings": 32}),
        ("Qwen2", {}),
        ("Phi", {}),  # a bias in the head
    ],
)
def test_the_transforms_of_model_families(family, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    model = attach_scoring(getattr(transformers, f"{family}ForCausalLM")(config).eval())
    inputs, labels = tiny_batch()
    scores = model(**inputs, score_table=ScoreTable.from_labels(labels))
    expected = by_cross_entropy(model(**inputs).logits, labels)
    torch.testing.assert_close(scores.logps.double(), expected, atol=5e-5, rtol=1e-5)


def test_hyperclova_multiplies_where_granite_divides():
    class Config:
        model_type = "hyperclovax"
        logits_scaling = 8.0

    assert logit_transform(Config()) == {"logit_scale": 8.0, "softcap": None}


def test_checkpointing_gives_the_same_gradients():
    inputs, labels = tiny_batch()
    table = ScoreTable.from_labels(labels)
    results = []
    for checkpointing in (False, True):
        model = attach_scoring(tiny_llama()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(gradients(model, model(**inputs, score_table=table)))
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name])


# ---- PEFT -----------------------------------------------------------------------------------------


def with_lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, **{"target_modules": ["q_proj"], **options}
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "saved"])
def test_peft_policy_and_reference(before, options):
    torch.manual_seed(0)
    base = tiny_llama()
    if before:
        attach_scoring(base)
    model = with_lora(base, **options).eval()
    if not before:
        assert attach_scoring(model) is model
    if options:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lm_head.modules_to_save" in name:
                    p.add_(0.3)
    inputs, labels = tiny_batch()
    table = ScoreTable.from_labels(labels)
    scores = model(**inputs, score_table=table)
    expected = by_cross_entropy(model(**inputs).logits, labels)
    torch.testing.assert_close(scores.logps.double(), expected, atol=2e-5, rtol=1e-6)
    got = gradients(model, scores)
    model.zero_grad()
    loss_of(expected).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert got.keys() == trained.keys()
    for name, grad in trained.items():
        torch.testing.assert_close(got[name], grad, atol=2e-6, rtol=1e-4)
    with torch.no_grad(), model.disable_adapter():
        reference = model(**inputs, score_table=table).logps
    plain = attach_scoring(tiny_llama())(**inputs, score_table=table).logps
    torch.testing.assert_close(reference, plain, atol=1e-5, rtol=1e-6)
    assert (reference - scores.logps).abs().max() > 1e-2


def test_a_dropout_on_the_head_has_no_plan_but_logits_and_a_learned_prompt_has_none():
    model = with_lora(tiny_llama(), target_modules=["lm_head"], lora_dropout=0.1)
    with pytest.raises(TensorError, match="carries an adapter"):
        attach_scoring(model, plan="recompute")
    late = attach_scoring(tiny_llama(), plan="recompute")
    inputs, labels = tiny_batch()
    wrapped = with_lora(late, target_modules=["lm_head", "q_proj"], lora_dropout=0.1)
    with pytest.raises(TensorError, match="carries an adapter"):
        wrapped(**inputs, score_table=ScoreTable.from_labels(labels))
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(TypeError, match="learns a prompt"):
        attach_scoring(peft.get_peft_model(tiny_llama(), config))


# ---- the loss inside ----


@pytest.mark.parametrize("plan", ["auto", "recompute", "pairwise", "logits"])
def test_a_term_beside_the_loss_inside_has_its_gradient(plan):
    inputs, labels = tiny_batch(3)
    table, ref_logps = ScoreTable.from_labels(labels), torch.randn(3, 2) - 20
    model = attach_scoring(tiny_llama())
    logps = model(**inputs, score_table=table).logps
    (preference_loss(logps, ref_logps).loss - 0.1 * logps[:, 0].mean()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    scores = attach_scoring(model, plan=plan, loss="dpo")(
        **inputs, score_table=table, ref_logps=ref_logps
    )
    (scores.loss - 0.1 * scores.logps[:, 0].mean()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("plan", ["auto", "recompute", "pairwise"])
@pytest.mark.parametrize(
    "loss", ["dpo", {"loss": "simpo", "beta": 2.0, "gamma": 0.5}, ["dpo", "sft"]]
)
def test_a_loss_inside_is_the_loss_outside(plan, loss):
    inputs, labels = tiny_batch(3)
    table, ref_logps = ScoreTable.from_labels(labels), torch.randn(3, 2) - 20
    options = loss if isinstance(loss, dict) else {"loss": loss}
    if loss == ["dpo", "sft"] and plan == "pairwise":
        options = {"loss": ["dpo", "ipo_sum"]}
    model = attach_scoring(tiny_llama())
    logps = model(**inputs, score_table=table).logps
    needs = options["loss"] != "simpo"
    ref = ref_logps if needs else None
    want = preference_loss(logps, ref, lengths=table.lengths, num_pairs=5, **options)
    want.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    attach_scoring(model, plan=plan, loss=options)
    scores = model(**inputs, score_table=table, ref_logps=ref, num_pairs=5)
    scores.loss.backward()
    torch.testing.assert_close(scores.loss, want.loss)
    torch.testing.assert_close(scores.logps.detach(), logps.detach())
    assert scores.preference.metrics.keys() == want.metrics.keys()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_the_reference_itself_is_scored_without_a_loss():
    inputs, labels = tiny_batch()
    model = attach_scoring(tiny_llama(), loss="dpo")
    with torch.no_grad():
        scores = model(**inputs, score_table=ScoreTable.from_labels(labels))
    assert scores.loss is None
    out = model(**inputs, score_table=ScoreTable.from_labels(labels), ref_logps=scores.logps)
    assert out.loss.item() == pytest.approx(0.6931472, abs=1e-6)
    assert attach_scoring(model)(**inputs, score_table=ScoreTable.from_labels(labels)).loss is None


def test_what_a_loss_inside_cannot_do_is_refused():
    inputs, labels = tiny_batch()
    table, ref = ScoreTable.from_labels(labels), torch.zeros(2, 2)
    with pytest.raises(ValueError, match="needs a `loss`"):
        attach_scoring(tiny_llama(), plan="pairwise")
    with pytest.raises(ValueError, match="unknown"):
        attach_scoring(tiny_llama(), loss="dppo")
    with pytest.raises(TypeError, match="`loss` must be a name"):
        attach_scoring(tiny_llama(), loss=[preference_loss])
    model = attach_scoring(tiny_llama())
    with pytest.raises(ValueError, match="`ref_logps` needs `attach_scoring"):
        model(**inputs, score_table=table, ref_logps=ref)
    with pytest.raises(ValueError, match="`ref_logps` needs a `score_table`"):
        model(**inputs, ref_logps=ref)
    attach_scoring(model, loss="dpo")
    with pytest.raises(ValueError, match="cannot be combined"):
        model(**inputs, score_table=table, ref_logps=ref, score_stats="entropy")


# ---- two processes --------------------------------------------------------------------------------


def two_ranks(rank, store, wrapper, result):
    """Each rank scores one of the two pairs; rank 0 writes what the wrapper made of the gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    inside = wrapper.endswith("loss inside")
    model = attach_scoring(tiny_llama(), loss={"loss": "dpo", "beta": 0.1} if inside else None)
    inputs, labels = tiny_batch(3 if inside else 2)
    # chosen and rejected of this rank's pairs; with the loss inside rank 1 has one more
    rows = [[0, 3], [1, 2, 4, 5]][rank] if inside else [rank, 2 + rank]
    mine = {name: value[rows] for name, value in inputs.items()}
    table = ScoreTable.from_labels(labels[rows])
    if wrapper.startswith("ddp"):
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        torch.distributed.init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer)
        if wrapper == "fsdp2, head by itself":
            fully_shard(model.lm_head)
        wrapped = fully_shard(model)
    if inside:
        ref_logps = torch.zeros(len(rows) // 2, 2)
        step = {"ref_logps": ref_logps, "num_pairs": 3}
        # DDP and FSDP2 average over ranks
        loss = 2 * wrapped(**mine, score_table=table, **step).loss
    else:
        loss = loss_of(wrapped(**mine, score_table=table).logps)
    loss.backward()
    grads = {}
    for name, p in model.named_parameters():
        grads[name] = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    if rank == 0:
        torch.save(grads, result)
    torch.distributed.barrier()


def spawn(tmp_path, wrapper):
    result = tmp_path / "grads.pt"
    imports = (*warm.TORCH, "transformers.models.llama.modeling_llama")
    warm.ranks(__name__, "two_ranks", tmp_path / "store", wrapper, result, imports=imports)
    return torch.load(result)


FSDP2_IS_RIGHT = pytest.mark.skipif(
    torch.__version__ < "2.9",
    reason="FSDP2 of torch 2.8 gives other gradients over gloo, of a plain model and loss, too",
)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", pytest.param("fsdp2", marks=FSDP2_IS_RIGHT)])
def test_two_processes_give_the_gradients_of_one(tmp_path, wrapper):
    model = attach_scoring(tiny_llama())
    inputs, labels = tiny_batch()
    one = gradients(model, model(**inputs, score_table=ScoreTable.from_labels(labels)))
    two = spawn(tmp_path, wrapper)
    assert one.keys() == two.keys()
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad, atol=1e-7, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrapper",
    ["ddp, loss inside", pytest.param("fsdp2, loss inside", marks=FSDP2_IS_RIGHT)],
)
def test_unequal_micro_batches_of_two_processes_give_the_mean_over_all_pairs(tmp_path, wrapper):
    model = attach_scoring(tiny_llama())
    inputs, labels = tiny_batch(3)
    one = gradients(model, model(**inputs, score_table=ScoreTable.from_labels(labels)))
    two = spawn(tmp_path, wrapper)
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad, atol=1e-7, rtol=1e-4)


@pytest.mark.slow
@FSDP2_IS_RIGHT
def test_a_head_that_is_sharded_by_itself_is_called_as_a_module(tmp_path):
    model = attach_scoring(tiny_llama())
    inputs, labels = tiny_batch()
    one = gradients(model, model(**inputs, score_table=ScoreTable.from_labels(labels)))
    two = spawn(tmp_path, "fsdp2, head by itself")
    assert one.keys() == two.keys()
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad, atol=1e-7, rtol=1e-5)
