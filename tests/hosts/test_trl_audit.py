"""The audit of `dpo_ext.trl.DPOTrainer`: a stale or wrong reference stops the first step, and says what it looks like."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import trl_runs as runs
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from dpo_ext.errors import RefLogpsError
from dpo_ext.trl import DPOTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return runs.write_material(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(own):
    return runs.load(own, "text_explicit")


@pytest.fixture(scope="module")
def scored(own, data):
    """The data with the reference's log-probs, as the trainer itself computes them."""
    trainer = runs.build(DPOTrainer, own, data, {}, precompute_ref_log_probs=True)
    columns = np.array([trainer.train_dataset[name] for name in COLUMNS])
    return with_columns(data, columns.T)


def with_columns(data, values):
    for index, name in enumerate(COLUMNS):
        data = data.add_column(name, np.asarray(values)[:, index].tolist())
    return data


def first_step(own, data, ours=None, **options):
    trainer = runs.build(DPOTrainer, own, data, ours or {}, **{"max_steps": 1, **options})
    trainer.train()
    return trainer


def refused(own, data, **options) -> str:
    with pytest.raises(RefLogpsError) as caught:
        first_step(own, data, **options)
    return str(caught.value)


def changed(scored, change):
    values = change(np.array([scored[name] for name in COLUMNS]).T)
    return with_columns(scored.remove_columns(list(COLUMNS)), values)


def test_columns_of_this_model_pass(own, scored):
    first_step(own, scored, precompute_ref_log_probs=True)


@pytest.mark.parametrize(
    ("change", "looks_like"),
    [
        (lambda v: v[:, ::-1], "chosen and rejected are swapped"),
        (lambda v: v - 5.0, "usual causes: dropout"),
        (lambda v: np.roll(v, 1, axis=0), "sequences have other log-probs"),
    ],
)
def test_columns_that_are_not_of_this_model_stop_the_first_step(own, scored, change, looks_like):
    message = refused(own, changed(scored, change), precompute_ref_log_probs=True)
    assert looks_like in message
    assert "hint: audit=False" in message


def test_without_an_audit_wrong_columns_train_as_in_stock(own, scored):
    wrong = changed(scored, lambda v: v - [5.0, 0.0])
    trainer = first_step(own, wrong, {"audit": False}, precompute_ref_log_probs=True)
    assert trainer.state.log_history[0]["loss"] != pytest.approx(np.log(2), abs=0.01)


def test_columns_of_another_max_length_stop_the_first_step(own, scored):
    message = refused(own, scored, precompute_ref_log_probs=True, max_length=24)
    assert "sequences have other log-probs" in message


def test_a_reference_with_other_weights_is_another_model(own, data, caplog):
    with caplog.at_level(logging.INFO, "dpo_ext.trl.first_step"):
        first_step(own, data, {"ref_model": other_reference(own)})
    assert "the reference has other weights, `" in caplog.text


def test_dropout_that_was_left_on_is_a_warning_with_its_size(own, data, caplog):
    model = AutoModelForCausalLM.from_pretrained(str(own / "model"))
    reference = AutoModelForCausalLM.from_pretrained(str(own / "model"))
    for one in (model, reference):
        layer = one.model.layers[0].mlp
        layer.act_fn = torch.nn.Sequential(layer.act_fn, torch.nn.Dropout(0.5))
    trainer = DPOTrainer(
        model,
        reference.eval(),
        args=runs.config(own, max_steps=1, disable_dropout=False),
        train_dataset=data,
        processing_class=runs.tokenizer(own),
    )
    with caplog.at_level(logging.WARNING, "dpo_ext.trl.first_step"):
        trainer.train()
    assert "dropout is on in the policy: Dropout 0.5; in evaluation mode it is" in caplog.text
    assert model.training


def other_reference(own):
    other = AutoModelForCausalLM.from_pretrained(str(own / "model"))
    with torch.no_grad():
        other.lm_head.weight += 0.5
    return other


def test_a_reference_with_other_weights_is_another_model_when_it_is_precomputed_too(
    own, data, caplog
):
    ours = {"ref_model": other_reference(own)}
    with caplog.at_level(logging.INFO, "dpo_ext.trl.first_step"):
        first_step(own, data, ours, precompute_ref_log_probs=True)
    assert "the reference has other weights, `" in caplog.text


@pytest.mark.parametrize("disable", [True, False])
def test_dropout_that_is_no_module_is_a_warning_too(own, data, caplog, disable):
    config = LlamaConfig.from_pretrained(str(own / "model"), attention_dropout=0.5)
    models = [AutoModelForCausalLM.from_pretrained(str(own / "model"), config=config) for _ in "pr"]
    trainer = DPOTrainer(
        *models,
        args=runs.config(own, max_steps=1, disable_dropout=disable),
        train_dataset=data,
        processing_class=runs.tokenizer(own),
    )
    with caplog.at_level(logging.WARNING, "dpo_ext.trl.first_step"):
        trainer.train()
    assert "its training mode draws numbers; in evaluation mode it is" in caplog.text


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_a_fresh_dora_in_bfloat16_passes(own, data, targets):
    lora = LoraConfig(r=4, use_dora=True, target_modules=targets, task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(str(own / "model"), dtype=torch.bfloat16),
        args=runs.config(own, max_steps=1),
        train_dataset=data,
        processing_class=runs.tokenizer(own),
        peft_config=lora,
    )
    trainer.train()


def test_an_adapter_at_zero_passes_and_pissa_is_named(own, data):
    first_step(own, data, {"peft_config": LoraConfig(r=2, target_modules="all-linear")})
    pissa = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(
        RefLogpsError, match="`init_lora_weights='pissa'` changes the weights below"
    ):
        first_step(own, data, {"peft_config": pissa})


def test_evaluation_before_training_is_not_audited_and_does_not_spend_the_audit(own, scored):
    wrong = changed(scored, lambda v: v - 5.0)
    trainer = runs.build(
        DPOTrainer, own, wrong, {"eval_dataset": wrong}, precompute_ref_log_probs=True, max_steps=1
    )
    trainer.evaluate()
    with pytest.raises(RefLogpsError):
        trainer.train()
