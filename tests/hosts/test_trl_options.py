"""Every option of TRL is honoured as stock honours it, left to TRL, or refused by name; none is accepted and ignored."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import subprocess
import sys

import make_trl
import pytest
import torch
import transformers
import trl
import trl_runs as runs
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast
from trl.trainer.dpo_trainer import DataCollatorForPreference

import dpo_ext.trl
from dpo_ext.data.dataset import PairDataset
from dpo_ext.errors import TokenizerError
from dpo_ext.torch.losses import compat as loss_compat
from dpo_ext.trl import BY_TRL, HONOURED, REFUSED, DPOTrainer, layers
from dpo_ext.trl.collator import REFERENCE
from dpo_ext.trl.options import LOSS_TYPES, check_args

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*deprecated.*v2.0.0.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


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
    tables = (HONOURED, BY_TRL, REFUSED)
    named = [name for table in tables for name in table]
    assert len(named) == len(set(named))
    assert own_fields() <= set(named)
    assert set(named) <= {field.name for field in dataclasses.fields(trl.DPOConfig)}


def test_every_argument_of_the_constructor_is_ours_too():
    stock = inspect.signature(trl.DPOTrainer.__init__).parameters
    found = inspect.signature(DPOTrainer.__init__).parameters
    assert list(found)[: len(stock)] == list(stock)
    ours = {"layout", "tokens_per_batch", "data_options", "metrics", "audit", "reference"}
    assert set(found) - set(stock) == ours
    assert all(found[name].default == stock[name].default for name in stock)


def test_the_defaults_of_refused_options_are_allowed(own):
    args = runs.config(own)
    for name, (allowed, _) in REFUSED.items():
        assert getattr(args, name) in allowed, name


# A value that a refused option must not have; set afterwards, as some would need hardware.
REFUSED_VALUES = {
    "parallelism_config": object(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options_are_named(own, data, name):
    args = runs.config(own)
    setattr(args, name, REFUSED_VALUES[name])
    with pytest.raises(ValueError, match=f"`{name}`"):
        DPOTrainer(str(own / "model"), args=args, train_dataset=data)


@pytest.mark.parametrize("name", ["FSDP", "PARALLELISM_CONFIG"])
def test_sharding_that_the_launcher_turns_on_is_refused(own, data, monkeypatch, name):
    args = runs.config(own)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=name.lower() if name == "FSDP" else name):
        DPOTrainer(str(own / "model"), args=args, train_dataset=data)


def test_the_first_version_of_fsdp_is_refused_and_the_second_is_not(own):
    args = runs.config(own)
    args.fsdp = True
    args.fsdp_config = {"version": 2}
    check_args(args)
    args.fsdp_config = {"version": 1}
    with pytest.raises(ValueError, match="expected version 2, found 1"):
        check_args(args)


def test_a_loss_that_trl_has_not_is_refused_before_training(own, data):
    args = runs.config(own, loss_type=["sigmoid", "no such loss"])
    with pytest.raises(ValueError, match=r"`loss_type`.*'no such loss'"):
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
    "f_divergence_type": {"f_divergence_type": "js_divergence"},
    "f_alpha_divergence_coef": {
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.3,
    },
    "ld_alpha": {"ld_alpha": 0.4},
    "use_weighting": {"use_weighting": True},
    "discopop_tau": {"loss_type": "discopop", "discopop_tau": 0.2},
}
# The same of options that TRL reads, and our layers beside it.
TRACED_BY_TRL = {
    "disable_dropout": {
        "disable_dropout": False,
        "model_init_kwargs": {"attention_dropout": 0.5, "attn_implementation": "eager"},
    },
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "ref_model_mixup_alpha": {
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.3,
    },
}
# Options that do not; each has a test below.
UNTRACED = {
    "dataset_num_proc",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "router_aux_loss_coef",
}


def test_every_honoured_option_is_tested():
    assert TRACED.keys() | UNTRACED == HONOURED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACED | TRACED_BY_TRL)
def test_options_do_what_stock_does(own, data, stock_sigmoid, name):
    options = (TRACED | TRACED_BY_TRL)[name]
    expected = runs.stock(own, data, **options)
    assert runs.differences(stock_sigmoid, expected) != []
    trainer = runs.build(DPOTrainer, own, data, **options)
    trainer.train()
    assert trainer.steps_back == {}
    assert runs.differences(expected, runs.history(trainer)) == []


# Every loss of TRL and what goes with it, and whether its own head and loss do the work.
LOSSES = {
    **{name: ({"loss_type": name}, False) for name in LOSS_TYPES if name != "exo_pair"},
    "exo_pair": ({"loss_type": "exo_pair", "label_smoothing": 1e-3}, False),
    "MPO": ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, False),
    "smoothed aot": ({"loss_type": ["aot", "aot_unpaired"], "label_smoothing": 0.2}, False),
    "forward KL": ({"f_divergence_type": "forward_kl"}, False),
    "LD-DPO, WPO": ({"ld_alpha": 0.3, "use_weighting": True}, False),
    "LD-DPO, IPO, precomputed": (
        {"ld_alpha": 0.3, "loss_type": "ipo", "precompute_ref_log_probs": True},
        False,
    ),
    "WPO, IPO": ({"use_weighting": True, "loss_type": "ipo"}, False),
    "forward KL, hinge": ({"f_divergence_type": "forward_kl", "loss_type": "hinge"}, True),
    "LD-DPO, sft": ({"ld_alpha": 0.3, "loss_type": ["sigmoid", "sft"]}, True),
    "LD-DPO beyond 1": ({"ld_alpha": 1.5}, True),
    "no beta": ({"beta": 0.0}, True),
    "much smoothing": ({"loss_type": "robust", "label_smoothing": 0.7}, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_as_in_stock(own, data, name, layout):
    options, is_trls = LOSSES[name]
    expected = runs.stock(own, data, **options)
    trainer = runs.build(DPOTrainer, own, data, {"layout": layout}, **options)
    trainer.train()
    assert ("head and loss" in trainer.steps_back) == is_trls
    # Packed rows have other FLOPs; where policy and reference are one, ratios of 0 have any sign.
    skip = ("total_flos",) if layout == "packed" else ()
    skip += ("accuracies",) if "precomputed" in name else ()
    # Stock computes both by exponents of float32.
    slack = 2.0 if name in ("discopop", "forward KL") else 1.0
    assert runs.differences(expected, runs.history(trainer), skip=skip, slack=slack) == []


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

    monkeypatch.setattr(PairDataset, "from_rows", spy)
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


@pytest.mark.parametrize("layout", ["flat", None])
def test_other_layouts_are_refused(own, data, layout):
    with pytest.raises(ValueError, match=f"`layout`.*{layout!r}"):
        runs.build(DPOTrainer, own, data, {"layout": layout})


# What packed rows have not, and padded ones have.
UNPACKED = {
    "compute_metrics": ({"compute_metrics": lambda _: {}}, {}),
    "data_collator": ({"data_collator": DataCollatorForPreference(pad_token_id=0)}, {}),
    "neftune_noise_alpha": ({}, {"neftune_noise_alpha": 5.0}),
    "dispatch_batches": ({}, {"accelerator_config": {"dispatch_batches": True}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNPACKED)
def test_what_packed_rows_have_not_is_trained_padded_and_said_once(own, data, caplog, name):
    keywords, options = UNPACKED[name]
    expected = runs.build(trl.DPOTrainer, own, data, keywords, **options)
    expected.train()
    with caplog.at_level(logging.WARNING, logger="dpo_ext.trl"):
        trainer = runs.build(DPOTrainer, own, data, {"layout": "packed", **keywords}, **options)
        trainer.train()
    assert trainer.layout == "padded"
    said = [record.message for record in caplog.records if "TRL's own" in record.message]
    assert len(said) == 1
    assert name in said[0]
    assert runs.differences(runs.history(expected), runs.history(trainer)) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Adapter name 'ref':UserWarning")
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
@pytest.mark.parametrize("is_model", [False, True])
def test_a_learned_prompt_is_trained_by_trls_own_head(own, data, config, is_model):
    def build(kind):
        tuning = config(task_type="CAUSAL_LM", num_virtual_tokens=2)
        options = {"gradient_checkpointing": False}
        if not is_model:
            return runs.build(kind, own, data, {"peft_config": tuning}, **options)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(own / "model", dtype=torch.float32)
        model = get_peft_model(model, tuning)
        args, tokenizer = runs.config(own, **options), runs.tokenizer(own)
        return kind(model, args=args, train_dataset=data, processing_class=tokenizer)

    histories = []
    for kind in (trl.DPOTrainer, DPOTrainer):
        trainer = build(kind)
        trainer.train()
        histories.append(runs.history(trainer))
    assert list(trainer.steps_back) == ["head and loss"]
    assert runs.differences(*histories) == []


def test_an_adapter_on_the_head_is_trls_error(own, data):
    keywords = {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])}
    with pytest.raises(ValueError, match="lm_head"):
        runs.build(DPOTrainer, own, data, keywords)


class NeedsNotes(DataCollatorForPreference):
    """A collator that reads a column of the rows."""

    def torch_call(self, examples):
        assert all(row["note"] for row in examples)
        return super().torch_call(examples)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_a_collator_with_trls_keys_serves(own, data, layout, precomputed):
    data = data.add_column("note", ["a note"] * len(data))
    keywords = {"data_collator": NeedsNotes(pad_token_id=0, max_length=80)}
    options = {"precompute_ref_log_probs": precomputed, "remove_unused_columns": False}
    expected = runs.build(trl.DPOTrainer, own, data, keywords, **options)
    expected.train()
    trainer = runs.build(DPOTrainer, own, data, {"layout": layout, **keywords}, **options)
    trainer.train()
    assert "head and loss" not in trainer.steps_back
    # Where policy and reference are one, ratios of 0 have any sign.
    skip = ("accuracies",) if precomputed else ()
    assert runs.differences(runs.history(expected), runs.history(trainer), skip=skip) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_stream_is_encoded_by_trl_and_scored_here(own, data, layout):
    rows = data.to_iterable_dataset()
    options = {"eval_strategy": "steps", "eval_steps": 2}
    histories = []
    for kind, keywords in ((trl.DPOTrainer, {}), (DPOTrainer, {"layout": layout})):
        keywords = {"eval_dataset": {"a": rows, "b": data}, **keywords}
        trainer = runs.build(kind, own, rows, keywords, **options)
        trainer.train()
        histories.append(runs.history(trainer))
    assert list(trainer.steps_back) == ["data"]
    skip = ("total_flos",) if layout == "packed" else ()
    assert runs.differences(*histories, skip=skip) == []


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer whose Python side matters."""

    def apply_chat_template(self, *args, **kwargs):
        return super().apply_chat_template(*args, **kwargs)

    def __call__(self, text, *args, **kwargs):
        text = text.upper() if isinstance(text, str) else [one.upper() for one in text]
        return super().__call__(text, *args, **kwargs)


