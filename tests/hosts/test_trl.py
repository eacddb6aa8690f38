"""`dpo_ext.trl`: the collator equals TRL's, training equals stock TRL's, and a broken kernel does not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import trl
import trl_runs as runs
import warm
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers import models
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    TrainerCallback,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.errors import DataError
from dpo_ext.pairs import IDS
from dpo_ext.torch import forward
from dpo_ext.trl import DPOTrainer, PairCollator
from dpo_ext.trl.collator import REFERENCE, TABLE_KEY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*truncation mode is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*return_outputs=True.*:FutureWarning"),
]

SMOOTHING = {"robust": 0.1}  # without smoothing `robust` is `sigmoid`


@pytest.fixture(scope="module", params=["own", "shared"])
def material(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    if request.param == "own":
        return runs.write_material(out)
    if runs.shared_material(out) is None:
        pytest.skip("../shared/trl_fixtures is not beside this checkout")
    return out


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return runs.write_material(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def stock_sigmoid(own):
    """Stock TRL on `own`'s explicit text, which several tests compare with."""
    return runs.stock(own, runs.load(own, "text_explicit"))


def loss_options(loss: str) -> dict:
    return {"loss_type": loss, "label_smoothing": SMOOTHING.get(loss, 0.0)}


# --- the collator -----------------------------------------------------------------------------------------------------

ids = st.lists(st.integers(0, 400), max_size=9)
rows = st.fixed_dictionaries({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids})


@given(
    data=st.lists(rows, min_size=1, max_size=5),
    max_length=st.none() | st.integers(1, 20),
    mode=st.sampled_from(["keep_start", "keep_end"]),
    multiple=st.none() | st.integers(1, 8),
    reference=st.booleans(),
)
def test_collator_equals_trls_tensor_for_tensor(data, max_length, mode, multiple, reference):
    if reference:
        for index, row in enumerate(data):
            row |= {"ref_chosen_logps": -1.5 * index, "ref_rejected_logps": -0.1}
    options = {"max_length": max_length, "truncation_mode": mode, "pad_to_multiple_of": multiple}
    want = DataCollatorForPreference(pad_token_id=7, **options)(data)
    got = PairCollator(pad_token_id=7, **options)(data)
    assert list(want) == list(got)
    for name, tensor in want.items():
        if name == "input_ids" and not data[0]["prompt_ids"] + data[0]["chosen_ids"]:
            assert tensor.dtype == torch.float32, "TRL's corner that the docstring names"
            tensor = tensor.long()
        assert tensor.dtype == got[name].dtype, name
        assert torch.equal(tensor, got[name]), name


@pytest.mark.filterwarnings("ignore:no token is scored:UserWarning")
@given(
    data=st.lists(rows, min_size=1, max_size=5),
    max_length=st.none() | st.integers(1, 20),
    mode=st.sampled_from(["keep_start", "keep_end"]),
)
def test_collators_table_scores_every_completion_token_that_has_a_context(data, max_length, mode):
    batch = PairCollator(7, max_length, mode, score_table=True)(data)
    N, T = len(data), batch["input_ids"].shape[1]
    want_rows, want_targets, want_lengths = [], [], []
    for pair in range(N):
        for row in (pair, N + pair):
            scored = [t for t in range(1, T) if batch["completion_mask"][row, t]]
            want_rows += [row * T + t - 1 for t in scored]
            want_targets += [int(batch["input_ids"][row, t]) for t in scored]
            want_lengths.append(len(scored))
    table = batch[TABLE_KEY]
    assert table.logit_rows.tolist() == want_rows
    assert table.targets.tolist() == want_targets
    assert table.lengths.flatten().tolist() == want_lengths


