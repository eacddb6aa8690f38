"""Plans and padded batches: order, ranks, counts, TRL's collator."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ext import DataError, PairDataset, Ragged, TensorError


def random_pairs(n, seed=0, longest=12, shortest=1):
    rng = np.random.default_rng(seed)

    def side(least):
        return [rng.integers(1, 99, rng.integers(least, longest + 1)).tolist() for _ in range(n)]

    return PairDataset.from_ids(side(0), side(shortest), side(shortest), pad_id=0, vocab_size=99)


def global_batches(pairs, **options):
    return [batch.pair_index.tolist() for batch in pairs.plan(layout="padded", **options)]


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("shortest", [0, 1])
def test_padded_equals_trls_collator_tensor_for_tensor(multiple, shortest):
    torch = pytest.importorskip("torch")
    collator = pytest.importorskip("trl.trainer.dpo_trainer").DataCollatorForPreference
    pairs = random_pairs(40, seed=multiple, shortest=shortest)
    pairs = pairs.with_ref_logps(np.random.default_rng(1).normal(size=(40, 2)))
    collate = collator(pad_token_id=0, pad_to_multiple_of=multiple)
    plan = pairs.plan(layout="padded", pairs_per_batch=7, seed=3, pad_to_multiple_of=multiple)
    for batch in plan:
        rows = [{k: v.tolist() for k, v in pairs[int(i)].items()} for i in batch.pair_index]
        for row, (chosen, rejected) in zip(rows, batch.ref_logps.tolist(), strict=True):
            row["ref_chosen_logps"], row["ref_rejected_logps"] = chosen, rejected
        want = collate(rows)
        for name in ("input_ids", "attention_mask", "completion_mask"):
            got = torch.from_numpy(getattr(batch, name))
            assert got.dtype == want[name].dtype
            assert torch.equal(got, want[name])
        got = torch.from_numpy(batch.ref_logps)
        assert torch.equal(got[:, 0], want["ref_chosen_logps"])
        assert torch.equal(got[:, 1], want["ref_rejected_logps"])


@given(st.integers(0, 9), st.integers(0, 5), st.integers(0, 1000))
def test_the_table_scores_each_completion_token_once(n, longest, seed):
    pairs = random_pairs(n, seed, longest, shortest=0)
    for batch in pairs.plan(layout="padded", pairs_per_batch=3):
        width = batch.input_ids.shape[1]
        want_rows, want_targets, ends = [], [], [0]
        for k, side in itertools.product(range(batch.n_pairs), (0, 1)):
            row = side * batch.n_pairs + k
            for t in range(1, width):
                if batch.completion_mask[row, t]:
                    want_rows.append(row * width + t - 1)
                    want_targets.append(batch.input_ids[row, t])
            ends.append(len(want_rows))
        assert batch.logit_rows.tolist() == want_rows
        assert batch.targets.tolist() == want_targets
        assert batch.seq_offsets.tolist() == ends


def test_arrays_have_the_dtypes_of_the_contract():
    batch = random_pairs(3).plan(layout="padded", pairs_per_batch=3)[0]
    dtypes = {
        "input_ids": np.int64,
        "attention_mask": np.int64,
        "completion_mask": np.int64,
        "logit_rows": np.int64,
        "targets": np.int32,
        "seq_offsets": np.int32,
        "pair_index": np.int64,
    }
    for name, dtype in dtypes.items():
        assert getattr(batch, name).dtype == dtype, name
    assert batch.ref_logps is None


def test_every_rank_gets_the_same_number_of_batches_and_the_union_is_the_global_list():
    for n, world in itertools.product(range(1, 41), (1, 2, 3, 5, 8, 40)):
        pairs = random_pairs(n, longest=2)
        batches = global_batches(pairs, pairs_per_batch=3, seed=1)
        plans = [
            pairs.plan(layout="padded", pairs_per_batch=3, seed=1, rank=rank, world_size=world)
            for rank in range(world)
        ]
        assert len({len(plan) for plan in plans}) == 1
        seen = [
            plans[rank][step].pair_index.tolist()
            for step in range(len(plans[0]))
            for rank in range(world)
        ]
        assert seen[: len(batches)] == batches
        repeats = seen[len(batches) :]
        assert repeats == [batches[i % len(batches)] for i in range(len(repeats))]
        assert len(repeats) < world
        assert plans[0].stats.repeated == sum(map(len, repeats))
        for step in range(len(plans[0])):
            assert plans[0].pairs_in_step(step) == sum(p[step].n_pairs for p in plans)


def test_drop_last_leaves_out_the_short_batch_and_the_last_round():
    pairs = random_pairs(23)
    for world in (1, 2, 3):
        plans = [
            pairs.plan(
                layout="padded", pairs_per_batch=4, rank=rank, world_size=world, drop_last=True
            )
            for rank in range(world)
        ]
        assert {len(plan) for plan in plans} == {5 // world}
        assert all(batch.n_pairs == 4 for plan in plans for batch in plan)
        assert plans[0].stats.repeated == 0


@given(st.integers(0, 60), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_an_epoch_is_a_permutation(n, seed, epoch):
    pairs = random_pairs(n, longest=1)
    batches = global_batches(pairs, pairs_per_batch=4, seed=seed, epoch=epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(n))


def test_order_depends_on_seed_and_epoch_alone():
    pairs = random_pairs(50)
    orders = {
        (seed, epoch): tuple(
            map(tuple, global_batches(pairs, pairs_per_batch=5, seed=seed, epoch=epoch))
        )
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == len(orders)
    plan = pairs.plan(layout="padded", pairs_per_batch=5, seed=2)
    plan.set_epoch(1)
    assert tuple(tuple(b.pair_index.tolist()) for b in plan) == orders[2, 1]


def test_shuffle_off_keeps_the_order_of_the_data():
    batches = global_batches(random_pairs(7), pairs_per_batch=3, shuffle=False)
    assert batches == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_shuffle_is_near_uniform():
    # Each of 8 items at each of 8 places: 4000 epochs, expected 500, standard deviation 21.
    pairs = random_pairs(8, longest=1)
    plan = pairs.plan(layout="padded", pairs_per_batch=8)
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        plan.set_epoch(epoch)
        counts[np.arange(8), plan[0].pair_index] += 1
    assert np.abs(counts - 500).max() < 110


@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 99))
def test_a_token_budget_bounds_the_slots_and_loses_no_pair(n, multiple, seed):
    pairs = random_pairs(n, seed)
    budget = 100
    plan = pairs.plan(
        layout="padded", tokens_per_batch=budget, seed=seed, pad_to_multiple_of=multiple
    )
    batches = list(plan)
    assert all(batch.input_ids.size <= budget for batch in batches)
    assert sorted(i for batch in batches for i in batch.pair_index.tolist()) == list(range(n))
    # Greedy: the first pair of a batch did not fit into the one before.
    for before, after in itertools.pairwise(batches):
        joined = np.append(before.pair_index, after.pair_index[:1])
        width = -(-pairs.longest[joined].max() // multiple) * multiple
        assert 2 * len(joined) * width > budget


def test_stats_count_tokens_and_slots():
    pairs = random_pairs(30, seed=5)
    for options in ({"pairs_per_batch": 4}, {"tokens_per_batch": 200}):
        plan = pairs.plan(layout="padded", pad_to_multiple_of=4, **options)
        batches = list(plan)
        assert plan.stats.slots == sum(b.input_ids.size for b in batches)
        assert plan.stats.real_tokens == sum(int(b.attention_mask.sum()) for b in batches)
        assert plan.stats.fill == plan.stats["fill"] == plan.stats.real_tokens / plan.stats.slots


def test_a_pair_over_the_budget_is_an_error_of_the_plan():
    pairs = PairDataset.from_ids([[1], [1] * 9], [[2], [2]], [[3], [3]])
    with pytest.raises(DataError) as caught:
        pairs.plan(layout="padded", tokens_per_batch=19)
    assert str(caught.value) == (
        "pair 1 needs 20 slots, more than `tokens_per_batch`=19\n"
        "hint: use tokens_per_batch=20 or more, or a smaller max_length"
    )
    assert len(pairs.plan(layout="padded", tokens_per_batch=20)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layout": "packt", "pairs_per_batch": 1},
            'unknown `layout` \'packt\': there is "padded", "packed"',
        ),
        ({"layout": "padded"}, "exactly one of `pairs_per_batch` and `tokens_per_batch`"),
        (
            {"layout": "padded", "pairs_per_batch": 1, "tokens_per_batch": 1},
            "exactly one of `pairs_per_batch` and `tokens_per_batch`",
        ),
        (
            {"layout": "padded", "pairs_per_batch": 0},
            "`pairs_per_batch` must be at least 1, found 0",
        ),
        ({"layout": "padded", "pairs_per_batch": 1, "rank": 1}, "`rank` must be in 0..1, found 1"),
        ({"layout": "padded", "pairs_per_batch": 1, "seed": -1}, "`seed` must be in 0..2"),
        (
            {"layout": "padded", "pairs_per_batch": 1, "pad_to_multiple_of": 0},
            "`pad_to_multiple_of` must be at least 1, found 0",
        ),
    ],
)
def test_bad_scalars_are_value_errors(options, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        random_pairs(3).plan(**options)


def test_a_plan_is_a_map_style_sequence():
    plan = random_pairs(10).plan(layout="padded", pairs_per_batch=4)
    assert len(plan) == 3
    assert plan[-1].pair_index.tolist() == plan[2].pair_index.tolist()
    assert [b.n_pairs for b in plan[1:]] == [4, 2]
    with pytest.raises(IndexError):
        plan[3]
    again = pickle.loads(pickle.dumps(plan))
    assert [b.pair_index.tolist() for b in again] == [b.pair_index.tolist() for b in plan]


def test_an_empty_data_set_has_an_empty_plan():
    pairs = PairDataset.from_ids([], [], [])
    for options in ({"pairs_per_batch": 4}, {"tokens_per_batch": 4}):
        plan = pairs.plan(layout="padded", world_size=2, **options)
        assert len(plan) == 0
        assert list(plan) == []
        assert plan.stats.slots == 0


def first(batches):
    return batches[0]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataloader_reads_a_plan(workers):
    torch_data = pytest.importorskip("torch.utils.data")
    plan = random_pairs(10).plan(layout="padded", pairs_per_batch=4)
    loader = torch_data.DataLoader(plan, batch_size=1, collate_fn=first, num_workers=workers)
    assert [b.pair_index.tolist() for b in loader] == [b.pair_index.tolist() for b in plan]


def test_to_gives_torch_tensors_of_the_same_dtype():
    torch = pytest.importorskip("torch")
    batch = (
        random_pairs(4).with_ref_logps(np.ones((4, 2))).plan(layout="padded", pairs_per_batch=4)[0]
    )
    moved = batch.to("cpu")
    for name in ("input_ids", "completion_mask", "targets", "seq_offsets", "ref_logps"):
        array, tensor = getattr(batch, name), getattr(moved, name)
        assert torch.equal(tensor, torch.from_numpy(array))
    assert moved.model_inputs["use_cache"] is False
    assert moved.n_pairs == 4
    assert torch.equal(moved.table.targets, batch.table.targets)


@pytest.mark.parametrize("bad", [[[-1]], [[99]], [[2**31]], [[1.5]], [["a"]]])
def test_from_ids_refuses_ids_outside_the_vocabulary(bad):
    with pytest.raises(DataError) as caught:
        PairDataset.from_ids([[1]], [[2]], bad, vocab_size=99)
    assert caught.value.reason == "bad_ids"
    assert caught.value.field == "rejected_ids"


def test_from_ids_names_the_row_of_a_bad_id():
    with pytest.raises(DataError) as caught:
        PairDataset.from_ids([[1], [], [5, 99]], [[2]] * 3, [[3]] * 3, vocab_size=99)
    assert str(caught.value) == "row 3, `prompt_ids`: expected token ids in 0..99, found 99"


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [1, 3], [0, 2], [0, 4], [0, -1, 3]])
def test_from_ids_refuses_bad_offsets(offsets):
    ragged = Ragged(np.arange(3, dtype=np.int32), np.array(offsets))
    good = [[1]] * len(ragged)
    with pytest.raises(TensorError):
        PairDataset.from_ids(ragged, good, good)


def test_from_ids_takes_ragged_lists_and_arrays_alike():
    lists = [[1, 2], [3], []]
    ragged = Ragged.from_lists(lists)
    arrays = [np.array(ids, np.int64) for ids in lists]
    one, two, three = (
        PairDataset.from_ids(p, [[1]] * 3, [[2]] * 3) for p in (lists, ragged, arrays)
    )
    assert one.prompt_ids == two.prompt_ids == three.prompt_ids
    assert one.prompt_ids.tolist() == lists
    assert one.report.read == one.report.kept == 3


@pytest.mark.parametrize("values", [np.zeros((3, 1)), np.zeros(3), [[0, 0], [0, np.nan], [0, 0]]])
def test_reference_log_probs_have_one_finite_pair_a_row(values):
    with pytest.raises(ValueError, match="`values` must"):
        random_pairs(3).with_ref_logps(values)


@pytest.mark.parametrize("bad", [1e300, np.nan, -np.inf])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_reference_log_prob_that_float32_does_not_hold_is_an_error_and_no_infinity(layout, bad):
    ids = PairDataset.from_ids([[1]] * 3, [[2]] * 3, [[3]] * 3)
    values = np.zeros((3, 2))
    values[1, 0] = bad
    with pytest.raises(ValueError, match=r"`values` must be finite in float32, .* at pair 1"):
        ids.with_ref_logps(values)
    pairs = ids.with_ref_logps(np.zeros((3, 2)))
    pairs.ref_logps[1, 0] = bad  # behind its back, as a damaged file may
    with pytest.raises(DataError, match="pair 1: expected reference log-probs that float32 holds"):
        list(pairs.plan(layout=layout, pairs_per_batch=3))


def test_the_long_arrays_of_a_batch_are_one_allocation_and_the_short_ones_are_their_own():
    """Several that are freed together go back to the system, and every page is a fault again."""
    pairs = random_pairs(400)
    for layout in ("padded", "packed"):
        plan = pairs.plan(layout=layout, pairs_per_batch=200, shuffle=False)
        first = plan[0]
        batch = plan[0]
        assert batch.input_ids.base is not None
        roots = {id(root_of(getattr(batch, name))) for name in ("input_ids", "logit_rows")}
        assert len(roots) == 1
        assert root_of(batch.pair_index).nbytes <= 200 * 8
        for name, value in vars(first).items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(value, getattr(batch, name))
                assert not np.shares_memory(value, getattr(batch, name))


def root_of(array):
    while array.base is not None:
        array = array.base
    return array


def test_a_large_batch_makes_no_later_one_large():
    short, long = [[1, 2]] * 40, [1] * 2_000_000
    pairs = PairDataset.from_ids([long, *short[1:]], short, [[3]] * 40)
    plan = pairs.plan(layout="padded", pairs_per_batch=4, shuffle=False)
    held = list(plan)
    assert root_of(held[0].input_ids).nbytes > 10_000_000
    for batch in held[2:]:
        assert root_of(batch.input_ids).nbytes < 100_000


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", -1, r"`seed` must be in 0\.\.2\*\*64, found -1"),
        ("seed", 2**64, "`seed` must be in"),
        ("epoch", -1, "`epoch` must be in"),
        ("epoch", 2**64, "`epoch` must be in"),
        ("epoch", 1.5, "`epoch` must be a whole number, found float"),
        ("seed", None, "`seed` must be a whole number"),
        ("position", 99, "`position` must be in"),
        ("position", -1, "`position` must be in"),
        ("position", "3", "`position` must be a whole number"),
    ],
)
def test_a_state_with_a_wrong_number_leaves_the_plan_as_it_was(name, value, message):
    plan = random_pairs(8).plan(layout="padded", pairs_per_batch=2, seed=5, epoch=1)
    before = [batch.pair_index.tolist() for batch in plan]
    other = random_pairs(8).plan(layout="padded", pairs_per_batch=2, seed=9, epoch=2)
    with pytest.raises(DataError, match=message) as caught:
        plan.load_state_dict({**other.state_dict(2), name: value})
    assert caught.value.reason == "bad_state"
    assert (plan.seed, plan.epoch) == (5, 1)
    assert [batch.pair_index.tolist() for batch in plan] == before


@pytest.mark.parametrize("value", [1.5, "1", None])
def test_an_epoch_that_is_no_whole_number_is_a_type_error_and_changes_nothing(value):
    plan = random_pairs(8).plan(layout="padded", pairs_per_batch=2)
    with pytest.raises(TypeError, match="`epoch` must be a whole number"):
        plan.set_epoch(value)
    assert plan.epoch == 0
    with pytest.raises(TypeError, match="`pairs_per_batch` must be a whole number"):
        random_pairs(8).plan(layout="padded", pairs_per_batch=2.5)


def test_the_type_of_a_number_does_not_change_the_digest():
    pairs = random_pairs(8)
    one = pairs.plan(layout="padded", pairs_per_batch=2, seed=3, drop_last=False)
    other = pairs.plan(
        layout="padded", pairs_per_batch=np.int64(2), seed=np.int64(3), drop_last=0, shuffle=1
    )
    assert one.digest == other.digest
    assert other.load_state_dict(one.state_dict(2)) == 2
