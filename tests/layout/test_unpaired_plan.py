"""Batches of single completions, and of the mismatched ones beside them."""

import pickle

import numpy as np
import pytest

from dpo_ext import DataError, UnpairedDataset

PAD = 99
DEFAULTS = {"layout": "padded", "examples_per_batch": 4}


def examples_of(n=11, seed=0, max_length=None, longest=9):
    """Examples of random lengths, one without a prompt; every id says where it stands."""
    rng = np.random.default_rng(seed)
    prompts, completions = [], []
    for i in range(n):
        p = 0 if i == 2 else int(rng.integers(1, longest))
        c = int(rng.integers(2, longest))
        prompts.append([1000 * (i + 1) + k for k in range(p)])
        completions.append([1000 * (i + 1) + 500 + k for k in range(c)])
    labels = rng.integers(0, 2, n)
    return UnpairedDataset.from_ids(prompts, completions, labels, max_length=max_length, pad_id=PAD)


def check(examples, batch, index, others):
    """The batch is what a loop over its sequences says."""
    sequences = []
    for i, other in zip(index, others, strict=True):
        prompt = examples.prompt_ids[i].tolist()
        whole = prompt + examples.completion_ids[other].tolist()
        sequences.append((len(prompt), whole[: examples.max_length]))
    assert batch.pair_index.tolist() == list(index)
    assert batch.completion_index.tolist() == list(others)
    flat = batch.input_ids.reshape(-1)
    used = np.zeros(flat.size, bool)
    starts = find(batch, sequences)
    rows, targets, ends = [], [], [0]
    for start, (prompt, ids) in zip(starts, sequences, strict=True):
        assert flat[start : start + len(ids)].tolist() == ids
        assert not used[start : start + len(ids)].any()
        used[start : start + len(ids)] = True
        for k in range(max(prompt, 1), len(ids)):
            rows.append(start + k - 1)
            targets.append(ids[k])
        ends.append(len(rows))
        # No sequence goes over the end of its row.
        width = batch.input_ids.shape[1]
        assert start // width == (start + len(ids) - 1) // width
    assert (flat[~used] == PAD).all()
    assert batch.logit_rows.tolist() == rows
    assert batch.targets.tolist() == targets
    assert batch.seq_offsets.tolist() == ends
    if batch.layout == "padded":
        assert batch.attention_mask.reshape(-1).astype(bool).tolist() == used.tolist()
        scored = np.zeros(flat.size, np.int64)
        for start, (prompt, ids) in zip(starts, sequences, strict=True):
            scored[start + prompt : start + len(ids)] = 1
        assert batch.completion_mask.reshape(-1).tolist() == scored.tolist()
    else:
        line = range(0, flat.size + 1, batch.input_ids.shape[1])
        cuts = {
            *line,
            *starts,
            *(s + len(ids) for s, (_, ids) in zip(starts, sequences, strict=True)),
        }
        assert batch.cu_seq_lens_q.tolist() == sorted(cuts) == batch.cu_seq_lens_k.tolist()
        positions = np.concatenate([np.arange(n) for n in np.diff(sorted(cuts))])
        assert batch.position_ids.reshape(-1).tolist() == positions.tolist()
        assert batch.max_length_q == batch.max_length_k == np.diff(sorted(cuts)).max()


def find(batch, sequences):
    """Where each sequence begins: ids of a completion are its own, and prompts stand before."""
    flat = batch.input_ids.reshape(-1).tolist()
    if batch.layout == "padded":
        return [r * batch.input_ids.shape[1] for r in range(len(sequences))]
    starts = []
    for prompt, ids in sequences:
        at = [i for i in range(len(flat)) if flat[i : i + len(ids)] == ids and i not in starts]
        assert len(at) == 1, prompt
        starts.append(at[0])
    return starts


@pytest.mark.parametrize("max_length", [None, 10])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize(
    "size", [{"examples_per_batch": 4}, {"tokens_per_batch": 64}], ids=["examples", "tokens"]
)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_batches_are_those_of_a_loop(layout, size, multiple, max_length):
    examples = examples_of(max_length=max_length)
    plan = examples.plan(layout=layout, **size, pad_to_multiple_of=multiple, seed=3)
    seen = []
    for batch in plan:
        index = batch.pair_index.tolist()
        seen += index
        check(examples, batch, index, index)
        check(examples, batch.kl, index, index[-1:] + index[:-1])
        assert batch.labels.tolist() == examples.labels[index].tolist()
        assert batch.input_ids.shape[1] % multiple == 0
        assert batch.n_examples == batch.table.n_groups == len(index)
        assert batch.table.group_size == 1
    assert sorted(seen) == list(range(len(examples)))


