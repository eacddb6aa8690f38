"""Where the log-probs of a reference come from: each trainer reads a store, fills it, and is not changed by that."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import tiny
import torch
from pair_cases import random_pairs

pytest.importorskip("pyarrow")

from dpo_ext import PairDataset, TensorError
from dpo_ext.errors import RefLogpsError
from dpo_ext.reflogps import ReferenceStore, fingerprint
from dpo_ext.torch import PairLoader, attach_scoring, ld_table
from dpo_ext.torch.reference import (
    ColumnsReference,
    ModelReference,
    NoReference,
    PairScorer,
    Store,
    as_reference,
    complete,
    stored_logps,
    stored_token_logps,
)


def noisy(seed=0):
    """A model that draws numbers in training mode."""
    model = tiny.model(seed=seed)
    mlp = model.model.layers[0].mlp
    mlp.act_fn = torch.nn.Sequential(mlp.act_fn, torch.nn.Dropout(0.5))
    return model


def batch_of(pairs):
    (batch,) = PairLoader(pairs.plan(layout="padded", pairs_per_batch=len(pairs), shuffle=False))
    return batch


def test_a_model_scores_without_noise_and_leaves_no_trace():
    model = attach_scoring(noisy()).train()
    model.model.layers[1].eval()
    modes = [part.training for part in model.modules()]
    pairs, state = random_pairs(6), torch.get_rng_state()
    with as_reference(model):
        assert not any(part.training for part in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
    first = ModelReference(model).logps(batch_of(pairs))
    assert torch.equal(first, ModelReference(model).logps(batch_of(pairs)))
    assert not first.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_a_reference_computes_under_the_autocast_of_the_step():
    model, batch = attach_scoring(tiny.model()), batch_of(random_pairs(6))
    plain = ModelReference(model).logps(batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ModelReference(model).logps(batch)
    assert 1e-4 < (plain - cast).abs().max() < 1.0


def test_columns_are_those_of_the_pairs_and_a_loss_without_reference_has_none():
    pairs = random_pairs(4)
    values = np.arange(8.0).reshape(4, 2)
    assert NoReference().logps(batch_of(pairs)) is None
    found = ColumnsReference().logps(batch_of(pairs.with_ref_logps(values)))
    assert found.tolist() == values.tolist()
    with pytest.raises(TensorError, match="no reference log-probs"):
        ColumnsReference().logps(batch_of(pairs))


def test_an_adapter_is_off_meanwhile_and_on_again():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False
    )
    model = attach_scoring(peft.get_peft_model(tiny.model(), config))
    batch = batch_of(random_pairs(6))
    expected = ModelReference(attach_scoring(tiny.model())).logps(batch)
    on = ModelReference(model).logps(batch)
    assert torch.allclose(ModelReference(model, adapter=False).logps(batch), expected)
    assert torch.equal(ModelReference(model).logps(batch), on)
    assert (on - expected).abs().max() > 0.1
    with pytest.raises(TypeError, match="needs a PEFT model"):
        ModelReference(tiny.model(), adapter=False)


@pytest.mark.parametrize("layout", ["auto", "padded", "packed", "shared"])
@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_a_scorer_gives_each_pair_its_log_probs_in_every_layout(layout, tokens):
    pairs = random_pairs(30)
    expected = ModelReference(attach_scoring(tiny.model())).logps(batch_of(pairs)).numpy()
    told = []
    scorer = PairScorer(tiny.model(), layout=layout, tokens_per_batch=tokens, tell=told.append)
    np.testing.assert_allclose(scorer(pairs), expected, atol=1e-4)
    assert sum(told) == 30
    assert len(scorer(pairs[:0])) == 0


# ---- single tokens ------------------------------------------------------------------------------


def weighed_pairs(n=20):
    """Pairs with weights of tokens, some of them 0, and one without a prompt."""
    pairs = random_pairs(n)
    rng = np.random.default_rng(0)
    prompts = [[], *pairs.prompt_ids[1:]]
    weights = [
        [rng.integers(0, 3, len(one)).astype(np.float32) for one in ids]
        for ids in (pairs.chosen_ids, pairs.rejected_ids)
    ]
    return PairDataset.from_ids(
        prompts,
        pairs.chosen_ids,
        pairs.rejected_ids,
        chosen_weights=weights[0],
        rejected_weights=weights[1],
    )


def tokens_one_by_one(model, pairs):
    """The log-prob of each token that is scored, from the model's own logits in float64."""
    model = model.double().eval()
    found = {}
    for side, ids in (("chosen", pairs.chosen_ids), ("rejected", pairs.rejected_ids)):
        weights = pairs.weights.get(f"{side}_weights")
        found[side] = []
        for i, (prompt, own) in enumerate(zip(pairs.prompt_ids, ids, strict=True)):
            whole = torch.tensor([[*prompt.tolist(), *own.tolist()]])
            logps = model(whole).logits[0].log_softmax(-1)
            row = np.zeros(len(own))
            for t, token in enumerate(own.tolist()):
                at = len(prompt) + t - 1
                if at >= 0 and (weights is None or weights[i][t] != 0):
                    row[t] = logps[at, token].item()
            found[side].append(row)
    return found


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("make", [random_pairs, weighed_pairs])
def test_a_scorer_gives_each_token_its_log_prob_in_every_layout(layout, make):
    pairs = make(20)
    with torch.no_grad():
        expected = tokens_one_by_one(tiny.model(), pairs)
    scorer = PairScorer(tiny.model(), layout=layout, tokens_per_batch=60)
    values, tokens = scorer.tokens(pairs)
    for side, lists in expected.items():
        assert tokens[side].lengths.tolist() == [len(one) for one in lists]
        np.testing.assert_allclose(tokens[side].values, np.concatenate(lists), atol=1e-5)
    np.testing.assert_allclose(values, scorer(pairs), atol=1e-5)
    part, of_part = scorer.tokens(pairs[5:9])
    np.testing.assert_allclose(part, values[5:9], atol=1e-5)
    np.testing.assert_allclose(
        of_part["chosen"].values, np.concatenate(tokens["chosen"][5:9]), atol=1e-5
    )


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_tokens_of_a_store_are_those_of_a_live_model_at_each_step(layout, tmp_path):
    pairs, store = weighed_pairs(), store_in(tmp_path)
    model = attach_scoring(tiny.model())
    lists = stored_token_logps(store, pairs, lambda i: PairScorer(model).tokens(pairs.select(i)))
    assert len(store.missing(pairs, tokens=True)) == 0
    never = stored_token_logps(store_in(tmp_path), pairs, None)
    live, stored = ModelReference(model), ColumnsReference(never)
    plan = pairs.plan(layout=layout, tokens_per_batch=120, seed=3)
    for batch in PairLoader(plan):
        expected = live.token_logps(batch)
        found = stored.token_logps(batch)
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, atol=1e-5)
        assert ((found == 0) == (expected == 0)).all()
        sums = torch.zeros(2 * len(batch.pair_index), dtype=torch.float64)
        weights = batch.table.weights.double()
        sequence = torch.repeat_interleave(batch.table.host_offsets.diff())
        sums.index_add_(0, sequence, found.double() * weights)
        expected = torch.from_numpy(store.get(pairs))[batch.pair_index]
        assert torch.allclose(sums.reshape(-1, 2), expected, atol=1e-4)
    assert np.array_equal(lists["chosen"].values, never["chosen"].values)


