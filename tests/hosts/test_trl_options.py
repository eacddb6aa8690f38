"""Every option of TRL is honoured as stock honours it, or refused by name; none is accepted and ignored."""

from __future__ import annotations

import dataclasses
import inspect
import logging

import pytest
import torch
import transformers
import trl
import trl_runs as runs
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig

import dpo_ext.trl
from dpo_ext.data.dataset import PairDataset
from dpo_ext.torch.losses import compat as loss_compat
from dpo_ext.trl import HONOURED, REFUSED, DPOTrainer
from dpo_ext.trl.collator import REFERENCE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*deprecated.*v2.0.0.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

# A value that a refused option must not have. Those of TrainingArguments that would need hardware are set afterwards.
REFUSED_VALUES = {
    "padding_free": True,
    "ld_alpha": 0.5,
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.3,
    "use_weighting": True,
    "discopop_tau": 0.1,
    "activation_offloading": True,
    "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 8,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "label_smoothing_factor": 0.1,
    "torch_compile": True,
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "fsdp": True,
    "parallelism_config": object(),
}


def own_fields() -> set[str]:
    inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    return {field.name for field in dataclasses.fields(trl.DPOConfig)} - inherited


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return runs.write_material(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(own):
    return runs.load(own, "text_explicit")


@pytest.fixture(scope="module")
def stock_sigmoid(own, data):
    return runs.stock(own, data)


def test_every_field_of_dpo_config_is_honoured_or_refused():
    """Fails when TRL adds a field: decide what it is before it can be ignored."""
    assert HONOURED.keys().isdisjoint(REFUSED)
    assert own_fields() <= HONOURED.keys() | REFUSED.keys()
    every = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    assert HONOURED.keys() | REFUSED.keys() <= every


def test_every_argument_of_the_constructor_is_ours_too():
    stock = inspect.signature(trl.DPOTrainer.__init__).parameters
    found = inspect.signature(DPOTrainer.__init__).parameters
    assert list(found)[: len(stock)] == list(stock)
    assert set(found) - set(stock) == {"layout", "data_options"}
    assert all(found[name].default == stock[name].default for name in stock)


def test_the_defaults_of_refused_options_are_allowed(own):
    args = runs.config(own)
    for name, (allowed, _) in REFUSED.items():
        assert getattr(args, name) in allowed, name


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options_are_named(own, data, name):
    args = runs.config(own)
    setattr(args, name, REFUSED_VALUES[name])
    with pytest.raises(ValueError, match=f"`{name}`"):
        DPOTrainer(str(own / "model"), args=args, train_dataset=data)


@pytest.mark.parametrize(
    "loss",
    [
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "sft",
        "sigmoid_norm",
        "no such loss",
    ],
)
def test_other_losses_are_refused(own, data, loss):
    args = runs.config(own, loss_type=["sigmoid", loss], label_smoothing=0.1)
    with pytest.raises(ValueError, match=f"`loss_type`.*'{loss}'"):
        DPOTrainer(str(own / "model"), args=args, train_dataset=data)


@pytest.mark.parametrize(
    "wrong",
    [{"beta": 0.0}, {"loss_type": "robust", "label_smoothing": 0.5}],
    ids=["beta", "robust"],
)
def test_values_outside_the_domain_of_the_loss_are_refused_before_training(own, data, wrong):
    args = runs.config(own, **wrong)
    with pytest.raises(ValueError, match=f"`{list(wrong)[-1]}` must be"):
        DPOTrainer(str(own / "model"), args=args, train_dataset=data)


# Options that leave a trace in the history: with them ours equals stock, and stock differs from stock without them.
TRACED = {
    "max_length": {"max_length": 90},
    "truncation_mode": {"max_length": 60, "truncation_mode": "keep_end"},
    "pad_to_multiple_of": {"pad_to_multiple_of": 64},
    "loss_type": {"loss_type": "hinge"},
    "loss_weights": {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.3, 2.0]},
    "label_smoothing": {"loss_type": "robust", "label_smoothing": 0.2},
    "beta": {"beta": 0.3},
    "disable_dropout": {
        "disable_dropout": False,
        "model_init_kwargs": {"attention_dropout": 0.5, "attn_implementation": "eager"},
    },
}
# Options that do not; each has a test below.
UNTRACED = {
    "model_init_kwargs",
    "trust_remote_code",
    "dataset_num_proc",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "pad_token",
    "router_aux_loss_coef",
}


