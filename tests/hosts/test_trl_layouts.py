"""The layouts of `dpo_ext.trl.DPOTrainer`: prompts that are shared, and batches by tokens, train like padded ones."""

from __future__ import annotations

import itertools
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
import trl_runs as runs
import warm
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM, MistralConfig

from dpo_ext.errors import DataError
from dpo_ext.trl import DPOTrainer, PairCollator
from dpo_ext.trl.bins import BinnedRows, Bins, slots
from dpo_ext.trl.collator import TABLE_KEY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*truncation mode is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

# Other widths, other estimates of the FLOPs.
SKIP = ("total_flos",)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return runs.write_material(tmp_path_factory.mktemp("model"))


def train_in(layout, material, data, keywords=None, **options):
    """The history of a run that stayed in the layout that was asked for."""
    trainer = runs.build(
        DPOTrainer, material, data, {**(keywords or {}), "layout": layout}, **options
    )
    trainer.train()
    assert trainer.layout == trainer.data_collator.layout == layout
    assert trainer.steps_back == {}
    return runs.history(trainer)


# --- prompts that are shared ------------------------------------------------------------------------------------------

ids = st.lists(st.integers(0, 400), max_size=9)
rows = st.fixed_dictionaries({"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids})


@pytest.mark.filterwarnings("ignore:no token is scored:UserWarning")
@given(
    data=st.lists(rows, min_size=1, max_size=5),
    max_length=st.none() | st.integers(1, 20),
    multiple=st.none() | st.integers(1, 8),
)
def test_shared_and_padded_batches_score_the_same_tokens_at_the_same_places(
    data, max_length, multiple
):
    padded = PairCollator(7, max_length, score_table=True)(data)
    shared = PairCollator(7, max_length, "keep_start", multiple, score_table=True, layout="shared")(
        data
    )
    one, other = padded[TABLE_KEY], shared[TABLE_KEY]
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.seq_offsets, other.seq_offsets)
    width = padded["input_ids"].shape[1]
    flat = padded["input_ids"].flatten()[one.logit_rows]
    assert torch.equal(shared["input_ids"].flatten()[other.logit_rows], flat)
    assert torch.equal(shared["position_ids"].flatten()[other.logit_rows], one.logit_rows % width)
    assert shared["num_tokens"] == padded["attention_mask"].sum()
    N = len(data)
    assert torch.equal(shared["completion_lengths"], padded["completion_mask"].sum(1).view(2, N).T)
    T = shared["input_ids"].shape[1]
    used = int(slots(Dataset.from_list(data), "shared", max_length).sum())
    assert -(-used // (multiple or 1)) * (multiple or 1) == T


@pytest.mark.filterwarnings("ignore:no token is scored:UserWarning")
@given(
    data=st.lists(rows, min_size=1, max_size=5),
    max_length=st.none() | st.integers(1, 20),
    mode=st.sampled_from(["keep_start", "keep_end"]),
)
def test_places_of_pairs_are_those_of_their_packed_row(data, max_length, mode):
    batch = PairCollator(7, max_length, mode, score_table=True, layout="packed")(data)
    assert slots(Dataset.from_list(data), "packed", max_length).sum() == batch["num_tokens"]


def test_a_collator_cannot_share_prompts_that_keep_each_sides_end():
    with pytest.raises(ValueError, match="one prompt a pair"):
        PairCollator(0, 8, "keep_end", score_table=True, layout="shared")
    with pytest.raises(ValueError, match="`score_table=True`"):
        PairCollator(0, layout="shared")


VARIANTS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3},
    "precomputed": {"precompute_ref_log_probs": True},
    "workers": {"dataloader_num_workers": 1, "pad_to_multiple_of": 64},
    "several losses": {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.7, 0.01]},
    "peft": {"learning_rate": 1e-2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_shared_training_equals_stock(own, variant):
    data, keywords = runs.load(own, "text_explicit"), {}
    if variant == "evaluation":
        data, keywords["eval_dataset"] = data.select(range(16)), data.select(range(16, 23))
    if variant == "peft":
        keywords["peft_config"] = LoraConfig(
            r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]
        )
    options = VARIANTS[variant]
    stock = {k: v for k, v in options.items() if k != "pad_to_multiple_of"}
    expected = runs.train(trl.DPOTrainer, own, data, keywords=keywords, **stock)
    found = train_in("shared", own, data, keywords, **options)
    skip = ("rewards/accuracies",) if variant == "precomputed" else ()
    assert runs.differences(expected, found, skip=(*SKIP, *skip)) == []