def test_ld_dpo_of_any_alpha_comes_from_the_tokens_of_one_pass():
    pairs = random_pairs(12)
    model = attach_scoring(tiny.model())
    _, tokens = PairScorer(model).tokens(pairs)
    batch = batch_of(pairs)
    ref = ColumnsReference(tokens).token_logps(batch)
    for alpha in (0.0, 0.3, 1.0):
        table = ld_table(batch.table, alpha)
        with torch.no_grad():
            expected = model(**batch.model_inputs, score_table=table).logps
        sums = torch.zeros(24).index_add_(
            0, torch.repeat_interleave(table.host_offsets.diff()), ref * table.weights
        )
        assert torch.allclose(sums.reshape(-1, 2), expected, atol=1e-4)


def test_without_tokens_a_reference_says_what_to_do():
    batch = batch_of(random_pairs(4))
    assert NoReference().token_logps(batch) is None
    with pytest.raises(TensorError, match=r"ColumnsReference\(store.get_tokens\(pairs\)\)"):
        ColumnsReference().token_logps(batch)


# ---- a store ------------------------------------------------------------------------------------


def store_in(folder, name="model"):
    return ReferenceStore(folder, fingerprint=name)


class Counting:
    """Made-up log-probs, and which pairs were asked for."""

    def __init__(self, pairs, fail_at=1000):
        self.values = -1.0 - np.arange(2.0 * len(pairs)).reshape(-1, 2)
        self.asked, self.fail_at = [], fail_at

    def __call__(self, index):
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(index.tolist())
        return self.values[index]