def test_a_tokenizer_with_a_python_side_of_its_own_encodes_by_trl(own, data):
    trainers = []
    for kind in (trl.DPOTrainer, DPOTrainer):
        tokenizer = Shouting.from_pretrained(own / "model")
        trainers.append(runs.build(kind, own, data, {"processing_class": tokenizer}))
    stock, ours = (trainer.train_dataset for trainer in trainers)
    assert "`__call__` of its own" in trainers[1].steps_back["data"]
    assert stock[:] == ours[:]
    assert layers.why_not_data(data, runs.tokenizer(own)) is None


def test_the_columns_of_the_rows_are_kept(own, data):
    data = data.add_column("note", [f"row {i}" for i in range(len(data))])
    trainer = runs.build(DPOTrainer, own, data)
    assert trainer.train_dataset[:]["note"] == data[:]["note"]
    # Rows that are dropped go with all their columns.
    trainer = runs.build(DPOTrainer, own, data, max_length=60)
    stock = runs.build(trl.DPOTrainer, own, data, max_length=60)
    assert len(trainer.train_dataset) < len(data)
    for name in ("note", "prompt_ids"):  # TRL cuts completions in its collator
        assert trainer.train_dataset[:][name] == stock.train_dataset[:][name]


def test_pairs_that_teach_nothing_are_kept_as_trl_keeps_them(own, data):
    useless = [
        {"prompt": "Ask: a?", "chosen": "", "rejected": " no"},
        {"prompt": "Ask: b?", "chosen": " \n", "rejected": " no"},
        {"prompt": "Ask: c?", "chosen": " yes", "rejected": " yes"},
    ]
    rows = Dataset.from_list([*data.to_list(), *useless])
    stock = runs.build(trl.DPOTrainer, own, rows).train_dataset
    ours = runs.build(DPOTrainer, own, rows).train_dataset
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[:][name] == stock[:][name]
    keywords = {"data_options": {"on_useless": "drop"}}
    assert len(runs.build(DPOTrainer, own, rows, keywords).train_dataset) == len(data)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("is_filtered", [True, False])