def test_shared_training_with_the_prompts_of_neighbours_differs_from_stock(own, monkeypatch):
    data = runs.load(own, "text_explicit")
    expected = runs.stock(own, data)
    share = PairCollator._share

    def rolled(self, rows):
        prompts = [row["prompt_ids"] for row in rows]
        turned = [*prompts[1:], prompts[0]]
        return share(self, [{**row, "prompt_ids": p} for row, p in zip(rows, turned, strict=True)])

    monkeypatch.setattr(PairCollator, "_share", rolled)
    lines = runs.differences(expected, train_in("shared", own, data), skip=SKIP)
    assert any(", loss" in line for line in lines)


def test_a_window_that_is_shorter_than_a_row_is_kept(own, tmp_path):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = MistralConfig(
        vocab_size=384, **shape, **heads, sliding_window=9, initializer_range=0.2
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        tmp_path / "model"
    )
    runs.tokenizer(own).save_pretrained(tmp_path / "model")
    data = runs.load(own, "text_explicit")
    found = train_in("shared", tmp_path, data)
    assert runs.differences(runs.stock(tmp_path, data), found, skip=SKIP) == []


def test_what_cannot_share_prompts_is_packed(own, caplog):
    data = runs.load(own, "text_explicit")
    keywords = {"layout": "shared"}
    trainer = runs.build(DPOTrainer, own, data, keywords, truncation_mode="keep_end")
    assert trainer.layout == trainer.data_collator.layout == "packed"
    reason = "`keep_end` cuts the prompts of both sides differently"
    assert f"layout: packed, as {reason}" in caplog.text
    assert trainer.steps_back == {"layout": reason}
    trainer.train()


# --- batches by tokens ------------------------------------------------------------------------------------------------


@given(
    places=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    room=st.integers(40, 90),
    seed=st.integers(0, 2**32),
)
def test_every_epoch_has_each_pair_once_in_as_many_bins_that_hold_them(places, room, seed):
    bins = Bins(np.array(places), room, seed)
    orders = []
    for epoch in range(3):
        bins.set_epoch(epoch)
        orders.append(list(bins))
        assert sorted(itertools.chain(*orders[-1])) == list(range(len(places)))
        assert all(sum(places[i] for i in bin) <= room for bin in orders[-1])
        assert len(bins) == len(orders[0])
    again = Bins(np.array(places), room, seed)
    assert list(again) == orders[0]


def test_rows_are_taken_a_bin_at_a_time():
    data = Dataset.from_list(
        [{"prompt_ids": [i], "chosen_ids": [1], "rejected_ids": [2]} for i in range(5)]
    )
    bins = Bins(slots(data, "packed", None), 8, seed=0)
    loader = torch.utils.data.DataLoader(
        BinnedRows(data, bins), sampler=bins, batch_size=1, collate_fn=lambda rows: rows
    )
    found = [[row["prompt_ids"][0] for row in batch] for batch in loader]
    assert [len(batch) for batch in found].count(2) == 2
    assert sorted(itertools.chain(*found)) == list(range(5))


def one_step(own, layout, tokens_per_batch, data, **options):
    """The history of an epoch that is one step of as many micro-batches as there are."""
    keywords = {"layout": layout}
    if tokens_per_batch is None:
        options |= {"per_device_train_batch_size": len(data)}
    else:
        keywords["tokens_per_batch"] = tokens_per_batch
        options |= {"gradient_accumulation_steps": len(data)}
    options |= {"max_steps": -1, "num_train_epochs": 3}
    trainer = runs.build(DPOTrainer, own, data, keywords, **options)
    trainer.train()
    assert trainer.layout == layout
    return trainer


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_a_step_of_bins_is_a_step_of_all_their_pairs(own, layout, loss):
    """Loss, gradient and metrics are means over pairs, however these lie in micro-batches."""
    data = runs.load(own, "text_explicit")
    whole = one_step(own, "padded", None, data, loss_type=loss)
    parts = one_step(own, layout, 700, data, loss_type=loss)
    assert 3 <= len(parts.get_train_dataloader()) < len(data)
    assert len({len(bin) for bin in parts._bins}) > 1, "bins of unequal numbers of pairs"
    expected, found = runs.history(whole), runs.history(parts)
    assert len(expected) == 4
    assert runs.differences(expected, found, skip=SKIP, slack=2.0) == []


