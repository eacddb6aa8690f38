"""The digest of a data set's contents: what it knows, and that saved data sets keep it."""

import json

import numpy as np
import pytest
from byte_tokenizer import tokenizer
from places import GOLDEN

from dpo_ext import PairDataset, Ragged, UnpairedDataset
from dpo_ext.data.prepare import prepare
from dpo_ext.errors import DataError
from dpo_ext.store.manifest import sealed

N = 20
PROMPT, CHOSEN, REJECTED = [[1, 2]] * N, [[i, 3] for i in range(N)], [[5, 6]] * N


def pairs(prompt=PROMPT, chosen=CHOSEN, rejected=REJECTED, **more):
    return PairDataset.from_ids(prompt, chosen, rejected, **more)


def moved_border():
    return [[1]] * N, [[2, i, 3] for i in range(N)], [[2, 5, 6]] * N


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_plan_refuses_the_state_of_other_pairs_of_the_same_lengths(layout):
    def plan(data):
        return data.plan(layout=layout, pairs_per_batch=2)

    one = pairs()
    state = plan(one).state_dict(3)
    weights = [[1.0, 0.5]] * N
    others = {
        "ids": pairs([[9, 9]] * N, [[8, 8]] * N, [[7, 7]] * N),
        "one id": pairs(chosen=[*CHOSEN[:-1], [N, 4]]),
        "sides": pairs(chosen=REJECTED, rejected=CHOSEN),
        "order": pairs(chosen=CHOSEN[::-1]),
        "a rotation": one.select([*range(1, N), 0]),
        "weights": pairs(chosen_weights=weights, rejected_weights=weights),
        "a border": pairs(*moved_border()),
        "fewer": one[:-1],
    }
    for name, other in others.items():
        assert plan(other).digest != plan(one).digest, name
        with pytest.raises(DataError, match="hint: resume with the same data in the same order"):
            plan(other).load_state_dict(state)
    alike = {
        "again": pairs(),
        "a selection": pairs().select(range(N)),
        "joined": one[:7].concat(one[7:]),
        "weights of 1": pairs(chosen_weights=[[1, 1]] * N, rejected_weights=[[1, 1]] * N),
        "log-probs": one.with_ref_logps(np.zeros((N, 2))),
    }
    for name, same in alike.items():
        assert plan(same).load_state_dict(state) == 3, name


def test_a_plan_refuses_the_state_of_other_single_completions():
    labels = [True, False] * (N // 2)

    def plan(completions=CHOSEN, labels=labels):
        data = UnpairedDataset.from_ids(PROMPT, completions, labels=labels)
        return data.plan(layout="padded", examples_per_batch=2)

    state = plan().state_dict(1)
    assert plan().load_state_dict(state) == 1
    for other in (plan(CHOSEN[::-1]), plan(labels=labels[::-1])):
        with pytest.raises(DataError, match="saved for other batches"):
            other.load_state_dict(state)


def test_another_number_of_ranks_is_refused_with_what_to_do():
    state = pairs().plan(layout="padded", pairs_per_batch=2, world_size=2).state_dict(1)
    for world_size in (1, 3):
        plan = pairs().plan(layout="padded", pairs_per_batch=2, world_size=world_size)
        with pytest.raises(DataError, match="batch size and world size"):
            plan.load_state_dict(state)
    for rank in (0, 1):
        plan = pairs().plan(layout="padded", pairs_per_batch=2, world_size=2, rank=rank)
        assert plan.load_state_dict(state) == 1


def test_lists_that_are_replaced_are_other_contents():
    one = pairs()
    before = one.contents
    one.rejected_ids = Ragged.from_lists([[5, 7]] * N)
    assert one.contents == pairs(rejected=[[5, 7]] * N).contents != before


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("weighed", [False, True])
def test_a_saved_data_set_keeps_its_contents(tmp_path, monkeypatch, weighed):
    weights = [[1.0, 0.5]] * N if weighed else None
    one = pairs(chosen_weights=weights, rejected_weights=weights)
    one.save(tmp_path)
    assert manifest(tmp_path)["contents"] == one.contents
    loaded = PairDataset.load(tmp_path)
    assert loaded[1:].concat(loaded[:1]).contents != one.contents
    monkeypatch.setattr("dpo_ext.pairs.contents_of", None)  # nothing is read for it
    assert loaded.contents == loaded.with_ref_logps(np.zeros((N, 2))).contents == one.contents


def test_a_data_set_that_was_saved_without_it_has_the_same(tmp_path):
    one = pairs()
    one.save(tmp_path)
    old = manifest(tmp_path)
    del old["contents"], old["checksum"]
    (tmp_path / "manifest.json").write_bytes(sealed(old))
    assert PairDataset.load(tmp_path).contents == one.contents
    for wrong in ("x" * 32, "", 5):
        (tmp_path / "manifest.json").write_bytes(sealed({**old, "contents": wrong}))
        with pytest.raises(DataError, match="`contents`: expected 32 hexadecimal digits"):
            PairDataset.load(tmp_path)


def test_folders_of_earlier_versions_have_contents():
    for kind, folder in ((PairDataset, "pairs-v1"), (UnpairedDataset, "unpaired-v1")):
        assert "contents" not in manifest(GOLDEN / folder)
        loaded = kind.load(GOLDEN / folder)
        assert loaded.contents == loaded.select(range(len(loaded))).contents


def test_what_is_prepared_has_the_contents_of_what_is_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"why {i}?", "chosen": " because", "rejected": " no"} for i in range(300)]
    file.write_text("\n".join(map(json.dumps, rows)))
    own = tokenizer(tmp_path / "model")
    prepare(file, own, tmp_path / "out")
    read = PairDataset.from_files(file, own)
    assert manifest(tmp_path / "out")["contents"] == read.contents