def test_packed_bins_are_filled_as_told():
    examples = examples_of(40)
    plan = examples.plan(layout="packed", tokens_per_batch=64, bin_length=32)
    for batch in plan:
        assert batch.input_ids.shape[0] <= 2
        assert batch.input_ids.shape[1] == 32
        index = batch.pair_index.tolist()
        check(examples, batch, index, index)
        check(examples, batch.kl, index, index[-1:] + index[:-1])
    assert plan.stats.real_tokens == examples.tokens.sum()
    assert plan.stats.slots == sum(batch.input_ids.size for batch in plan)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_stats_count_what_is_there(layout):
    examples = examples_of(16)
    plan = examples.plan(layout=layout, examples_per_batch=4)
    assert plan.stats.slots == sum(batch.input_ids.size for batch in plan)
    assert plan.stats.real_tokens == examples.tokens.sum()


def test_mismatched_completions_get_the_room_of_their_prompt():
    """As in TRL the completion is cut behind the prompt that it stands behind."""
    examples = UnpairedDataset.from_ids(
        [[1] * 8, [2]], [[3] * 9, [4] * 9], [True, False], max_length=10
    )
    batch = examples.plan(layout="padded", examples_per_batch=2, shuffle=False)[0]
    assert batch.input_ids.tolist() == [[1] * 8 + [3] * 2, [2] + [4] * 9]
    assert batch.kl.input_ids.tolist() == [[1] * 8 + [4] * 2, [2] + [3] * 9]


def test_a_completion_cut_at_its_start_is_cut_there_behind_another_prompt(tmp_path):
    import byte_tokenizer

    rows = [
        {"prompt": "abcdef", "completion": "ghijk", "label": 1},
        {"prompt": "l", "completion": "mnopqrs", "label": 0},
    ]
    tokenizer = byte_tokenizer.tokenizer(tmp_path)
    options = {"max_length": 9, "truncation": "keep_end"}
    examples = UnpairedDataset.from_rows(rows, tokenizer, **options)
    batch = examples.plan(layout="padded", examples_per_batch=2, shuffle=False)[0]
    read = [byte_tokenizer.decode(ids[ids != examples.pad_id]) for ids in batch.input_ids]
    assert read == ["defghijk<|end|>", "lmnopqrs<|end|>"]
    kl = [byte_tokenizer.decode(ids[ids != examples.pad_id]) for ids in batch.kl.input_ids]
    assert kl == ["defopqrs<|end|>", "lghijk<|end|>"]


def test_ranks_share_one_list_of_batches():
    examples = examples_of(24)
    whole = examples.plan(**DEFAULTS)
    for rank in range(2):
        mine = examples.plan(**DEFAULTS, rank=rank, world_size=2)
        for i, batch in enumerate(mine):
            other = whole[2 * i + rank]
            assert batch.pair_index.tolist() == other.pair_index.tolist()
            assert batch.kl.input_ids.tolist() == other.kl.input_ids.tolist()
        assert mine.examples_in_step(0) == 8


def test_known_log_probs_of_the_reference_come_along():
    examples = examples_of(8)
    whose = np.array([3, 0, 1, 2, 7, 4, 5, 6])
    known = examples.with_ref_logps(-np.arange(8), kl=-10 - np.arange(8), kl_completions=whose)
    first, second = known.plan(**DEFAULTS, shuffle=False)
    assert first.ref_logps.tolist() == [0, -1, -2, -3]
    assert second.kl.ref_logps.tolist() == [-14, -15, -16, -17]
    assert second.kl.ref_logps.dtype == np.float32
    alone = examples.with_ref_logps(-np.arange(8)).plan(**DEFAULTS)[0]
    assert alone.ref_logps.tolist() == (-alone.pair_index).tolist()
    assert alone.kl.ref_logps is None


