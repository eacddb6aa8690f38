"""The packed layout: bins, segments, and the same log-probs as padded."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pair_cases import random_pairs

from dpo_ext import DataError, PairDataset, pack_lengths


def segments(batch):
    """The segments of a packed batch as lists of ids, the tails left out."""
    flat, ends = batch.input_ids.reshape(-1), batch.cu_seq_lens_q
    return [flat[a:b].tolist() for a, b in itertools.pairwise(ends)]


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(0, 30), st.integers(0, 2**64 - 1))
def test_bins_hold_every_item_once_and_are_as_few_as_best_fit_decreasing(lengths, more, seed):
    capacity = max([*lengths, 1]) + more
    bins = pack_lengths(lengths, capacity, seed=seed)
    assert sorted(i for items in bins for i in items.tolist()) == list(range(len(lengths)))
    slowly = []
    for length in sorted(lengths, reverse=True):
        fitting = [k for k, used in enumerate(slowly) if used + length <= capacity]
        if fitting:
            slowly[max(fitting, key=slowly.__getitem__)] += length
        else:
            slowly.append(length)
    assert sorted(sum(lengths[i] for i in items) for items in bins) == sorted(slowly)


def test_lengths_that_fit_nowhere_are_named():
    with pytest.raises(DataError) as caught:
        pack_lengths([3, 9, 12], 8)
    assert str(caught.value) == (
        "pair 1 needs 9 tokens, more than a bin of 8\n"
        "hint: use a bin of 12 or more, or a smaller max_length"
    )
    with pytest.raises(DataError, match="pair 1 has the negative length -1"):
        pack_lengths([3, -1], 8)
    with pytest.raises(TypeError, match="whole numbers"):
        pack_lengths([1.5], 8)
    with pytest.raises(ValueError, match="`capacity` must be in"):
        pack_lengths([1], 0)


def test_the_batch_of_the_docstring():
    pairs = PairDataset.from_ids([[1, 2], [6]], [[3, 4], [7]], [[5], [8, 9]])
    for options in ({"tokens_per_batch": 14}, {"pairs_per_batch": 2, "pad_to_multiple_of": 14}):
        batch = pairs.plan(layout="packed", shuffle=False, **options)[0]
        assert batch.input_ids.tolist() == [[1, 2, 3, 4, 1, 2, 5, 6, 7, 6, 8, 9, 0, 0]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1]]
        assert batch.cu_seq_lens_q.tolist() == [0, 4, 7, 9, 12, 14]
        assert batch.cu_seq_lens_q.dtype == batch.cu_seq_lens_k.dtype == np.int32
        assert batch.max_length_q == batch.max_length_k == 4
        assert type(batch.max_length_q) is int
        assert batch.logit_rows.tolist() == [1, 2, 5, 7, 9, 10]
        assert batch.targets.tolist() == [3, 4, 5, 7, 8, 9]
        assert batch.seq_offsets.tolist() == [0, 2, 3, 4, 6]
        assert batch.attention_mask is None


@given(
    st.integers(0, 30),
    st.integers(0, 99),
    st.integers(1, 5),
    st.integers(48, 90),
    st.integers(1, 3),
)
def test_an_epoch_packs_every_pair_once_into_whole_rows(n, seed, multiple, length, rows):
    pairs = random_pairs(n, seed, shortest=0)
    plan = pairs.plan(
        layout="packed",
        tokens_per_batch=rows * (length + multiple),
        bin_length=length,
        seed=seed,
        pad_to_multiple_of=multiple,
    )
    seen = []
    for batch in plan:
        height, width = batch.input_ids.shape
        assert width == -(-length // multiple) * multiple
        assert height * width <= rows * (length + multiple)
        want = []
        for i in batch.pair_index:
            pair = pairs[int(i)]
            for side in ("chosen_ids", "rejected_ids"):
                want.append([*pair["prompt_ids"].tolist(), *pair[side].tolist()])
        found = [segment for segment in segments(batch) if any(segment)]
        assert found == [segment for segment in want if segment]
        # Positions restart at each segment, and no segment crosses a row.
        starts = batch.cu_seq_lens_q[:-1]
        flat = batch.position_ids.reshape(-1)
        assert (flat[starts] == 0).all()
        assert np.flatnonzero(flat == 0).tolist() == starts.tolist()
        assert set(range(0, height * width, width)) <= set(starts.tolist())
        assert batch.cu_seq_lens_q[-1] == height * width
        # Each scored row predicts the next id of its own segment.
        assert batch.input_ids.reshape(-1)[batch.logit_rows + 1].tolist() == batch.targets.tolist()
        assert (flat[batch.logit_rows + 1] > 0).all()
        seen.extend(batch.pair_index.tolist())
    assert sorted(seen) == list(range(n))
    assert plan.stats.real_tokens == pairs.tokens.sum()
    assert plan.stats.slots == sum(batch.input_ids.size for batch in plan)


def test_packed_and_padded_score_the_same_tokens():
    pairs = random_pairs(20, shortest=0)
    options = {"pairs_per_batch": 6, "seed": 1}
    for padded, packed in zip(
        pairs.plan(layout="padded", **options), pairs.plan(layout="packed", **options), strict=True
    ):
        assert padded.pair_index.tolist() == packed.pair_index.tolist()
        assert padded.targets.tolist() == packed.targets.tolist()
        assert padded.seq_offsets.tolist() == packed.seq_offsets.tolist()


def test_ranks_share_one_list_of_packed_batches():
    pairs = random_pairs(60)
    options = {"layout": "packed", "tokens_per_batch": 100, "bin_length": 50, "seed": 4}
    whole = [batch.pair_index.tolist() for batch in pairs.plan(**options)]
    for world in (2, 3, 7):
        plans = [pairs.plan(**options, rank=rank, world_size=world) for rank in range(world)]
        assert len({len(plan) for plan in plans}) == 1
        seen = [plan[i].pair_index.tolist() for i in range(len(plans[0])) for plan in plans]
        assert seen[: len(whole)] == whole
        assert seen[len(whole) :] == whole[: len(seen) - len(whole)]
        for i in range(len(plans[0])):
            assert plans[0].pairs_in_step(i) == sum(plan[i].n_pairs for plan in plans)
    plan = pairs.plan(**options, drop_last=True)
    assert all(batch.input_ids.shape == (2, 50) for batch in plan)
    one, two = pairs.plan(**options), pairs.plan(**options)
    two.set_epoch(1)
    assert [b.pair_index.tolist() for b in one] != [b.pair_index.tolist() for b in two]


def test_packing_fills_more_than_padding():
    pairs = random_pairs(400, longest=60)
    packed = pairs.plan(layout="packed", tokens_per_batch=1024).stats
    padded = pairs.plan(layout="padded", tokens_per_batch=1024).stats
    assert packed.fill > 0.97 > padded.fill + 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens_per_batch": 10}, DataError, "pair 0 needs 13 tokens, more than a bin of 10"),
        ({"tokens_per_batch": 10, "bin_length": 11}, ValueError, "must be at least `bin_length`"),
        ({"pairs_per_batch": 1, "bin_length": 20}, ValueError, "`bin_length` needs"),
        ({"tokens_per_batch": 20, "bin_length": 0}, ValueError, "`bin_length` must be at least 1"),
    ],
)
def test_bins_that_cannot_work_are_errors_of_the_plan(options, error, message):
    pairs = PairDataset.from_ids([[1] * 5], [[2]], [[3, 4]])
    with pytest.raises(error, match=message):
        pairs.plan(layout="packed", **options)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_model_gives_packed_and_padded_the_same_log_probs(rows):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tiny import model

    from dpo_ext.torch import sequence_logps

    llama = model(seed=3).eval()
    pairs = random_pairs(12, vocabulary=400)
    want, got = np.zeros((12, 2)), np.zeros((12, 2))
    plans = {
        "padded": (pairs.plan(layout="padded", pairs_per_batch=5), want),
        "packed": (pairs.plan(layout="packed", tokens_per_batch=rows * 80, bin_length=80), got),
    }
    for plan, out in plans.values():
        for batch in plan:
            moved = batch.to("cpu")
            with torch.no_grad():
                logits = llama(**moved.model_inputs).logits
                out[batch.pair_index] = sequence_logps(logits, moved.table).numpy()
    assert (want < -1).all()
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_reference_log_probs_have_the_dtype_of_log_probs_in_every_layout(layout):
    values = np.array([[-1.5, -2.25], [-3.0, -4.0]])
    pairs = PairDataset.from_ids([[1], [2]], [[3], [4]], [[5], [6]]).with_ref_logps(values)
    batch = pairs.plan(layout=layout, pairs_per_batch=2, shuffle=False)[0]
    assert batch.ref_logps.dtype == np.float32
    assert batch.ref_logps.tolist() == values.tolist()


@pytest.mark.parametrize("budget", [{"pairs_per_batch": 5}, {"tokens_per_batch": 40}])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_reference_log_probs_go_with_their_pairs_through_a_shuffle(layout, budget):
    """Pair i holds the prompt i + 1 and the log-probs -i and -i - 0.5."""
    n = 23
    values = -np.arange(n)[:, None] - np.array([0.0, 0.5])
    prompts = [[i + 1] for i in range(n)]
    pairs = PairDataset.from_ids(prompts, [[50, 51]] * n, [[60]] * n).with_ref_logps(values)
    seen = []
    for batch in pairs.plan(layout=layout, seed=4, **budget):
        assert batch.ref_logps.tolist() == values[batch.pair_index].tolist()
        firsts = [i for i in batch.input_ids.ravel().tolist() if 0 < i < 50]
        assert set(firsts) == set((batch.pair_index + 1).tolist())
        seen += batch.pair_index.tolist()
    assert sorted(seen) == list(range(n))
    assert seen != sorted(seen)
