"""The shared layout: each prompt once, its masks, and the same log-probs as the other layouts."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pair_cases import random_pairs

from dpo_ext import DataError, PairDataset, TensorError

BLOCK_NAMES = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def allowed_slowly(batch, window=None):
    """The mask of the rule in `Batch`, entry by entry."""
    rows, width = batch.input_ids.shape
    out = np.zeros((rows, width, width), bool)
    for r, q, k in itertools.product(range(rows), range(width), range(width)):
        doc, seg, pos = batch.doc[r], batch.seg[r], batch.position_ids[r]
        out[r, q, k] = (
            q >= k
            and doc[q] == doc[k]
            and seg[k] in (0, seg[q])
            and (window is None or pos[q] - pos[k] < window)
        )
    return out


def test_the_batch_of_the_docstring():
    pairs = PairDataset.from_ids([[1, 2], [6]], [[3, 4], [7]], [[5], [8, 9]])
    for options in ({"tokens_per_batch": 8}, {"pairs_per_batch": 2, "pad_to_multiple_of": 8}):
        batch = pairs.plan(layout="shared", shuffle=False, **options)[0]
        want = {
            "input_ids": [[1, 2, 3, 2, 6, 6, 8, 0]],
            "position_ids": [[0, 1, 2, 1, 0, 0, 1, 0]],
            "doc": [[0, 0, 0, 0, 1, 1, 1, -1]],
            "seg": [[0, 1, 1, 2, 1, 2, 2, 0]],
            "logit_rows": [1, 2, 3, 4, 5, 6],
            "targets": [3, 4, 5, 7, 8, 9],
            "seq_offsets": [0, 2, 3, 4, 6],
            "kv_rows": [0, 1, 2, 0, 3, 4, 5, 6, 7],
            "cu_seq_lens_q": [0, 3, 4, 5, 7, 8],
            "cu_seq_lens_k": [0, 3, 5, 6, 8, 9],
            "max_length_q": 3,
            "max_length_k": 3,
            "kv_num_blocks": [[[1]]],
            "kv_indices": [[[[0]]]],
            "full_kv_num_blocks": [[[0]]],
            "full_kv_indices": [[[[0]]]],
            "q_num_blocks": [[[1]]],
            "q_indices": [[[[0]]]],
            "full_q_num_blocks": [[[0]]],
            "full_q_indices": [[[[0]]]],
        }
        for name, value in want.items():
            found = getattr(batch, name)
            assert (found if isinstance(found, int) else found.tolist()) == value, name
        for name in ("doc", "seg", "cu_seq_lens_q", "cu_seq_lens_k", *BLOCK_NAMES):
            assert getattr(batch, name).dtype == np.int32, name
        assert batch.attention_mask is None


def sequence(batch, k, side):
    """Ids that the rows of one completion see, then its targets: the whole sequence again."""
    s = 2 * k + side
    start, stop = batch.seq_offsets[s], batch.seq_offsets[s + 1]
    rows = batch.logit_rows[start:stop]
    if not len(rows):
        return None
    width = batch.input_ids.shape[1]
    r, last = divmod(int(rows[-1]), width)
    seen = allowed_slowly(batch)[r, last]
    positions = batch.position_ids[r, seen]
    assert positions.tolist() == list(range(len(positions)))
    assert np.diff(rows).tolist() == [1] * (len(rows) - 1)
    return [*batch.input_ids[r, seen].tolist(), int(batch.targets[stop - 1])]


@given(
    st.integers(0, 12),
    st.integers(0, 99),
    st.integers(1, 5),
    st.integers(36, 60),
    st.integers(1, 3),
)
def test_an_epoch_shares_every_prompt_and_predicts_each_target_once(
    n, seed, multiple, length, rows
):
    pairs = random_pairs(n, seed, shortest=0)
    plan = pairs.plan(
        layout="shared",
        tokens_per_batch=rows * (length + multiple),
        bin_length=length,
        seed=seed,
        pad_to_multiple_of=multiple,
    )
    seen, real = [], 0
    for batch in plan:
        real += int((batch.doc >= 0).sum())
        scored = np.zeros(batch.input_ids.size, int)
        np.add.at(scored, batch.logit_rows, 1)
        feeds = (batch.seg.reshape(-1) > 0).astype(int)
        # Every row behind a prefix predicts exactly one target, and no other row any.
        assert scored.tolist() == feeds.tolist()
        for k, i in enumerate(batch.pair_index):
            pair = pairs[int(i)]
            prompt = pair["prompt_ids"].tolist()
            for side, name in enumerate(("chosen_ids", "rejected_ids")):
                whole = [*prompt, *pair[name].tolist()]
                found = sequence(batch, k, side)
                if found is None:
                    assert len(pair[name]) <= (0 if prompt else 1)
                else:
                    assert found == whole
            own = batch.doc == k
            p, c, r = len(prompt), len(pair["chosen_ids"]), len(pair["rejected_ids"])
            want = p + c + r - 1 if p else max(c - 1, 0) + max(r - 1, 0)
            assert own.sum() == want
            assert own.any(axis=1).sum() <= 1  # a pair is in one row
        seen.extend(batch.pair_index.tolist())
    assert sorted(seen) == list(range(n))
    assert plan.stats.real_tokens == real
    assert plan.stats.slots == sum(batch.input_ids.size for batch in plan)


@given(st.integers(1, 6), st.integers(0, 99), st.integers(0, 40))
def test_varlen_segments_causal_from_the_bottom_right_are_the_mask(n, seed, more):
    pairs = random_pairs(n, seed, shortest=0)
    batch = pairs.plan(layout="shared", pairs_per_batch=n, pad_to_multiple_of=1 + more)[0]
    size = batch.input_ids.size
    found = np.zeros((size, size), bool)
    starts = zip(
        itertools.pairwise(batch.cu_seq_lens_q),
        itertools.pairwise(batch.cu_seq_lens_k),
        strict=True,
    )
    longest = [0, 0]
    for (q, q_end), (k, k_end) in starts:
        longest = [max(longest[0], q_end - q), max(longest[1], k_end - k)]
        for i in range(q_end - q):
            keys = batch.kv_rows[k : k_end - (q_end - q) + i + 1]
            assert len(set(keys.tolist())) == len(keys)
            found[q + i, keys] = True
    assert batch.cu_seq_lens_q[-1] == size
    assert batch.cu_seq_lens_k[-1] == len(batch.kv_rows)
    assert longest == [batch.max_length_q, batch.max_length_k]
    np.testing.assert_array_equal(found[None], allowed_slowly(batch))


@pytest.mark.parametrize("window", [None, 3])
def test_the_dense_mask_is_the_rule(window):
    torch = pytest.importorskip("torch")
    from dpo_ext.layout.masks import dense_mask

    batch = random_pairs(8, shortest=0).plan(
        layout="shared", tokens_per_batch=128, bin_length=64, pad_to_multiple_of=64
    )[0]
    want = allowed_slowly(batch, window)[:, None]
    assert want.any(axis=-1).all()
    mask = dense_mask(batch, window=window)
    np.testing.assert_array_equal(mask.numpy(), want)
    added = dense_mask(batch, window=window, dtype=torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, mask)
    assert torch.equal(added == torch.finfo(torch.bfloat16).min, ~mask)


@pytest.mark.parametrize(
    ("longest", "width"), [(60, 128), (60, 200), (300, 1024), (500, 1500), (900, 2816), (12, 36)]
)
def test_block_arrays_equal_create_block_mask_entry_by_entry(longest, width):
    torch = pytest.importorskip("torch")
    from torch.nn.attention.flex_attention import create_block_mask

    from dpo_ext.layout.masks import dense_mask

    pairs = random_pairs(12, seed=longest, longest=longest, shortest=0)
    plan = pairs.plan(layout="shared", tokens_per_batch=2 * width * 2, bin_length=width * 2)
    batch = plan[0]
    mask = batch.block_mask()
    rows, length = batch.input_ids.shape
    want = create_block_mask(
        mask.mask_mod, B=rows, H=None, Q_LEN=length, KV_LEN=length, device="cpu"
    )
    assert mask.seq_lengths == want.seq_lengths
    assert mask.BLOCK_SIZE == want.BLOCK_SIZE
    for name in BLOCK_NAMES:
        found = getattr(mask, name)
        assert found.dtype == torch.int32
        assert torch.equal(found, getattr(want, name)), name
    assert longest < 300 or mask.full_kv_num_blocks.sum() > 0
    # The mask function itself, on every entry of a small batch.
    if length <= 512:
        at = [torch.arange(n) for n in (rows, 1, length, length)]
        dense = mask.mask_mod(*torch.meshgrid(*at, indexing="ij"))
        assert torch.equal(dense, dense_mask(batch))


def test_shared_scores_the_tokens_that_padded_scores():
    pairs = random_pairs(20, shortest=0)
    options = {"pairs_per_batch": 6, "seed": 1}
    for padded, shared in zip(
        pairs.plan(layout="padded", **options), pairs.plan(layout="shared", **options), strict=True
    ):
        assert padded.pair_index.tolist() == shared.pair_index.tolist()
        assert padded.targets.tolist() == shared.targets.tolist()
        assert padded.seq_offsets.tolist() == shared.seq_offsets.tolist()


def test_a_shared_prompt_saves_its_tokens():
    pairs = PairDataset.from_ids([[1] * 50] * 20, [[2] * 10] * 20, [[3] * 12] * 20)
    shared = pairs.plan(layout="shared", tokens_per_batch=512).stats
    packed = pairs.plan(layout="packed", tokens_per_batch=512).stats
    assert (shared.real_tokens, packed.real_tokens) == (20 * 71, 20 * 122)


def test_a_pair_that_no_bin_holds_is_an_error_of_the_plan():
    pairs = PairDataset.from_ids([[1] * 5], [[2]], [[3, 4]])
    with pytest.raises(DataError, match="pair 0 needs 7 tokens, more than a bin of 6"):
        pairs.plan(layout="shared", tokens_per_batch=6)
    assert pairs.plan(layout="shared", tokens_per_batch=7)[0].n_pairs == 1


def test_only_shared_batches_have_such_a_mask():
    pytest.importorskip("torch")
    from dpo_ext.layout.masks import dense_mask

    batch = random_pairs(2).plan(layout="packed", pairs_per_batch=2)[0]
    with pytest.raises(TensorError, match='only layout="shared" has such a mask, found "packed"'):
        dense_mask(batch)
    empty = PairDataset.from_ids([[]], [[1]], [[2]]).plan(layout="shared", pairs_per_batch=1)[0]
    assert empty.input_ids.shape == (1, 0)
    with pytest.raises(ValueError, match="at least one slot"):
        empty.block_mask()