def test_every_honoured_option_is_tested():
    assert TRACED.keys() | UNTRACED == HONOURED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACED)
def test_honoured_options_do_what_stock_does(own, data, stock_sigmoid, name):
    expected = runs.stock(own, data, **TRACED[name])
    assert runs.differences(stock_sigmoid, expected) != []
    assert runs.differences(expected, runs.ours(own, data, **TRACED[name])) == []


def test_model_init_kwargs_reach_the_model_and_its_reference(own, data):
    kwargs = {"dtype": "bfloat16", "attn_implementation": "eager"}
    trainer = runs.build(DPOTrainer, own, data, model_init_kwargs=kwargs, trust_remote_code=False)
    for model in (trainer.model, trainer.ref_model):
        assert model.dtype == torch.bfloat16
        assert model.config._attn_implementation == "eager"


def test_trust_remote_code_reaches_the_loader(own, data, monkeypatch):
    seen = []
    load = trl.trainer.dpo_trainer.create_model_from_path

    def spy(path, **kwargs):
        seen.append(kwargs["trust_remote_code"])
        return load(path, **kwargs)

    monkeypatch.setattr(trl.trainer.dpo_trainer, "create_model_from_path", spy)
    runs.build(DPOTrainer, own, data, trust_remote_code=True)
    assert seen == [True, True]


def test_dataset_num_proc_is_the_number_of_threads(own, data, monkeypatch):
    seen = []
    from_rows = PairDataset.from_rows

    def spy(rows, tokenizer, **options):
        seen.append(options["threads"])
        return from_rows(rows, tokenizer, **options)

    monkeypatch.setattr(dpo_ext.trl.trainer.PairDataset, "from_rows", spy)
    runs.build(DPOTrainer, own, data, dataset_num_proc=2)
    assert seen == [2]


def test_precomputed_references_need_no_second_model_and_are_computed_in_the_batches_asked_for(
    own, data, monkeypatch
):
    sizes = []
    compute = DPOTrainer.compute_ref_log_probs

    def spy(self, model, inputs):
        chosen, rejected = compute(self, model, inputs)
        sizes.append(len(chosen))
        return chosen, rejected

    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", spy)
    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 9}
    trainer = runs.build(DPOTrainer, own, data, **options)
    assert trainer.ref_model is None
    assert sizes == [9, 9, 6]
    stock = runs.build(trl.DPOTrainer, own, data, **options)
    for name in REFERENCE:
        found = torch.tensor(trainer.train_dataset[:][name])
        assert (found - torch.tensor(stock.train_dataset[:][name])).abs().max() <= runs.LOGPS_BOUND


def test_precomputed_references_are_never_stale(own, data):
    """Stock TRL's cache does not see this change: its loss starts away from log 2 then."""
    options = {"precompute_ref_log_probs": True, "truncation_mode": "keep_end"}
    runs.build(DPOTrainer, own, data, max_length=50, **options)
    history = runs.ours(own, data, max_length=512, **options)
    assert history[0]["loss"] == pytest.approx(0.693147, abs=max(1e-5, runs.LOGGED))


def test_pad_token_is_what_batches_are_padded_with(own, data):
    trainer = runs.build(DPOTrainer, own, data, pad_token="<say>")
    assert trainer.data_collator.pad_token_id == 1
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {1}


@pytest.mark.slow
def test_label_smoothing_that_the_loss_ignores_warns_once_and_changes_nothing(
    own, data, stock_sigmoid, monkeypatch
):
    monkeypatch.setattr(loss_compat, "_warned", set())
    with pytest.warns(UserWarning, match="label_smoothing") as caught:
        found = runs.ours(own, data, label_smoothing=0.3)
    assert sum("label_smoothing" in str(w.message) for w in caught) == 1
    assert runs.differences(stock_sigmoid, found) == []


# --- arguments of the constructor -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["shared", "flat"])
def test_other_layouts_are_refused(own, data, layout):
    with pytest.raises(ValueError, match=f"`layout`.*'{layout}'"):
        runs.build(DPOTrainer, own, data, {"layout": layout})