def test_a_loss_that_is_not_a_number_goes_on_as_in_stock(own, data, caplog, layout, is_filtered):
    options = {"learning_rate": 1e30, "max_grad_norm": 0.0, "logging_nan_inf_filter": is_filtered}
    histories = []
    for kind, keywords in ((trl.DPOTrainer, {}), (DPOTrainer, {"layout": layout})):
        trainer = runs.build(kind, own, data, keywords, **options)
        trainer.train()
        histories.append([entry.get("loss") for entry in runs.history(trainer)])
    assert str(histories[0]) == str(histories[1])
    assert ("nan" in str(histories[0])) != is_filtered
    said = [r.message for r in caplog.records if "the loss is not a number" in r.message]
    assert len(said) == 1
    assert "`logps` must not be NaN" in said[0]


@pytest.mark.slow
def test_debugging_looks_at_what_modules_return_by_trls_own_head(own, data):
    options = {"debug": "underflow_overflow", "max_steps": 1}
    trainer = runs.build(DPOTrainer, own, data, **options)
    trainer.train()
    assert "debug" in trainer.steps_back["head and loss"]


@pytest.mark.slow
def test_weighted_metrics_do_not_depend_on_the_batch_size(own, data):
    found = {}
    for metrics in ("trl", "weighted"):
        for size in (5, 24):
            keywords = {"metrics": metrics, "eval_dataset": data}
            trainer = runs.build(DPOTrainer, own, data, keywords, per_device_eval_batch_size=size)
            found[metrics, size] = trainer.evaluate()
    for name in ("eval_rewards/margins", "eval_logps/chosen", "eval_entropy"):
        small, whole = (found["weighted", size][name] for size in (5, 24))
        assert small == pytest.approx(whole, rel=1e-5, abs=1e-6)
    name = "eval_logps/chosen"
    assert abs(found["trl", 5][name] - found["trl", 24][name]) > 1e-2
    with pytest.raises(ValueError, match="`metrics` must be one of"):
        runs.build(DPOTrainer, own, data, {"metrics": "mean"})


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