def test_a_store_is_read_and_what_it_lacks_is_scored_in_parts(tmp_path):
    pairs, store = random_pairs(20), store_in(tmp_path)
    assert isinstance(store, Store)
    score = Counting(pairs)
    store.put(pairs, score.values[[3, 8]], index=[3, 8])
    found = stored_logps(store, pairs, score, at_once=7)
    assert np.array_equal(found, score.values)
    lacking = [i for i in range(20) if i not in (3, 8)]
    assert score.asked == [lacking[:7], lacking[7:14], lacking[14:]]
    again = Counting(pairs)
    assert np.array_equal(stored_logps(store, pairs, again), score.values)
    assert again.asked == []


def test_what_was_scored_before_an_interrupt_is_kept(tmp_path):
    pairs, store = random_pairs(20), store_in(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        complete(store, pairs, Counting(pairs, fail_at=2), at_once=6)
    assert store_in(tmp_path).missing(pairs).tolist() == list(range(12, 20))
    assert complete(store_in(tmp_path), pairs, Counting(pairs), at_once=6) == 8


def test_a_pair_that_comes_again_in_a_later_part_is_scored_once(tmp_path):
    pairs = random_pairs(6)
    twice = pairs.concat(pairs)
    score = Counting(twice)
    assert complete(store_in(tmp_path), twice, score, at_once=6) == 6
    assert score.asked == [list(range(6))]


# ---- Lightning ----------------------------------------------------------------------------------


def first_step_of(tmp_path, pairs, model=None, **options):
    """What a step logs, and the data."""
    pl = pytest.importorskip("lightning.pytorch")
    from dpo_ext.lightning import DPOModule, PairDataModule

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, **dict.fromkeys(off, False)
    )
    data = PairDataModule(pairs, pairs_per_batch=6, shuffle=False)
    trainer.fit(DPOModule(model or tiny.model(), **options), data)
    return {name: float(value) for name, value in trainer.logged_metrics.items()}, data


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_lightning_fills_a_store_and_reads_it(tmp_path, monkeypatch):
    pairs, store = random_pairs(12), store_in(tmp_path / "store")
    of_the_policy, _ = first_step_of(tmp_path, pairs)
    state = torch.get_rng_state()
    filled, data = first_step_of(tmp_path, pairs, reference=store)
    assert torch.equal(torch.get_rng_state(), state)
    assert filled == pytest.approx(of_the_policy, abs=1e-5)
    assert store.missing(pairs).tolist() == []
    assert data.state_dict() == {}  # no checkpoint repeats the store
    from dpo_ext.lightning import DPOModule

    monkeypatch.setattr(DPOModule, "_scored_by_policy", lambda *_: pytest.fail("it was scored"))
    read, _ = first_step_of(tmp_path, pairs, reference=store_in(tmp_path / "store"))
    assert read == filled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_lightning_refuses_values_of_another_model_and_a_store_that_no_loss_reads(tmp_path):
    pairs, store = random_pairs(12), store_in(tmp_path / "store")
    first_step_of(tmp_path, pairs, tiny.model(seed=1), reference=store)
    with pytest.raises(RefLogpsError, match="the policy is its own reference"):
        first_step_of(tmp_path, pairs, reference=store)
    with pytest.raises(ValueError, match="`reference` would go unheard"):
        first_step_of(tmp_path, pairs, loss="simpo", reference=store)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("has_adapter", [False, True])
def test_lightning_scores_the_reference_that_the_store_is_of(has_adapter, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False
    )
    pairs, model = random_pairs(12), peft.get_peft_model(tiny.model(), config)
    identity = fingerprint(model, adapter=None if has_adapter else False)
    batch = batch_of(pairs)
    expected = ModelReference(attach_scoring(model), adapter=has_adapter).logps(batch)
    store = store_in(tmp_path / "store", identity)
    first_step_of(tmp_path, pairs, model, reference=store, audit=False)
    np.testing.assert_allclose(store.get(pairs), expected.numpy(), atol=1e-4)


# ---- TRL ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    pytest.importorskip("trl")
    import trl_runs as runs

    return runs.write_material(tmp_path_factory.mktemp("model"))