def test_packed_batches_have_no_padded_logits_for_compute_metrics(own, data):
    keywords = {"layout": "packed", "compute_metrics": lambda _: {}}
    with pytest.raises(ValueError, match="`compute_metrics` must be None"):
        runs.build(DPOTrainer, own, data, keywords)


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("data_collator", dpo_ext.trl.PairCollator(0)),
        ("quantization_config", object()),
        ("peft_config", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        ("peft_config", LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])),
        ("eval_dataset", IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))),
        ("eval_dataset", {"one": IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))}),
    ],
)
def test_other_values_of_an_argument_are_refused(own, data, keyword, value):
    name = "lm_head" if "lm_head" in str(value) else keyword
    with pytest.raises(ValueError, match=name):
        runs.build(DPOTrainer, own, data, {keyword: value})


def test_a_model_that_learns_a_prompt_is_refused(own, data):
    model = AutoModelForCausalLM.from_pretrained(own / "model", dtype=torch.float32)
    model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    args, tokenizer = runs.config(own), runs.tokenizer(own)
    with pytest.raises(ValueError, match="`model`: prompt learning"):
        DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_a_quantized_model_is_refused(own, data, name):
    models = {
        key: AutoModelForCausalLM.from_pretrained(own / "model", dtype=torch.float32)
        for key in ("model", "ref_model")
    }
    models[name].is_quantized = True
    args, tokenizer = runs.config(own), runs.tokenizer(own)
    with pytest.raises(ValueError, match=f"`{name}`: quantized"):
        DPOTrainer(**models, args=args, train_dataset=data, processing_class=tokenizer)


def test_a_processor_of_images_is_refused(own, data):
    class Processor(transformers.ProcessorMixin):
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    with pytest.raises(ValueError, match="`processing_class`"):
        runs.build(DPOTrainer, own, data, {"processing_class": Processor(runs.tokenizer(own))})


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "PARALLELISM_CONFIG"])
def test_sharding_that_the_launcher_turns_on_is_refused(own, data, monkeypatch, name):
    args = runs.config(own)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=name):
        DPOTrainer(str(own / "model"), args=args, train_dataset=data)


def test_streaming_data_is_refused(own):
    rows = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))
    with pytest.raises(ValueError, match=r"`train_dataset`.*streaming"):
        runs.build(DPOTrainer, own, rows)


def test_vision_data_is_refused(own):
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", "images": []}])
    with pytest.raises(ValueError, match=r"`train_dataset`.*vision"):
        runs.build(DPOTrainer, own, rows)


def test_dispatched_batches_are_refused(own, data):
    with pytest.raises(ValueError, match="dispatch_batches"):
        runs.build(DPOTrainer, own, data, accelerator_config={"dispatch_batches": True})


@pytest.mark.slow
@pytest.mark.parametrize("coefficient", [None, 0.3, 0.0])
def test_the_router_loss_of_a_mixture_of_experts_is_trls(own, data, coefficient):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    config = MixtralConfig(vocab_size=384, **shape, **heads, initializer_range=0.2)
    out = own / "mixture"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out)
    tokenizer = runs.tokenizer(own)

    def trainer(kind, **options):
        args = runs.config(own, **options)
        return kind(str(out), args=args, train_dataset=data, processing_class=tokenizer)

    histories = []
    for kind in (trl.DPOTrainer, DPOTrainer):
        run = trainer(kind, router_aux_loss_coef=coefficient)
        run.train()
        histories.append(runs.history(run))
    assert runs.differences(*histories) == []
    assert any("aux_loss" in entry for entry in histories[0]) == (coefficient != 0.0)


def test_dropped_rows_are_counted_in_one_warning(own, data, caplog):
    with caplog.at_level(logging.WARNING, logger="dpo_ext.trl"):
        runs.build(DPOTrainer, own, data, max_length=60)
    (record,) = caplog.records
    assert "24 rows read" in record.message
    assert "dropped no_completion_tokens" in record.message


def test_options_of_the_data_reach_the_rows(own):
    rows = [{"question": "Is it?", "chosen": "yes", "rejected": "no"}] * 4
    data = Dataset.from_list(rows)
    trainer = runs.build(DPOTrainer, own, data, {"data_options": {"prompt_key": "question"}})
    assert trainer.data_reports["train"].layouts == {"explicit": 4}
    for bad, match in (
        ({"max_length": 5}, "`max_length` is what the configuration says"),
        ({"images": "keep"}, "unknown `images` 'keep'"),
        ({"special_tokens_in_text": "text"}, "TRL has no such rule"),
    ):
        with pytest.raises(ValueError, match=match):
            runs.build(DPOTrainer, own, data, {"data_options": bad})