def test_log_probs_of_other_pairings_are_refused():
    examples = examples_of(8)
    whose = np.array([3, 0, 1, 2, 7, 4, 5, 6])
    known = examples.with_ref_logps(np.zeros(8), kl=np.zeros(8), kl_completions=whose)
    for options in ({"shuffle": True}, {"shuffle": False, "examples_per_batch": 8}):
        plan = known.plan(**(DEFAULTS | options))
        with pytest.raises(DataError, match=r"of example \d behind its prompt, found"):
            list(plan)
    without = known.plan(**DEFAULTS, kl=False)
    assert all(batch.kl is None for batch in without)
    # What is selected is numbered anew, so that nothing is known of its pairings.
    assert known[:4].plan(**DEFAULTS)[0].kl.ref_logps is None


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"layout": "shared"}, ValueError, "unknown `layout` 'shared': there is"),
        ({"examples_per_batch": 1}, ValueError, "must be at least 2, found 1"),
        ({"examples_per_batch": 0, "kl": False}, ValueError, "must be at least 1, found 0"),
        ({"tokens_per_batch": 64}, ValueError, "exactly one of `examples_per_batch`"),
        ({"examples_per_batch": None}, ValueError, "exactly one of `examples_per_batch`"),
        (
            {"examples_per_batch": None, "tokens_per_batch": 3},
            DataError,
            "example 0 needs .* slots, more than `tokens_per_batch` 3",
        ),
        (
            {"layout": "packed", "examples_per_batch": None, "tokens_per_batch": 3},
            DataError,
            "3",
        ),
        ({"bin_length": 3}, ValueError, "`bin_length` needs"),
    ],
)
def test_wrong_plans_are_refused(options, kind, said):
    with pytest.raises(kind, match=said):
        examples_of().plan(**(DEFAULTS | options))


def test_one_example_alone_is_told_of():
    with pytest.warns(UserWarning, match="1 of 3 batches have one example") as told:
        plan = examples_of(9).plan(**DEFAULTS, shuffle=False)
    assert told[0].filename == __file__
    assert plan[2].kl.completion_index.tolist() == [8]
    assert len(examples_of(9).plan(**DEFAULTS, drop_last=True)) == 2
    assert len(examples_of(9).plan(**DEFAULTS, kl=False)) == 3


def test_a_state_is_of_one_plan():
    examples = examples_of(12)
    plan = examples.plan(**DEFAULTS)
    again = examples.plan(**DEFAULTS)
    assert again.load_state_dict(plan.state_dict(2)) == 2
    others = [
        examples.plan(**DEFAULTS, kl=False),
        examples.plan(layout="packed", examples_per_batch=4),
        examples_of(12, max_length=9).plan(**DEFAULTS),
        examples_of(12, seed=1).plan(**DEFAULTS),
    ]
    for other in others:
        with pytest.raises(DataError, match="saved for other batches"):
            other.load_state_dict(plan.state_dict(2))


def test_plans_and_batches_are_sent_to_workers():
    plan = examples_of(12).plan(**DEFAULTS)
    again = pickle.loads(pickle.dumps(plan))
    batch = pickle.loads(pickle.dumps(again[1]))
    assert batch.kl.input_ids.tolist() == plan[1].kl.input_ids.tolist()
    assert "4 examples" in batch._repr_html_()


def test_a_loader_gives_the_batches_as_tensors():
    torch = pytest.importorskip("torch")
    from dpo_ext.torch import PairLoader

    examples = examples_of(32)
    with pytest.raises(TypeError, match="found UnpairedDataset, a data set"):
        PairLoader(examples)
    for layout in ("padded", "packed"):
        plan = examples.plan(layout=layout, examples_per_batch=4)
        for batch, wanted in zip(PairLoader(plan), plan, strict=True):
            for found, one in ((batch, wanted), (batch.kl, wanted.kl)):
                assert isinstance(found.input_ids, torch.Tensor)
                assert found.input_ids.tolist() == one.input_ids.tolist()
                assert found.table.targets.tolist() == one.targets.tolist()
                inputs = {k for k, v in found.model_inputs.items() if isinstance(v, torch.Tensor)}
                assert "input_ids" in inputs
            assert batch.labels.tolist() == wanted.labels.tolist()
