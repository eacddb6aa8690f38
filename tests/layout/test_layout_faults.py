"""The faults of packing, batches and offsets: each cannot happen, or is a typed error."""

import hashlib
import itertools
import os
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pair_cases import random_pairs
from places import ROOT, child_path

from dpo_ext import DataError, LimitExceeded, PairDataset, Ragged, pack_lengths
from dpo_ext.report import Report

LAYOUTS = ("padded", "packed", "shared")


def lengths_only(*lengths):
    """A data set whose ids do not exist: each pair's prompt, chosen and rejected have one length."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = Ragged(np.empty(0, np.int32), offsets)
    n = len(lengths)
    return PairDataset(ids, ids, ids, report=Report(n, n), pad_id=0, vocab_size=None)


def test_sums_beyond_32_bits_are_a_limit_and_no_wrong_offset():
    pairs = lengths_only(2**30, 2**30, 1)
    assert pairs.tokens.sum() == 4 * (2**31 + 1)
    for layout, field in (
        ("padded", "seq_offsets"),
        ("packed", "seq_offsets"),
        ("shared", "seq_offsets"),
    ):
        plan = pairs.plan(layout=layout, pairs_per_batch=3, shuffle=False)
        assert plan.stats.slots > 2**31
        with pytest.raises(LimitExceeded) as caught:
            plan[0]
        assert caught.value.field == field
    # Few scored tokens, many slots.
    prompt = Ragged(np.empty(0, np.int32), np.array([0, 2**31]))
    one = Ragged(np.array([1], np.int32), np.array([0, 1]))
    long = PairDataset(prompt, one, one, report=Report(1, 1), pad_id=0, vocab_size=None)
    for layout, field in (("packed", "cu_seq_lens_q"), ("shared", "cu_seq_lens_k")):
        with pytest.raises(LimitExceeded, match=r"more than 2\^31 - 1 slots") as caught:
            long.plan(layout=layout, pairs_per_batch=1)[0]
        assert caught.value.field == field
    bins = pack_lengths([2**30, 2**30, 1], 2**31 - 1)
    assert sorted(len(items) for items in bins) == [1, 2]
    assert len(pack_lengths([2**30, 2**30, 1], 2**31 + 1)) == 1


@given(st.integers(0, 25), st.integers(0, 99), st.sampled_from(["packed", "shared"]))
def test_no_pair_is_lost_doubled_split_or_crossed(n, seed, layout):
    pairs = random_pairs(n, seed, shortest=0)
    plan = pairs.plan(layout=layout, tokens_per_batch=150, bin_length=50, seed=seed)
    seen = []
    for batch in plan:
        width = batch.input_ids.shape[1]
        for k, i in enumerate(batch.pair_index.tolist()):
            pair, rows = pairs[i], set()
            for side, name in enumerate(("chosen_ids", "rejected_ids")):
                own = slice(*batch.seq_offsets[2 * k + side : 2 * k + side + 2])
                rows |= set((batch.logit_rows[own] // width).tolist())
                skipped = 0 if len(pair["prompt_ids"]) else 1
                assert batch.targets[own].tolist() == pair[name].tolist()[skipped:]
            assert len(rows) <= 1  # chosen beside rejected
            seen.append(i)
        for ends, last in ((batch.cu_seq_lens_q, batch.input_ids.size), (batch.seq_offsets, None)):
            assert (np.diff(ends) >= 0).all()
            assert ends[-1] == (len(batch.targets) if last is None else last)
    assert sorted(seen) == list(range(n))


def test_the_head_gives_equal_bits_on_equal_rows_of_all_layouts():
    """Through models: `test_three_layouts_give_the_same_log_probs_and_gradients`."""
    torch = pytest.importorskip("torch")
    from dpo_ext.torch import sequence_logps

    pairs = random_pairs(16, shortest=1)
    found = {}
    for layout in LAYOUTS:
        batch = pairs.plan(layout=layout, pairs_per_batch=16, shuffle=False)[0].to("cpu")
        # A row of logits that follows from pair, side and place alone, put wherever the table says.
        logits = torch.full((batch.input_ids.numel(), 99), float("nan"))
        ends = batch.seq_offsets.tolist()
        for s, (a, b) in enumerate(itertools.pairwise(ends)):
            generator = torch.Generator().manual_seed(s)
            logits[batch.logit_rows[a:b]] = torch.randn(b - a, 99, generator=generator)
        found[layout] = sequence_logps(logits, batch.table)
    assert found["padded"].isfinite().all()
    assert torch.equal(found["padded"], found["packed"])
    assert torch.equal(found["padded"], found["shared"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_to_score_is_zero_and_counts_nothing(layout):
    torch = pytest.importorskip("torch")
    from dpo_ext.torch import preference_loss, sequence_logps

    # No completion, no prompt and one token, one token, everything empty.
    pairs = PairDataset.from_ids([[1, 2], [], [3], []], [[], [4], [5], []], [[6], [7], [], []])
    batch = pairs.plan(layout=layout, pairs_per_batch=4, shuffle=False)[0].to("cpu")
    logits = torch.randn(batch.input_ids.numel(), 9)
    logps = sequence_logps(logits, batch.table)
    scored = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 0]])
    assert batch.table.lengths.tolist() == scored.tolist()
    assert ((logps != 0) == (scored > 0)).all()
    # A loss of averages: an empty side counts as 0, and 0/0 nowhere.
    out = preference_loss(logps, loss="simpo", lengths=batch.table.lengths, beta=2.0, gamma=0.0)
    average = logps.double() / scored.clamp(min=1)
    want = torch.nn.functional.softplus(-2.0 * (average[:, 0] - average[:, 1]))
    torch.testing.assert_close(out.per_pair.double(), want)
    empty = PairDataset.from_ids([], [], []).plan(layout=layout, pairs_per_batch=4)
    assert len(empty) == 0
    with pytest.raises(IndexError):
        empty[0]


def test_the_shift_by_one_is_exact_for_every_small_pair():
    """For labels: `test_every_small_label_matrix_is_shifted_by_one_and_interleaved`."""
    cases = 0
    for p, c, r in itertools.product(range(4), repeat=3):
        prompt, chosen, rejected = range(10, 10 + p), range(20, 20 + c), range(30, 30 + r)
        pairs = PairDataset.from_ids([list(prompt)], [list(chosen)], [list(rejected)])
        for layout in LAYOUTS:
            batch = pairs.plan(layout=layout, pairs_per_batch=1, pad_to_multiple_of=8)[0]
            fed, position = batch.input_ids.reshape(-1), []
            for side, ids in enumerate((chosen, rejected)):
                own = slice(*batch.seq_offsets[side : side + 2])
                whole = [*prompt, *ids]
                first = max(p, 1)
                assert batch.targets[own].tolist() == whole[first:]
                # The row of a target holds the token before it.
                assert fed[batch.logit_rows[own]].tolist() == whole[first - 1 : -1]
                position += batch.logit_rows[own].tolist()
            assert len(set(position)) == len(position)
            cases += 1
    assert cases == 192


def test_release_builds_keep_overflow_checks():
    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))
    assert cargo["profile"]["release"]["overflow-checks"] is True
    assert cargo["lints"]["rust"]["unsafe_code"] == "deny"
    # What has the wrong size is an error even where Python's own arithmetic would be at fault.
    from dpo_ext import TensorError, _core

    ids = (np.array([1, 2], np.int32), np.array([0, 2]))
    table = {
        "logit_rows": np.empty(4, np.int64),
        "targets": np.empty(4, np.int32),
        "seq_offsets": np.empty(3, np.int32),
    }
    lists = {"prompt": ids, "chosen": ids, "rejected": ids, "index": np.array([0]), "pad_id": 0}
    names = ("input_ids", "attention_mask", "completion_mask")
    for width in (0, 1, 3):
        rows = {name: np.empty(2 * width, np.int64) for name in names}
        with pytest.raises(TensorError, match="needs more than its"):
            _core.pad_into(**lists, **rows, **table)
    rows = {name: np.empty(8, np.int64) for name in names}
    for name, size in (("targets", 3), ("seq_offsets", 2), ("seq_offsets", 4), ("logit_rows", 9)):
        wrong = {**table, name: np.empty(size, table[name].dtype)}
        with pytest.raises(TensorError):
            _core.pad_into(**lists, **rows, **wrong)
    with pytest.raises(TensorError, match="pair 1 is not among the 1 pairs"):
        _core.pad_into(**{**lists, "index": np.array([1])}, **rows, **table)


DIGEST = """
import hashlib
from pair_cases import random_pairs
made = hashlib.sha256()
for layout, options in (("padded", {"tokens_per_batch": 200}), ("packed", {"tokens_per_batch": 60}),
                        ("shared", {"tokens_per_batch": 60})):
    for batch in random_pairs(50).plan(layout=layout, seed=3, epoch=1, **options):
        for name, value in sorted(vars(batch).items()):
            made.update(name.encode() + (value.tobytes() if hasattr(value, "tobytes") else b""))