@given(
    data=st.lists(rows, min_size=1, max_size=5),
    max_length=st.none() | st.integers(1, 20),
    mode=st.sampled_from(["keep_start", "keep_end"]),
    multiple=st.none() | st.integers(1, 8),
)
def test_packed_and_padded_batches_hold_the_same_sequences(data, max_length, mode, multiple):
    padded = PairCollator(7, max_length, mode, score_table=True)(data)
    packed = PairCollator(7, max_length, mode, multiple, score_table=True, layout="packed")(data)
    N, (_, T) = len(data), packed["input_ids"].shape
    order = [row for pair in range(N) for row in (pair, N + pair)]
    real = [padded["input_ids"][row][padded["attention_mask"][row] == 1].tolist() for row in order]
    tail = -sum(map(len, real)) % (multiple or 1)
    assert packed["input_ids"][0].tolist() == [*itertools.chain(*real), *[7] * tail]
    assert packed["num_tokens"] == T - tail
    segments = [n for n in (*map(len, real), tail) if n]
    assert packed["position_ids"][0].tolist() == [p for n in segments for p in range(n)]
    assert packed["cu_seq_lens_q"].tolist() == np.cumsum([0, *segments]).tolist()
    assert packed["max_length_q"] == packed["max_length_k"] == max(segments, default=0)
    want = padded["completion_mask"].sum(1)[order].reshape(N, 2)
    assert torch.equal(packed["completion_lengths"], want)
    one, other = padded[TABLE_KEY], packed[TABLE_KEY]
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.seq_offsets, other.seq_offsets)
    begins = dict(zip(order, np.cumsum([0, *map(len, real)]), strict=False))
    width = padded["input_ids"].shape[1]
    moved = [int(begins[r // width]) + r % width for r in one.logit_rows.tolist()]
    assert other.logit_rows.tolist() == moved


def test_a_packed_batch_needs_a_table():
    with pytest.raises(ValueError, match="`score_table=True`"):
        PairCollator(0, layout="packed")
    with pytest.raises(ValueError, match="`layout` must be one of"):
        PairCollator(0, layout="flat")


def test_collator_names_the_column_and_row_that_are_missing():
    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    with pytest.raises(DataError, match=r"row 2, `ref_chosen_logps`"):
        PairCollator(0)([row | {"ref_chosen_logps": 0.0}, row])
    with pytest.raises(DataError, match=r"row 1, `prompt_ids`"):
        PairCollator(0)([{"prompt": "Why?"}])


@pytest.mark.parametrize("wrong", [{"truncation_mode": "keep_all"}, {"max_length": 0}])
def test_collator_refuses_options_trl_does_not_have(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PairCollator(0, **wrong)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", runs.LOSSES)
@pytest.mark.parametrize("name", runs.FORMATS)
def test_training_equals_stock(material, name, loss):
    data = runs.load(material, name)
    expected = runs.stock(material, data, **loss_options(loss))
    found = runs.ours(material, data, **loss_options(loss))
    assert len(expected) == 5
    assert runs.differences(expected, found) == []


def roll_targets(monkeypatch):
    collate = PairCollator.__call__

    def broken(self, rows):
        batch = collate(self, rows)
        batch[TABLE_KEY].targets = batch[TABLE_KEY].targets.roll(1)
        return batch

    monkeypatch.setattr(PairCollator, "__call__", broken)


def scale_values(monkeypatch):
    for name in ("linear_sequence_logps", "sum_sequences"):
        right = getattr(forward, name)
        monkeypatch.setattr(
            forward, name, lambda *given, right=right, **options: -3 * right(*given, **options)
        )


def drop_a_pair(monkeypatch):
    collate = PairCollator.__call__
    monkeypatch.setattr(PairCollator, "__call__", lambda self, rows: collate(self, rows[:-1]))


@pytest.mark.parametrize("sabotage", [roll_targets, scale_values, drop_a_pair])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_training_differs_from_stock_when_the_kernel_is_broken(own, monkeypatch, sabotage, loss):
    data = runs.load(own, "text_explicit")
    expected = runs.stock(own, data, **loss_options(loss))
    sabotage(monkeypatch)
    lines = runs.differences(expected, runs.ours(own, data, **loss_options(loss)))
    assert any(line.startswith("row 0, grad_norm") for line in lines)
    assert any(line.startswith("row 1, loss") for line in lines)


VARIANTS = {
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "no checkpointing": {"gradient_checkpointing": False},
    "workers": {"dataloader_num_workers": 1},
    "several losses": {"loss_type": ["sigmoid", "hinge", "ipo"], "loss_weights": [0.7, 0.2, 0.01]},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3},
    "precomputed": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 5},
    "peft": {},
    "peft, head saved": {},
    "peft, precomputed": {"precompute_ref_log_probs": True},
    "peft, precomputed, evaluation": {
        "precompute_ref_log_probs": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_stock(own, variant):
    data = runs.load(own, "text_explicit")
    keywords = {}
    if "peft" in variant:
        saved = ["lm_head"] if "head saved" in variant else None
        keywords["peft_config"] = LoraConfig(
            r=4, task_type="CAUSAL_LM", modules_to_save=saved, target_modules=["q_proj", "v_proj"]
        )
    if "evaluation" in variant:
        data, keywords["eval_dataset"] = data.select(range(16)), data.select(range(16, 23))
    options = dict(VARIANTS[variant])
    if "peft" in variant:
        options["learning_rate"] = 1e-2  # an adapter starts at zero and moves slowly
    expected = runs.train(trl.DPOTrainer, own, data, keywords=keywords, **options)
    found = runs.train(DPOTrainer, own, data, keywords=keywords, **options)
    # With a cached reference the first accuracies compare rounding errors with rounding errors.
    skip = ("rewards/accuracies",) if "precomputed" in variant else ()
    assert runs.differences(expected, found, skip=skip) == []
    assert abs(expected[-2].get("rewards/margins", 1.0)) > 1e-4


@pytest.mark.parametrize(
    "variant", ["accumulation", "evaluation", "precomputed", "no checkpointing"]
)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_packed_training_equals_stock(own, variant, loss):
    """Other widths, other estimates of the FLOPs; everything else is that of padded batches."""
    data = runs.load(own, "chat_explicit" if loss == "sigmoid" else "text_explicit")
    keywords = {"layout": "packed"}
    stock = {}
    if variant == "evaluation":
        data, held_out = data.select(range(16)), data.select(range(16, 23))
        stock = {"eval_dataset": held_out}
    options = VARIANTS[variant] | loss_options(loss)
    expected = runs.train(trl.DPOTrainer, own, data, keywords=stock, **options)
    trainer = runs.build(DPOTrainer, own, data, keywords | stock, **options)
    trainer.train()
    assert trainer.layout == "packed"
    skip = ("rewards/accuracies",) if variant == "precomputed" else ()
    assert runs.differences(expected, runs.history(trainer), skip=(*skip, "total_flos")) == []


def test_a_model_that_leaks_steps_back_to_padded_batches_before_it_trains(own, caplog):
    """One that is told neither positions nor offsets sees a row as one text."""
    model = AutoModelForCausalLM.from_pretrained(own / "model", dtype=torch.float32)
    forward = model.model.forward

    def untold(*args, position_ids=None, cu_seq_lens_q=None, cu_seq_lens_k=None, **inputs):
        return forward(*args, **inputs)

    model.model.forward = untold
    args = runs.config(own)
    data = runs.load(own, "text_explicit")
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=data,
        processing_class=runs.tokenizer(own),
        layout="packed",
    )
    assert trainer.layout == trainer.data_collator.layout == "padded"
    assert "layout: TRL's own, as packed segments see each other" in caplog.text
    trainer.train()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_pairs_without_a_prompt_equal_stock(own, loss):
    """Their first token is not scored, and yet TRL's `ipo` counts it."""
    rows = runs.load(own, "text_explicit").to_list()
    for row in rows[::2]:
        row["prompt"] = ""
    data = Dataset.from_list(rows)
    expected = runs.stock(own, data, **loss_options(loss))
    assert runs.differences(expected, runs.ours(own, data, **loss_options(loss))) == []


ARCHITECTURES = {
    "Qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "Gemma2": (Gemma2Config, {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "Granite": (GraniteConfig, {"logits_scaling": 4.0}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_equal_stock(own, tmp_path, name):
    """Tied heads, and what a configuration does to the logits."""
    kind, options = ARCHITECTURES[name]
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = kind(vocab_size=384, **shape, **heads, **options, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        tmp_path / "model"
    )
    runs.tokenizer(own).save_pretrained(tmp_path / "model")
    data = runs.load(own, "text_explicit")
    expected = runs.stock(tmp_path, data)
    assert abs(expected[1]["loss"] - np.log(2)) > 1e-4
    assert runs.differences(expected, runs.ours(tmp_path, data)) == []


def test_a_given_reference_model_is_the_reference(own):
    data = runs.load(own, "text_explicit")

    def keywords():
        other = AutoModelForCausalLM.from_pretrained(own / "model", dtype=torch.float32)
        torch.manual_seed(1)
        with torch.no_grad():
            other.lm_head.weight += 0.01 * torch.randn_like(other.lm_head.weight)
        return {"ref_model": other}

    expected = runs.train(trl.DPOTrainer, own, data, keywords=keywords())
    found = runs.train(DPOTrainer, own, data, keywords=keywords())
    assert abs(expected[0]["loss"] - np.log(2)) > 1e-3
    assert runs.differences(expected, found) == []


def test_an_adapter_that_is_there_already_is_its_own_reference(own):
    data = runs.load(own, "text_explicit")

    def model():
        torch.manual_seed(2)
        base = AutoModelForCausalLM.from_pretrained(own / "model", dtype=torch.float32)
        lora = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
        return get_peft_model(base, lora)

    histories = []
    for kind in (trl.DPOTrainer, DPOTrainer):
        args = runs.config(own, learning_rate=1e-3)
        trainer = kind(model(), args=args, train_dataset=data, processing_class=runs.tokenizer(own))
        trainer.train()
        histories.append(runs.history(trainer))
    # Against the base model, which the adapter is far from, step 0 would be far from log 2.
    assert abs(histories[1][0]["loss"] - np.log(2)) < max(1e-5, runs.LOGGED)
    assert runs.differences(*histories) == []


def test_bfloat16_autocast_is_as_close_as_bfloat16_is(own, stock_sigmoid):
    data = runs.load(own, "text_explicit")
    expected = runs.stock(own, data, bf16=True)
    found = runs.ours(own, data, bf16=True)
    for want, exact, got in zip(expected[:4], stock_sigmoid, found, strict=False):
        for key, slack in [("loss", 5e-3), ("logps/chosen", 0.5), ("grad_norm", 0.2)]:
            assert abs(got[key] - exact[key]) <= abs(want[key] - exact[key]) + slack, key
    assert found[0]["loss"] == pytest.approx(np.log(2), abs=runs.LOGGED), (
        "both forwards autocast alike"
    )


def test_compute_metrics_sees_the_logits_stock_would_show(own):
    data = runs.load(own, "text_explicit")
    results = []
    for kind in (trl.DPOTrainer, DPOTrainer):
        seen = []

        def compute_metrics(prediction, seen=seen):
            seen.append(prediction.predictions)
            return {"spread": float(np.std(prediction.predictions))}

        keywords = {"eval_dataset": data.select(range(6)), "compute_metrics": compute_metrics}
        trainer = runs.build(kind, own, data, keywords)
        results.append((trainer.evaluate(), seen[0]))
    (want, want_logits), (got, got_logits) = results
    assert want_logits.shape[-1] == 384
    assert got["eval_spread"] == pytest.approx(want["eval_spread"], rel=1e-6)
    np.testing.assert_allclose(got_logits, want_logits, atol=1e-5)


@pytest.mark.parametrize("reference", ["live", "precomputed by PEFT"])
def test_evaluating_a_dataset_equals_stock_before_and_after_training(own, reference):
    data = runs.load(own, "text_explicit")
    other = runs.load(own, "chat_explicit", slice(0, 7))
    several = {"chat": other, "text": data.select(range(5))}
    results = []
    for kind in (trl.DPOTrainer, DPOTrainer):
        keywords = {}
        if reference != "live":
            keywords["peft_config"] = LoraConfig(r=4, task_type="CAUSAL_LM")
        options = {"precompute_ref_log_probs": reference != "live", "learning_rate": 5e-3}
        trainer = runs.build(kind, own, data, keywords, **options)
        values = [trainer.evaluate(other)]
        trainer.train()
        values += [trainer.evaluate(other), trainer.evaluate(several)]
        results.append([runs.without_timings(row) for row in values])
    # Accuracies before training compare rounding errors where the reference is a cached one.
    for row in (results[0][0], results[1][0]):
        del row["eval_rewards/accuracies"]
    assert runs.differences(*results) == []
    assert results[1][0]["eval_loss"] == pytest.approx(np.log(2), abs=runs.LOGGED)
    assert abs(results[1][1]["eval_loss"] - np.log(2)) > 1e-3


def test_data_with_reference_columns_is_evaluated_after_training(own):
    data = runs.load(own, "text_explicit")
    other = runs.load(own, "chat_explicit", slice(0, 7))
    live = runs.build(DPOTrainer, own, data)
    live.train()
    expected = live.evaluate(other)

    trainer = runs.build(DPOTrainer, own, data, precompute_ref_log_probs=True)
    prepared = trainer._prepare_dataset(other, trainer.processing_class, trainer.args, "other")
    with_reference = trainer._precompute_ref_logps(prepared, "other", 4)
    trainer.train()
    with pytest.raises(ValueError, match="after training has started"):
        trainer.evaluate(other)
    found = trainer.evaluate(with_reference)
    keys = ["eval_loss", "eval_rewards/margins", "eval_logps/chosen"]
    for key in keys:
        assert found[key] == pytest.approx(expected[key], abs=1e-4), key


def test_resuming_gives_the_history_of_an_uninterrupted_run(own):
    data = runs.load(own, "text_explicit")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}  # 6 steps an epoch
    whole = runs.build(DPOTrainer, own, data, **options)
    whole.train()
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    resumed = runs.build(DPOTrainer, own, data, **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    # `num_tokens` starts again at 0, in TRL too; the closing summary averages over the resumed steps alone.
    first, second = runs.history(whole)[:-1], runs.history(resumed)[:-1]
    assert len(first) == 8
    assert runs.differences(first, second, skip=("num_tokens",)) == []
    resumed_logs = trainer_logs(resumed)
    assert resumed_logs == trainer_logs(whole)[-len(resumed_logs) :]


def trainer_logs(trainer):
    return [row["loss"] for row in runs.history(trainer)[:-1]]


# --- the data ---------------------------------------------------------------------------------------------------------


def test_ids_equal_stocks(material):
    for name in runs.FORMATS:
        data = runs.load(material, name)
        stock = runs.build(trl.DPOTrainer, material, data).train_dataset
        found = runs.build(DPOTrainer, material, data).train_dataset
        for column in IDS:
            assert found[:][column] == stock[:][column], (name, column)


def test_the_prompt_ends_where_trl_ends_it(own):
    """The prompt alone, "ab", is one token; with "c" behind it, it is "a" and half of "bc": TRL keeps none of it."""
    tokens = ["<pad>", "<eos>", "a", "b", "c", "bc", "ab"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    bpe = models.BPE(vocab=vocabulary, merges=[("b", "c"), ("a", "b")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(bpe), pad_token="<pad>", eos_token="<eos>"
    )
    row = {"prompt": "ab", "chosen": "ca", "rejected": "cb"}
    joint = PairDataset.from_rows([row], Tokenizer.from_pretrained(tokenizer), boundary="joint")
    assert joint.prompt_ids[0].tolist() == [2]
    data = Dataset.from_list([row])
    for kind in (trl.DPOTrainer, DPOTrainer):
        (found,) = runs.build(kind, own, data, {"processing_class": tokenizer}).train_dataset
        assert [found[name] for name in IDS] == [[], [2, 5, 2, 1], [2, 5, 3, 1]]


def test_ids_of_rows_with_tools_equal_stocks(own):
    tokenizer = runs.tokenizer(own)
    tokenizer.chat_template = (
        "{% if tools %}<say>tools {{ tools | tojson }}{% endif %}{% if loud %}LOUD {% endif %}"
        + tokenizer.chat_template
    )
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"q": "Käse"}}}]
    rows = runs.load(own, "chat_explicit").select(range(3)).to_list()
    for row, loud in zip(rows, (True, False, True), strict=True):
        row |= {"tools": json.dumps(tools), "chat_template_kwargs": {"loud": loud}}
    data = Dataset.from_list(rows)
    keywords = {"processing_class": tokenizer}
    stock = runs.build(trl.DPOTrainer, own, data, keywords).train_dataset
    found = runs.build(DPOTrainer, own, data, keywords).train_dataset
    plain = runs.build(DPOTrainer, own, data.remove_columns("tools"), keywords).train_dataset
    assert found[:]["prompt_ids"] == stock[:]["prompt_ids"] != plain[:]["prompt_ids"]
    assert found[:]["chosen_ids"] == stock[:]["chosen_ids"]


@pytest.mark.parametrize("name", ["text_implicit", "text_explicit"])
def test_data_to_evaluate_on_have_the_prompts_that_callbacks_generate_from(own, name):
    data = runs.load(own, name, slice(0, 6))
    found = [
        runs.build(kind, own, data, {"eval_dataset": data}, eval_strategy="steps").eval_dataset
        for kind in (trl.DPOTrainer, DPOTrainer)
    ]
    assert list(found[1]["prompt"]) == list(found[0]["prompt"])
    assert len(set(found[0]["prompt"])) == 6


def test_rows_whose_prompt_fills_max_length_are_dropped_as_stock_drops_them(own):
    data = runs.load(own, "text_explicit")
    stock = runs.build(trl.DPOTrainer, own, data, max_length=60).train_dataset
    trainer = runs.build(DPOTrainer, own, data, max_length=60)
    assert 0 < len(stock) < len(data)
    assert trainer.train_dataset[:]["prompt_ids"] == stock[:]["prompt_ids"]
    report = trainer.data_reports["train"]
    assert (report.read, report.kept) == (len(data), len(stock))
    assert sum(report.dropped.values()) == len(data) - len(stock)


def test_no_usable_row_is_an_error_that_says_why(own):
    with pytest.raises(DataError, match=r"`train`: no row gives a pair\n.* rows read, 0 kept"):
        runs.build(DPOTrainer, own, runs.load(own, "text_explicit"), max_length=2)


def test_rows_of_token_ids_pass_and_train_alike(own, stock_sigmoid):
    trainer = runs.build(DPOTrainer, own, runs.load(own, "text_explicit"))
    ids = Dataset.from_dict(trainer.train_dataset[:])
    assert runs.differences(stock_sigmoid, runs.ours(own, ids)) == []


def test_preparing_twice_changes_nothing(own):
    trainer = runs.build(DPOTrainer, own, runs.load(own, "text_explicit"))
    once = trainer.train_dataset
    twice = trainer._prepare_dataset(once, trainer.processing_class, trainer.args, "train")
    assert twice[:] == once[:]


def test_reference_columns_of_the_rows_are_used(own):
    data = runs.load(own, "text_explicit")
    first = runs.build(DPOTrainer, own, data, precompute_ref_log_probs=True)
    for name in REFERENCE:
        data = data.add_column(name, [v - 1.0 for v in first.train_dataset[:][name]])
    second = runs.build(DPOTrainer, own, data, {"audit": False}, precompute_ref_log_probs=True)
    second.train()
    assert second.state.log_history[0]["rewards/chosen"] == pytest.approx(runs.BETA, abs=1e-4)


def test_precomputing_leaves_the_random_state_alone(own):
    trainer = runs.build(DPOTrainer, own, runs.load(own, "text_explicit"))
    before = torch.get_rng_state()
    trainer._precompute_ref_logps(trainer.train_dataset, "train", 4)
    assert torch.equal(before, torch.get_rng_state())


# --- the seams --------------------------------------------------------------------------------------------------------


def test_a_batch_of_ours_in_a_stock_method_raises(own):
    data = runs.load(own, "text_explicit")
    trainer = runs.build(DPOTrainer, own, data)
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(TypeError, match=TABLE_KEY):
        trl.DPOTrainer._compute_loss(trainer, trainer.model, batch, False)
    with pytest.raises(TypeError, match=TABLE_KEY):
        trl.DPOTrainer.compute_ref_log_probs(trainer, trainer.model, batch)
    stock = runs.build(trl.DPOTrainer, own, data, {"data_collator": trainer.data_collator})
    with pytest.raises(TypeError, match=TABLE_KEY):
        stock.train()


def test_the_collator_without_a_table_serves_stock_trl(own, stock_sigmoid):
    pad = runs.tokenizer(own).pad_token_id
    keywords = {"data_collator": PairCollator(pad, max_length=512)}
    data = runs.load(own, "text_explicit")
    found = runs.train(trl.DPOTrainer, own, data, keywords=keywords)
    assert runs.differences(stock_sigmoid, found) == []


def test_a_batch_with_a_foreign_key_or_without_table_and_mask_raises(own):
    trainer = runs.build(DPOTrainer, own, runs.load(own, "text_explicit"))
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="`pair_index`"):
        trainer.compute_loss(trainer.model, batch | {"pair_index": torch.arange(4)})
    loss = trainer.compute_loss(trainer.model, dict(batch))
    del batch[TABLE_KEY]
    assert torch.equal(trainer.compute_loss(trainer.model, dict(batch)), loss)  # from its mask
    del batch["completion_mask"]
    with pytest.raises(ValueError, match="`completion_mask`"):
        trainer.compute_loss(trainer.model, batch)


def test_generation_is_unchanged(own):
    prompt = torch.tensor([[5, 6, 7, 8]])
    plain = AutoModelForCausalLM.from_pretrained(own / "model", dtype=torch.float32)
    trainer = runs.build(DPOTrainer, own, runs.load(own, "text_explicit"))
    want = plain.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(trainer.model.generate(prompt, max_new_tokens=8, do_sample=False), want)


def test_snippet_c_of_the_design_runs_as_written(own):
    from datasets import load_dataset
    from trl import DPOConfig

    ds = load_dataset("json", data_files=str(own / "chat_explicit.jsonl"), split="train")
    tok = runs.tokenizer(own)
    model = AutoModelForCausalLM.from_pretrained(own / "model", dtype=torch.float32)
    options = dataclasses.asdict(runs.config(own, max_steps=1))
    options = {k: options[k] for k in ("output_dir", "max_steps", "use_cpu", "bf16", "report_to")}

    from dpo_ext.trl import DPOTrainer

    trainer = DPOTrainer(
        model,
        args=DPOConfig(**options),
        train_dataset=ds,
        processing_class=tok,
        layout="packed",
    )
    trainer.train()
    assert trainer.state.global_step == 1


class KeepGradients(TrainerCallback):
    """The gradients of the first step, as the optimizer is about to see them."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if self.first is None:
            self.first = {name: p.grad.clone() for name, p in model.named_parameters()}


def test_two_processes_have_the_gradients_of_one(own, tmp_path):
    """DDP over gloo: a rank sees half of a step's pairs. The number of rows is odd: the last batch is not even."""
    keep = KeepGradients()
    data = runs.load(own, "text_explicit", slice(0, 23))
    trainer = runs.build(DPOTrainer, own, data, {"callbacks": [keep]}, max_grad_norm=1e9)
    trainer.train()

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    imports = (*warm.TORCH, "trl", "dpo_ext.trl", "transformers.models.llama.modeling_llama")
    warm.ranks(__name__, "one_rank", port, own, tmp_path, imports=imports)

    for run in ("live", "precomputed"):
        one, other = (torch.load(tmp_path / f"{run}{rank}.pt") for rank in range(2))
        for name, gradient in keep.first.items():
            assert torch.equal(one[name], other[name]), name
            assert (one[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
        found = json.loads((tmp_path / f"{run}.json").read_text())
        # Halves of a batch are padded less; a cached reference moves accuracies from exact ties.
        skip = ("total_flos", "rewards/accuracies") if run == "precomputed" else ("total_flos",)
        assert runs.differences(runs.history(trainer), found, skip=skip) == []


def one_rank(rank: int, port: str, material: str, out: str) -> None:
    """One rank of the test above: its gradients, and from the first rank the history, to files."""
    material, out = Path(material), Path(out)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    data = runs.load(material, "text_explicit", slice(0, 23))
    for run in ("live", "precomputed"):
        keep = KeepGradients()
        options = {"per_device_train_batch_size": 2, "max_grad_norm": 1e9}
        if run == "precomputed":
            options |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
        trainer = runs.build(DPOTrainer, material, data, {"callbacks": [keep]}, **options)
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        gradients = {name.removeprefix("module."): g for name, g in keep.first.items()}
        assert trainer.accelerator.process_index == rank
        torch.save(gradients, out / f"{run}{rank}.pt")
        if rank == 0:
            (out / f"{run}.json").write_text(json.dumps(runs.history(trainer)))
    torch.distributed.barrier()