def test_bins_train_on_a_reference_that_was_computed_before(own):
    data = runs.load(own, "text_explicit")
    options = {"precompute_ref_log_probs": True, "loss_type": "sigmoid"}
    live = one_step(own, "packed", 700, data)
    before = one_step(own, "packed", 700, data, **options)
    skip = (*SKIP, "rewards/accuracies")
    assert runs.differences(runs.history(live), runs.history(before), skip=skip) == []


def test_a_mean_over_micro_batches_is_not_the_mean_over_pairs(own, monkeypatch):
    data = runs.load(own, "text_explicit")
    whole = one_step(own, "padded", None, data)
    monkeypatch.setattr(DPOTrainer, "_num_pairs", lambda self: None)
    parts = one_step(own, "packed", 700, data)
    lines = runs.differences(runs.history(whole), runs.history(parts), skip=SKIP)
    assert any("grad_norm" in line for line in lines)


def test_resuming_within_an_epoch_goes_on_with_its_bins(own):
    data = runs.load(own, "text_explicit")
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9}
    keywords = {"layout": "packed", "tokens_per_batch": 900}
    whole = runs.build(DPOTrainer, own, data, keywords, **options)
    steps = len(whole.get_train_dataloader())
    assert 2 < steps < 9
    assert 4 % steps, "step 4 is within an epoch"
    whole.train()
    resumed = runs.build(DPOTrainer, own, data, keywords, **options)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    first, second = runs.history(whole)[:-1], runs.history(resumed)[:-1]
    assert len(first) == 9
    assert runs.differences(first, second, skip=("num_tokens",)) == []


def test_two_processes_share_the_bins_of_an_epoch(own, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = runs.load(own, "text_explicit")
    whole = one_step(own, "padded", None, data)
    imports = (*warm.TORCH, "trl", "dpo_ext.trl", "transformers.models.llama.modeling_llama")
    warm.ranks(__name__, "one_rank", port, own, tmp_path, imports=imports)
    found = json.loads((tmp_path / "history.json").read_text())
    assert runs.differences(runs.history(whole), found, skip=SKIP, slack=2.0) == []


def one_rank(rank: int, port: str, material: str, out: str) -> None:
    """One rank of the test above; the first one writes its history."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    data = runs.load(Path(material), "text_explicit")
    trainer = one_step(Path(material), "packed", 700, data)
    assert trainer.accelerator.num_processes == 2
    assert len(trainer._bins) % 2 == 0, "else a bin is repeated"
    if rank == 0:
        (Path(out) / "history.json").write_text(json.dumps(runs.history(trainer)))
    torch.distributed.barrier()


def test_a_pair_that_no_bin_holds_is_named_before_training(own):
    data = runs.load(own, "text_explicit")
    with pytest.raises(
        DataError, match=r"row \d+: its pair has \d+ tokens, and `tokens_per_batch`"
    ):
        runs.build(DPOTrainer, own, data, {"layout": "packed", "tokens_per_batch": 50})


@pytest.mark.parametrize(
    ("keywords", "options", "message"),
    [
        ({"layout": "padded"}, {}, 'needs `layout="packed"` or "shared"'),
        ({"tokens_per_batch": 0}, {}, "must be at least 1"),
        ({}, {"train_sampling_strategy": "sequential"}, "`train_sampling_strategy` must be"),
        ({}, {"auto_find_batch_size": True}, "`auto_find_batch_size`"),
        ({}, {"loss_type": ["aot"]}, "num_pairs"),
    ],
)
def test_what_a_budget_of_tokens_cannot_go_with_is_refused(own, keywords, options, message):
    data = runs.load(own, "text_explicit")
    keywords = {"layout": "packed", "tokens_per_batch": 900, **keywords}
    with pytest.raises(ValueError, match=message):
        runs.build(DPOTrainer, own, data, keywords, **options)


def test_a_stream_has_no_epoch_to_pack(own):
    data = runs.load(own, "text_explicit").to_iterable_dataset()
    with pytest.raises(ValueError, match="a stream has no length"):
        runs.build(DPOTrainer, own, data, {"layout": "packed", "tokens_per_batch": 900})


def test_where_rows_are_padded_after_all_the_warning_says_what_counts(own, caplog):
    data = runs.load(own, "text_explicit")
    keywords = {"layout": "packed", "tokens_per_batch": 900}
    trainer = runs.build(DPOTrainer, own, data, keywords, neftune_noise_alpha=5.0)
    assert trainer.layout == "padded"
    assert "batches have `per_device_train_batch_size` pairs" in caplog.text
    assert len(trainer.get_train_dataloader()) == 6
    trainer.train()