print(made.hexdigest())
"""


@pytest.mark.slow
def test_bytes_do_not_depend_on_threads_hashing_or_run():
    found = set()
    for threads, hashing in (("1", "0"), ("2", "1"), ("8", "random")):
        environment = {
            **os.environ,
            "PYTHONPATH": child_path(),
            "RAYON_NUM_THREADS": threads,
            "PYTHONHASHSEED": hashing,
        }
        done = subprocess.run(
            [sys.executable, "-c", DIGEST],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        found.add(done.stdout.strip())
    assert len(found) == 1
    assert len(found.pop()) == hashlib.sha256().digest_size * 2


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 9, 12], "pair 1 needs 9 tokens, more than a bin of 8\nhint: use a bin of 12 or more"),
        ([9], "pair 0 needs 9 tokens, more than a bin of 8\nhint: use a bin of 9 or more"),
        ([1, 2, -1], "pair 2 has the negative length -1"),
        ([-(2**62)], "pair 0 has the negative length"),
        ([2**62], "pair 0 needs 4611686018427387904 tokens"),
    ],
)
def test_lengths_that_fit_nowhere_are_named_with_what_would_work(lengths, message):
    with pytest.raises(DataError) as caught:
        pack_lengths(lengths, 8)
    assert str(caught.value).startswith(message)


def test_length_zero_is_placed_and_a_pair_over_its_bin_is_an_error_of_the_plan():
    for lengths in ([0], [0, 0, 0], [8, 0, 8], [0] * 100 + [8]):
        bins = pack_lengths(lengths, 8)
        assert sorted(bins.values.tolist()) == list(range(len(lengths)))
    pairs = PairDataset.from_ids([[1] * 5, [1]], [[2], [2]], [[3, 4], [3]])
    for layout, need in (("packed", 13), ("shared", 7)):
        with pytest.raises(DataError) as caught:
            pairs.plan(layout=layout, tokens_per_batch=need - 1)
        assert f"pair 0 needs {need} tokens" in str(caught.value)
        assert f"use a bin of {need} or more" in str(caught.value)
        assert len(pairs.plan(layout=layout, tokens_per_batch=need)) >= 1


def test_lists_of_batches_are_copies_of_nothing_that_changes():
    """Views, tables, threads: test_ring.py."""
    pytest.importorskip("torch")
    from dpo_ext.torch import PairLoader

    loader = PairLoader(random_pairs(40).plan(layout="packed", tokens_per_batch=80))
    copies = [batch.input_ids.clone() for batch in loader]
    kept = list(loader)
    for _ in loader:
        pass
    assert all((a.input_ids == b).all() for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_as_many_batches_for_every_n_and_world_size(layout, drop_last):
    for n in range(41):
        pairs = random_pairs(n, seed=n, longest=4)
        options = {"layout": layout, "tokens_per_batch": 24, "drop_last": drop_last}
        whole = len(pairs.plan(**options))
        for world in range(1, 41):
            plan = pairs.plan(**options, world_size=world, rank=n % world)
            want = whole // world if drop_last else -(-whole // world)
            assert len(plan) == want
            assert len(pairs.plan(**options, world_size=world, rank=world - 1)) == want
            if want and not drop_last:
                last = plan[want - 1]
                assert last.n_pairs > 0
                assert plan.pairs_in_step(want - 1) >= world