def test_the_page_shows_every_option(capsys):
    assert make_trl.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_another_version_of_trl_is_named():
    code = (
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '1.17.2' if name == 'trl' else real(name)\n"
        "import dpo_ext.trl"
    )
    env = {name: value for name, value in os.environ.items() if name != "DPO_EXT_ANY_TRL"}
    refused = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "compared with TRL 1.16, found 1.17.2" in refused.stderr
    assert "DPO_EXT_ANY_TRL=1" in refused.stderr
    env["DPO_EXT_ANY_TRL"] = "1"
    tried = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert tried.returncode == 0, tried.stderr


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_quantized_base_with_an_adapter_trains_as_in_stock(own, data, layout):
    pytest.importorskip("bitsandbytes")

    def train(kind, keywords):
        quantized = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32
        )
        adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        keywords |= {"quantization_config": quantized, "peft_config": adapter}
        trainer = runs.build(kind, own, data, keywords)
        trainer.train()
        return runs.history(trainer), trainer

    expected, _ = train(trl.DPOTrainer, {})
    found, trainer = train(DPOTrainer, {"layout": layout})
    assert trainer.model.is_loaded_in_4bit
    assert "head and loss" not in trainer.steps_back
    skip = ("total_flos",) if layout == "packed" else ()
    assert runs.differences(expected, found, skip=skip, slack=3.0) == []


@pytest.mark.parametrize(
    ("keywords", "options", "unheard"),
    [
        ({"data_options": {"on_useless": "drop"}}, {}, "data_options"),
        ({"metrics": "weighted"}, {"beta": 0.0}, "metrics"),
    ],
)
def test_an_option_that_would_go_unheard_is_an_error(own, data, keywords, options, unheard):
    rows = data.to_iterable_dataset() if unheard == "data_options" else data
    with pytest.raises(ValueError, match=f"`{unheard}` would go unheard: .* is TRL's own, as"):
        runs.build(DPOTrainer, own, rows, keywords, **options)


def test_a_tokenizer_that_we_do_not_know_to_read_encodes_by_trl(own, data, monkeypatch):
    def refuse(source):
        raise TokenizerError("a key `odd` that nobody knows")

    monkeypatch.setattr(dpo_ext.trl.trainer.Tokenizer, "from_pretrained", refuse)
    trainer = runs.build(DPOTrainer, own, data)
    assert trainer.steps_back == {"data": "a key `odd` that nobody knows"}
    assert trainer.train_dataset[:] == runs.build(trl.DPOTrainer, own, data).train_dataset[:]
