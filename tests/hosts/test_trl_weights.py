"""Weights of tokens inside `dpo_ext.trl`: from `train_on` and from rows, through every layout, or refused by name."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import trl_runs as runs
from datasets import Dataset
from transformers import AutoModelForCausalLM

from dpo_ext import DataError, PairDataset, Tokenizer
from dpo_ext.reflogps import ReferenceStore
from dpo_ext.torch import attach_scoring
from dpo_ext.trl import DPOTrainer, PairCollator

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
ROWS = [
    {
        "prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6], "rejected_ids": [7, 8],
        "chosen_weights": [0.0, 1.0, 2.0], "rejected_weights": [1.0, 0.5],
    },
    {
        "prompt_ids": [9], "chosen_ids": [10, 11], "rejected_ids": [12, 13, 14, 15],
        "chosen_weights": [1.0, 0.0], "rejected_weights": [0.0, 1.0, 0.0, 3.0],
    },
]  # fmt: skip
SEQUENCES = [
    [(5, 1.0), (6, 2.0)],
    [(7, 1.0), (8, 0.5)],
    [(10, 1.0)],
    [(13, 1.0), (15, 3.0)],
]
COUNTS = [[2, 2], [1, 2]]


def sequences(table) -> list[list[tuple[int, float]]]:
    borders = table.host_offsets.tolist()
    tokens = list(zip(table.targets.tolist(), table.weights.tolist(), strict=True))
    return [tokens[a:b] for a, b in pairwise(borders)]


def batch_of(layout="padded", **options):
    return PairCollator(0, score_table=True, layout=layout, **options)(ROWS)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_every_layout_brings_the_weights_and_leaves_out_what_weighs_nothing(layout):
    batch = batch_of(layout)
    assert sequences(batch["fused_lm_head"]) == SEQUENCES
    assert batch["fused_lm_head"].lengths.tolist() == COUNTS
    if layout == "padded":
        assert batch["completion_mask"].sum(1).view(2, -1).T.tolist() == COUNTS
    else:
        assert batch["completion_lengths"].tolist() == COUNTS


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_weights_are_cut_with_their_tokens_at_the_start(layout):
    kept = [[(5, 1.0)], [(7, 1.0), (8, 0.5)], [(10, 1.0)], [(13, 1.0), (15, 3.0)]]
    found = sequences(batch_of(layout, max_length=5)["fused_lm_head"])
    assert found == kept
    (first, *_) = sequences(batch_of(layout, max_length=4)["fused_lm_head"])
    assert first == []


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_weights_are_cut_with_their_tokens_at_the_end(layout):
    batch = batch_of(layout, max_length=2, truncation_mode="keep_end")
    assert sequences(batch["fused_lm_head"]) == [[(6, 2.0)], [(8, 0.5)], [], [(15, 3.0)]]


def test_weights_of_another_number_name_their_row():
    bad = [ROWS[0], {**ROWS[1], "rejected_weights": [1.0]}]
    with pytest.raises(
        DataError, match=r"row 2, `rejected_weights`: expected 4 weights, .* found 1"
    ):
        PairCollator(0, score_table=True)(bad)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return runs.write_material(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chats(own):
    """Conversations of which a user says something between two answers."""
    rows = []
    for row in runs.load(own, "chat_explicit").select(range(12)):
        more = [{"role": "user", "content": "and then?"}, *row["rejected"]]
        rows.append({**row, "chosen": [*row["chosen"], *more], "rejected": row["rejected"]})
    return Dataset.from_list(rows)


def run(own, data, layout="padded", **options):
    ours = {"layout": layout, "data_options": {"train_on": "last"}}
    trainer = runs.build(DPOTrainer, own, data, ours, max_steps=2, **options)
    trainer.train()
    return trainer


def test_train_on_scores_the_last_answers_alone_in_every_layout(own, chats):
    padded, *others = (run(own, chats, layout) for layout in ("padded", "packed", "shared"))
    assert [t.layout for t in others] == ["packed", "shared"]
    for other in others:
        found = runs.differences(runs.history(padded), runs.history(other), skip=("total_flos",))
        assert found == []
    tokenizer = Tokenizer.from_pretrained(runs.tokenizer(own))
    pairs = PairDataset.from_rows(
        chats, tokenizer, train_on="last", boundary="trl", on_useless="keep", max_length=512
    )
    model = attach_scoring(AutoModelForCausalLM.from_pretrained(str(own / "model")))
    found = np.empty((len(pairs), 2))
    with torch.no_grad():
        for batch in pairs.plan(layout="padded", pairs_per_batch=4, shuffle=False):
            batch = batch.to("cpu")
            logps = model(**batch.model_inputs, score_table=batch.table).logps
            found[batch.pair_index] = logps
    columns = runs.build(
        DPOTrainer,
        own,
        chats,
        {"data_options": {"train_on": "last"}},
        precompute_ref_log_probs=True,
    ).train_dataset
    names = ("ref_chosen_logps", "ref_rejected_logps")
    np.testing.assert_allclose(np.array([columns[n] for n in names]).T, found, atol=1e-3)


def test_weights_of_rows_are_trained_with_as_precomputed(own, chats):
    live = run(own, chats)
    once = run(own, chats, precompute_ref_log_probs=True)
    assert runs.differences(runs.history(live), runs.history(once)) == []


@pytest.mark.parametrize(
    ("keywords", "options", "reason"),
    [
        ({"data_collator": PairCollator(0)}, {}, "a `data_collator` is given"),
        ({}, {"ld_alpha": 0.5, "loss_type": ["sft", "sigmoid"]}, "log-probs are TRL's own"),
        ({}, {"accelerator_config": {"dispatch_batches": True}}, "`dispatch_batches` cuts batches"),
    ],
)
def test_weights_that_would_go_unheard_are_refused(own, chats, keywords, options, reason):
    ours = {"data_options": {"train_on": "last"}, **keywords}
    with pytest.raises(DataError, match=f"weights of tokens would go unheard: {reason}"):
        runs.build(DPOTrainer, own, chats, ours, **options)


def test_a_store_finds_the_rows_by_their_weights(own, chats, tmp_path):
    store = ReferenceStore(tmp_path, fingerprint="the model")
    live, filled, read = (run_with(own, chats, kept) for kept in (None, store, store))
    assert runs.differences(runs.history(live), runs.history(filled)) == []
    assert runs.history(filled) == runs.history(read)
    rows = store.stats.rows
    plain = runs.build(DPOTrainer, own, chats, {"reference": store}, max_steps=1)
    assert store.stats.rows > rows  # without weights other keys
    assert plain.train_dataset.num_rows == len(chats)
    with pytest.raises(ValueError, match="`reference` serves `ld_alpha`, or weights of the rows"):
        run_with(own, chats, store, ld_alpha=0.5)


def run_with(own, data, store, **options):
    ours = {"data_options": {"train_on": "last"}}
    if store is not None:
        ours["reference"] = store
    trainer = runs.build(DPOTrainer, own, data, ours, max_steps=2, **options)
    trainer.train()
    return trainer
