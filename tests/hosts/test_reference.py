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

from dpo_ext import TensorError
from dpo_ext.errors import RefLogpsError
from dpo_ext.reflogps import ReferenceStore, fingerprint
from dpo_ext.torch import PairLoader, attach_scoring
from dpo_ext.torch.reference import (
    ColumnsReference,
    ModelReference,
    NoReference,
    PairScorer,
    Store,
    as_reference,
    complete,
    stored_logps,
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