def trained(own, data, keywords=None, **options):
    import trl_runs as runs

    from dpo_ext.trl import DPOTrainer

    trainer = runs.build(DPOTrainer, own, data, keywords, **options)
    trainer.train()
    return trainer


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": True}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("layout", "adapter", "options"),
    [
        ("padded", False, {}),
        ("packed", False, {"max_length": 40}),
        ("shared", True, {}),
        ("padded", False, {"ld_alpha": 0.3}),
    ],
)
def test_trl_trains_from_a_store_as_with_a_live_reference(
    layout, adapter, options, own, tmp_path, monkeypatch
):
    import trl_runs as runs

    from dpo_ext.trl import DPOTrainer

    data = runs.load(own, "text_explicit")
    given = {"layout": layout}
    if adapter:
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(task_type="CAUSAL_LM", **LORA)
    live = runs.history(trained(own, data, copy.copy(given), **options))
    store = store_in(tmp_path / "store")
    filled = trained(own, data, {**given, "reference": store}, **options)
    skip = ("total_flos", "rewards/accuracies")
    assert runs.differences(live, runs.history(filled), skip=skip, slack=4.0) == []
    assert filled.ref_model is None
    assert store.stats.rows > 0
    monkeypatch.setattr(DPOTrainer, "_reference_logps", lambda *_: pytest.fail("it was scored"))
    again = {**given, "reference": store_in(tmp_path / "store")}
    read = runs.history(trained(own, data, again, **options))
    assert runs.differences(runs.history(filled), read, skip=skip) == []
    # The same ids with other options are others, and the store does not have them.
    if options:
        with pytest.raises(pytest.fail.Exception, match="it was scored"):
            trained(own, data, again)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_trl_lets_go_of_a_reference_model_once_its_values_are_stored(own, tmp_path):
    import trl_runs as runs
    from transformers import AutoModelForCausalLM

    data = runs.load(own, "text_explicit")
    other = AutoModelForCausalLM.from_pretrained(own / "model")
    other.lm_head.weight.data += 0.5
    live = trained(own, data, {"ref_model": copy.deepcopy(other)})
    given = {"ref_model": other, "reference": store_in(tmp_path / "store")}
    trainer = runs.build(runs.DPOTrainer, own, data, given)
    weight = weakref.ref(other.lm_head.weight)
    del other, given
    gc.collect()
    assert weight() is None
    trainer.train()
    skip = ("total_flos", "rewards/accuracies")
    assert runs.differences(runs.history(live), runs.history(trainer), skip=skip, slack=4.0) == []
    stored = trainer.evaluate(data)
    assert np.isfinite(stored["eval_loss"])
    with pytest.raises(RefLogpsError, match="24 of 24 rows are not in the store"):
        trainer.evaluate(runs.load(own, "chat_explicit"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_trl_refuses_what_a_store_cannot_serve(own, tmp_path):
    import trl_runs as runs

    data, store = runs.load(own, "text_explicit"), store_in(tmp_path / "store")

    def build(rows=data, keywords=None, **options):
        given = {"reference": store, **(keywords or {})}
        return runs.build(runs.DPOTrainer, own, rows, given, **options)

    with pytest.raises(
        TypeError, match=r"must be a `dpo_ext\.reflogps\.ReferenceStore`, found str"
    ):
        build(keywords={"reference": "folder"})
    with pytest.raises(ValueError, match="`keep_end` cuts each side by itself"):
        build(truncation_mode="keep_end", max_length=40)
    with pytest.raises(ValueError, match="which a `data_collator` may change"):
        build(keywords={"data_collator": lambda rows: rows})
    scored = data.add_column("ref_chosen_logps", [0.0] * 24)
    scored = scored.add_column("ref_rejected_logps", [0.0] * 24)
    with pytest.raises(ValueError, match="has reference log-probs of its own"):
        build(scored)
    assert store.stats.rows == 0


def test_pairs_are_found_by_the_ids_that_trls_collator_leaves():
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    from dpo_ext.trl.collator import PairCollator
    from dpo_ext.trl.stored import as_seen

    rows = {
        "prompt_ids": [[1, 2], [1, 2, 3, 4, 5], []],
        "chosen_ids": [[3, 4, 5], [6], [7, 8]],
        "rejected_ids": [[9], [6, 7], [8, 9, 9, 9, 9]],
    }
    data = datasets.Dataset.from_dict({name: [[], *ids] for name, ids in rows.items()})
    pairs, weights = as_seen(data.select([1, 2, 3]), PairCollator(0, max_length=4), 0.5)
    assert pairs.prompt_ids.tolist() == [[1, 2], [1, 2, 3, 4], []]
    assert pairs.chosen_ids.tolist() == [[3, 4], [], [7, 8]]
    assert pairs.rejected_ids.tolist() == [[9], [], [8, 9, 9, 9]]
    # Of the last one nothing predicts the first token: one is scored on one side, three on the other.
    assert weights["chosen"].tolist() == [[1.0, 0.5], [], [1.0, 1.0]]
    assert weights["rejected"].tolist() == [[1.0], [], [1.0, 1.0, 0.5, 0.5]]
