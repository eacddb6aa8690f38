"""Weights of tokens from rows: beside ids, as spans of characters of texts and of messages; saved, mapped, in batches."""

import json
import pickle

import numpy as np
import pytest
import torch
from byte_tokenizer import decode, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from places import NO_SHARED, SHARED

from dpo_ext import DataError, PairDataset, Tokenizer
from dpo_ext.torch import PairLoader, sequence_logps

TEMPLATE = (
    "{% for m in messages %}{{ '<|turn|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
TRIMMING = TEMPLATE.replace("m.content", "m.content | trim")
IDS = [
    {
        "prompt_ids": [1, 2],
        "chosen_ids": [3, 4, 5],
        "rejected_ids": [6],
        "chosen_weights": [1, 0.5, 0],
    },
    {"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [6, 7], "rejected_weights": [False, 2]},
    {"prompt_ids": [1], "chosen_ids": [3], "rejected_ids": [8, 9]},
]
OF_IDS = {
    "chosen_weights": [[1, 0.5, 0], [1], [1]],
    "rejected_weights": [[1], [0, 2], [1, 1]],
}


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "model", template=TEMPLATE)


@pytest.fixture(scope="module")
def trimming(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("trimming") / "model", template=TRIMMING)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """The same tokenizer served by the crate."""
    made = tokenizer(
        tmp_path_factory.mktemp("slow") / "model",
        template=TEMPLATE,
        normalizer={"type": "Replace", "pattern": {"String": "\x07"}, "content": ""},
    )
    assert made.engine == "tokenizers"
    return made


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def both(pairs):
    return {name: lists.tolist() for name, lists in pairs.weights.items()}


def pieces(pairs, i=0, side="chosen"):
    """The text of each run of tokens of one weight, with that weight."""
    ids, weights = getattr(pairs, f"{side}_ids")[i], getattr(pairs, f"{side}_weights")[i]
    ends = [*np.flatnonzero(np.diff(weights)) + 1, len(ids)]
    starts = [0, *ends[:-1]]
    return [
        (decode(ids[a:b].tolist()), float(weights[a])) for a, b in zip(starts, ends, strict=True)
    ]


def test_ids_bring_a_weight_each(tok):
    pairs = PairDataset.from_rows(IDS, tok)
    assert both(pairs) == OF_IDS
    assert pairs.chosen_weights.values.dtype == np.float32
    assert pairs[0]["chosen_weights"].tolist() == [1, 0.5, 0]
    assert pairs.report.unread == ()


def test_weights_of_1_are_none(tok):
    pairs = PairDataset.from_rows([{**IDS[2], "chosen_weights": [1.0]}], tok)
    assert pairs.chosen_weights is pairs.rejected_weights is None
    assert "chosen_weights" not in pairs[0]
    null = {**IDS[2], "chosen_weights": None, "rejected_weights": None}
    assert PairDataset.from_rows([null], tok).weights == {}


def test_ignored_columns_weigh_nothing(tok):
    names = ("chosen_weights", "rejected_weights")
    assert PairDataset.from_rows(IDS, tok, ignore_columns=names).weights == {}


def test_from_ids_takes_them():
    ids = [[row[name] for row in IDS] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    pairs = PairDataset.from_ids(*ids, **OF_IDS)
    assert both(pairs) == OF_IDS
    half = PairDataset.from_ids(*ids, chosen_weights=OF_IDS["chosen_weights"])
    assert half.rejected_weights.tolist() == [[1], [1, 1], [1, 1]]
    ones = [[1], [True, 1], [1, 1]]
    assert PairDataset.from_ids(*ids, rejected_weights=ones).weights == {}
    with pytest.raises(DataError, match=r"pair 1, `rejected_weights`: expected 2 weights"):
        PairDataset.from_ids(*ids, rejected_weights=[[1], [1], [1, 1]])
    with pytest.raises(DataError, match=r"`chosen_weights`: expected finite weights, found inf"):
        PairDataset.from_ids(*ids, chosen_weights=[[1, np.inf, 0], [1], [1]])
    with pytest.raises(TypeError, match="expected a list of numbers"):
        PairDataset.from_ids(*ids, chosen_weights=[["a", "b", "c"], [1], [1]])


@pytest.mark.parametrize("engine", ["tok", "slow"])
@pytest.mark.parametrize("boundary", ["joint", "separate", "trl"])
def test_spans_of_a_text_are_in_characters(engine, boundary, request):
    tok = request.getfixturevalue(engine)
    row = {"prompt": "é🙂?", "chosen": " ñ🙂no", "rejected": " x"}
    row["chosen_weights"] = [[2, 3, 0.0], [1, 2, 0.5]]
    pairs = PairDataset.from_rows([row], tok, boundary=boundary)
    assert pieces(pairs) == [(" ", 1.0), ("ñ", 0.5), ("🙂", 0.0), ("no<|end|>", 1.0)]
    assert pairs.rejected_weights.tolist() == [[1.0] * len(pairs.rejected_ids[0])]


@pytest.mark.parametrize("special", ["special", "text"])
def test_a_span_reaches_the_eos_that_the_text_spells(tok, special):
    row = {"prompt": "Why?", "chosen": " no<|end|>", "rejected": " x<|end|>"}
    row |= {"chosen_weights": [[0, 10, 0.5]], "rejected_weights": [[0, 2, 0.5]]}
    pairs = PairDataset.from_rows([row], tok, special_tokens_in_text=special)
    assert pieces(pairs) == [(" no<|end|>", 0.5)]
    assert pieces(pairs, side="rejected") == [(" x", 0.5), ("<|end|>", 1.0)]


def test_a_token_over_a_border_has_the_weight_of_the_span_that_it_touches(tok):
    assert len(tok.encode("hello", add_special_tokens=False)) == 1
    row = {"prompt": "So:", "chosen": "xhelloyz", "rejected": "no"}
    for spans, want in [
        ([[1, 2, 0.5]], [("x", 1.0), ("hello", 0.5), ("yz<|end|>", 1.0)]),
        ([[5, 7, 0.5]], [("x", 1.0), ("helloy", 0.5), ("z<|end|>", 1.0)]),
        ([[5, 7, 0.5], [0, 2, 0.25]], [("xhello", 0.25), ("y", 0.5), ("z<|end|>", 1.0)]),
    ]:
        pairs = PairDataset.from_rows([{**row, "chosen_weights": spans}], tok)
        assert pieces(pairs) == want


def test_characters_of_an_implicit_side_are_those_of_its_field(tok):
    chosen = "Human: hi\n\nAssistant: hello you"
    row = {"chosen": chosen, "rejected": "Human: hi\n\nAssistant: go"}
    row["chosen_weights"] = [[0, 5, 0.25], [chosen.index("you"), len(chosen), 0.0]]
    pairs = PairDataset.from_rows([row], tok)
    assert pieces(pairs) == [(" hello ", 1.0), ("you", 0.0), ("<|end|>", 1.0)]


TEXT = st.lists(st.sampled_from(["hello", *"the aé🙂\n"]), min_size=1, max_size=8).map("".join)


@given(TEXT, TEXT, st.data())
def test_every_token_of_a_text_has_the_weight_of_its_characters(tok, slow, prompt, chosen, data):
    n = len(chosen)
    cuts = sorted(data.draw(st.sets(st.integers(0, n), max_size=4)))
    spans = [[a, b, (i + 2.0)] for i, (a, b) in enumerate(zip(cuts[::2], cuts[1::2], strict=False))]
    row = {"prompt": prompt, "chosen": chosen, "rejected": "zz", "chosen_weights": spans}
    made = data.draw(st.sampled_from([tok, slow]))
    pairs = PairDataset.from_rows([row], made, boundary="separate", on_useless="keep")
    ids = pairs.chosen_ids[0].tolist()
    weights = pairs.chosen_weights[0] if pairs.weights else [1.0] * len(ids)
    # By the definition, in bytes.
    of_byte = [
        next((i for i, (a, b, _) in enumerate(spans) if a <= k < b), None)
        for k, c in enumerate(chosen)
        for _ in c.encode()
    ]
    at = 0
    for one, weight in zip(ids[:-1], weights, strict=False):
        size = len(tok.decode([one]).encode()) if one >= 256 else 1
        touched = [i for i in of_byte[at : at + size] if i is not None]
        assert weight == (spans[touched[0]][2] if touched else 1.0)
        at += size
    assert at == len(of_byte)


def messages(**weights):
    return {
        "prompt": [say("user", "Why?", weights=[[0, 1, 9.0]])],
        "chosen": [
            say("assistant", "one 🙂 two", **weights),
            say("user", "so?"),
            say("assistant", "three", weights=[[0, 2, 0.0], [2, 5, 2.0]]),
        ],
        "rejected": [say("assistant", "no")],
    }


def test_messages_weigh_their_own_contents(tok):
    pairs = PairDataset.from_rows([messages(weights=[[4, 5, 0.5]])], tok)
    assert pieces(pairs) == [
        ("one ", 1.0),
        ("🙂", 0.5),
        (" two<|end|>\n<|turn|>user\nso?<|end|>\n<|turn|>assistant\n", 1.0),
        ("th", 0.0),
        ("ree", 2.0),
        ("<|end|>\n", 1.0),
    ]
    plain = PairDataset.from_rows([messages()], tok, ignore_columns=())
    assert plain.chosen_ids == pairs.chosen_ids  # the template never sees them


def test_spans_and_turns_multiply(tok):
    pairs = PairDataset.from_rows([messages(weights=[[4, 5, 0.5]])], tok, train_on="assistant")
    assert [weight for _, weight in pieces(pairs)] == [1.0, 0.5, 1.0, 0.0, 2.0, 1.0]
    assert pieces(pairs)[2][0] == " two<|end|>\n"


def test_one_answer_is_weighed_by_the_field_of_its_side(tok):
    row = {"prompt": [say("user", "Why?")], "chosen": "yes it is", "rejected": "no"}
    row["chosen_weights"] = [[4, 6, 0.0]]
    pairs = PairDataset.from_rows([row], tok)
    assert pieces(pairs) == [("yes ", 1.0), ("it", 0.0), (" is<|end|>\n", 1.0)]
    listed = {
        **row,
        "chosen": [say("assistant", "yes it is")],
        "rejected": [say("assistant", "no")],
    }
    assert both(PairDataset.from_rows([listed], tok)) == both(pairs)


def test_white_space_that_a_template_takes_away_moves_no_span(trimming):
    row = {"prompt": [say("user", "Why?")], "rejected": [say("assistant", "no")]}
    row["chosen"] = [say("assistant", " \n yes it", weights=[[0, 5, 0.0]])]
    assert pieces(PairDataset.from_rows([row], trimming)) == [("ye", 0.0), ("s it<|end|>\n", 1.0)]


def test_a_template_that_rewrites_a_weighed_content_is_a_bad_row(tmp_path):
    template = TEMPLATE.replace("m.content", "(m.content | length) | string + m.content")
    tok = tokenizer(tmp_path / "model", template=template)
    row = {"prompt": [say("user", "Q?")], "rejected": [say("assistant", "no")]}
    row["chosen"] = [say("assistant", "yes it", weights=[[0, 3, 0.0]])]
    with pytest.raises(DataError, match="found one that changes those with weights") as caught:
        PairDataset.from_rows([row], tok)
    assert caught.value.reason == "bad_weights"
    row["chosen"][0]["weights"] = []
    assert PairDataset.from_rows([row], tok).weights == {}


TEXTS = {"prompt": "Why?", "chosen": " yes", "rejected": " no"}
CHAT = {"prompt": [say("user", "Q?")], "rejected": [say("assistant", "no")]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (IDS[2] | {"chosen_weights": [1, 1]}, "expected 1 weights, one an id, found 2"),
        (IDS[2] | {"chosen_weights": ["1"]}, "weight 1: expected a weight, found a string"),
        (IDS[2] | {"chosen_weights": [float("nan")]}, "weight 1: expected a finite weight"),
        (IDS[2] | {"chosen_weights": [1e39]}, "weight 1: expected a finite weight"),
        (IDS[2] | {"chosen_weights": 1.0}, "expected a list of weights, one an id, found a number"),
        (IDS[2] | {"rejected_weights": [[0, 1, 1], [1, 2, 1]]}, "weight 1: .*found a list"),
        (
            TEXTS | {"chosen_weights": [1, 1, 1]},
            "span 1: expected .start, end, weight., found a nu",
        ),
        (TEXTS | {"chosen_weights": [[0, 1]]}, "span 1: .*found a list of 2"),
        (TEXTS | {"chosen_weights": [[0, 5, 1]]}, "0 <= start < end <= 4, .*found 0 and 5"),
        (TEXTS | {"chosen_weights": [[2, 2, 1]]}, "found 2 and 2"),
        (TEXTS | {"chosen_weights": [[-1, 2, 1]]}, "whole numbers from 0 on"),
        (TEXTS | {"chosen_weights": [[0.5, 2, 1]]}, "whole numbers from 0 on"),
        (TEXTS | {"chosen_weights": [[0, 2, 1], [1, 3, 1]]}, "overlap, found 0..2 and 1..3"),
        (TEXTS | {"chosen_weights": [[0, 2, float("inf")]]}, "finite weight, found inf"),
        (TEXTS | {"rejected_weights": "0 2"}, "expected a list of .start, end, weight."),
        (
            CHAT | {"chosen": [say("assistant", "🙂", weights=[[0, 2, 0]])]},
            "end <= 1, .*found 0 and 2",
        ),
        (
            CHAT
            | {
                "chosen": [say("assistant", "a", weights=[[0, 1, 0]])],
                "chosen_weights": [[0, 1, 0]],
            },
            "expected weights in one place",
        ),
        (
            CHAT
            | {
                "chosen": [say("assistant", "a"), say("user", "b"), say("assistant", "c")],
                "chosen_weights": [[0, 1, 0]],
            },
            "expected one turn that these weigh, found several",
        ),
    ],
)
def test_what_are_no_weights_is_a_bad_row(tok, row, message):
    with pytest.raises(DataError, match=message) as caught:
        PairDataset.from_rows([row], tok)
    assert caught.value.reason == "bad_weights"
    good = {"prompt": "Why?", "chosen": " a", "rejected": " b"}
    pairs = PairDataset.from_rows([row, good], tok, on_bad="skip")
    assert pairs.report.dropped == {"bad_weights": 1}
    assert len(pairs) == 1


@pytest.fixture
def weighed(tok):
    rows = [
        *IDS,
        TEXTS | {"chosen_weights": [[0, 2, 0.5]]},
        messages(weights=[[4, 5, 0.5]]),
        TEXTS,
    ]
    return rows, PairDataset.from_rows(rows, tok)


def test_every_source_gives_the_same(tok, weighed, tmp_path):
    pa = pytest.importorskip("pyarrow")
    rows, pairs = weighed
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert both(PairDataset.from_files(path, tok)) == both(pairs)
    assert both(PairDataset.from_files(path, tok, threads=1)) == both(pairs)
    for part in (IDS[:1], [TEXTS | {"chosen_weights": [[0, 2, 0.5]]}, TEXTS], [messages()]):
        table = pa.Table.from_pylist(json.loads(json.dumps(part)))
        assert both(PairDataset.from_arrow(table, tok)) == both(PairDataset.from_rows(part, tok))


def test_weights_begin_late_in_a_file(tok, tmp_path):
    rows = [TEXTS] * 700 + [TEXTS | {"chosen_weights": [[0, 2, 0.5]]}] + [TEXTS] * 300
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = PairDataset.from_files(path, tok)
    assert len(pairs.chosen_weights.values) == len(pairs.chosen_ids.values)
    assert np.flatnonzero([(w != 1).any() for w in pairs.chosen_weights]).tolist() == [700]
    assert (pairs.rejected_weights.values == 1).all()


def test_saved_mapped_and_sent_to_workers(weighed, tmp_path):
    pytest.importorskip("pyarrow")
    _, pairs = weighed
    pairs.save(tmp_path / "saved")
    loaded = PairDataset.load(tmp_path / "saved")
    assert both(loaded) == both(pairs)
    assert list(loaded.columns) == []
    sent = pickle.loads(pickle.dumps(loaded))
    assert both(sent) == both(pairs)
    assert len(pickle.dumps(loaded)) < 4000 + len(pickle.dumps(loaded.report))
    part = loaded.select([1, 0])
    assert (
        both(pickle.loads(pickle.dumps(part)))["chosen_weights"] == OF_IDS["chosen_weights"][1::-1]
    )
    assert pairs.to_arrow().column("chosen_weights").to_pylist() == both(pairs)["chosen_weights"]


def test_a_saved_weight_that_is_not_finite_is_damage(tmp_path):
    pytest.importorskip("pyarrow")
    pairs = PairDataset.from_ids([[1]], [[2, 3]], [[4]], chosen_weights=[[0.5, 1]])
    pairs.chosen_weights.values[0] = np.nan
    pairs.save(tmp_path / "saved")
    with pytest.raises(DataError, match="`chosen_weights`: expected finite weights"):
        PairDataset.load(tmp_path / "saved")


@pytest.mark.parametrize("late", [False, True])
def test_the_cache_and_prepare_carry_them(tok, weighed, tmp_path, monkeypatch, late):
    pytest.importorskip("pyarrow")
    from functools import partial

    from dpo_ext import prepare
    from dpo_ext.data import encode

    monkeypatch.setattr(encode, "parts", partial(encode.parts, pairs=2))
    rows = [TEXTS] * 5000 + weighed[0] + [TEXTS] * 3000 if late else weighed[0]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = PairDataset.from_files(path, tok)
    for _ in range(2):
        mapped = PairDataset.from_files(path, tok, cache_dir=tmp_path / "c")
        assert both(mapped) == both(whole)
    prepare(path, tok, tmp_path / "prepared")
    whole.save(tmp_path / "saved")
    (ours,), (theirs,) = ((tmp_path / name).glob("*.arrow") for name in ("prepared", "saved"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_parts_of_a_data_set_keep_them(weighed):
    _, pairs = weighed
    every = both(pairs)
    for part, index in [
        (pairs[1:4], [1, 2, 3]),
        (pairs.select([4, 0]), [4, 0]),
        (pairs[::2], [0, 2, 4]),
    ]:
        assert both(part) == {name: [lists[i] for i in index] for name, lists in every.items()}
    plain = PairDataset.from_ids(
        [[1]], [[2]], [[3]], vocab_size=pairs.vocab_size, pad_id=pairs.pad_id
    )
    joined = plain.concat(pairs, plain)
    assert both(joined) == {name: [[1.0], *lists, [1.0]] for name, lists in every.items()}
    assert plain.concat(plain).weights == {}
    known = pairs.with_ref_logps(np.zeros((len(pairs), 2)))
    assert both(known) == every


def test_a_row_of_encode_table_goes_in_again(tok, weighed):
    pa = pytest.importorskip("pyarrow")
    from dpo_ext.arrow import encode_table

    table = pa.Table.from_pylist([TEXTS | {"chosen_weights": [[0, 2, 0.5]]}, TEXTS])
    encoded = encode_table(table, tok)
    assert encoded.column("chosen_weights").type == pa.list_(pa.float32())
    again = PairDataset.from_arrow(encoded, tok)
    assert both(again) == both(PairDataset.from_arrow(table, tok))
    # Each batch of a pipeline has the same columns.
    batches = [encode_table(batch, tok) for batch in table.to_batches(max_chunksize=1)]
    assert batches[0].schema.names == batches[1].schema.names
    assert batches[1].column("chosen_weights").to_pylist() == [[1.0] * 5]
    turned = encode_table(pa.Table.from_pylist([TEXTS]), tok, train_on="last")
    assert "rejected_weights" in turned.column_names
    assert "chosen_weights" not in encode_table(pa.Table.from_pylist([TEXTS]), tok).column_names
    chats = pa.Table.from_pylist([messages(), messages(weights=None)])
    assert "chosen_weights" in encode_table(chats, tok).column_names


V = 270
LAYOUTS = ["padded", "packed", "shared"]


def logps(batch):
    """Log-probs by logits that each token has from its own place in its sequence alone."""
    rng = np.random.default_rng(0)
    of_token = torch.from_numpy(rng.normal(size=(V, V)))
    logits = of_token[torch.from_numpy(np.asarray(batch.input_ids).astype(np.int64))]
    return sequence_logps(logits, batch.table)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_are_the_same_in_every_layout(weighed, layout):
    _, pairs = weighed
    (batch,) = pairs.plan(layout=layout, pairs_per_batch=len(pairs), shuffle=False)
    found = logps(batch)
    for i in range(len(pairs)):
        for k, side in enumerate(("chosen", "rejected")):
            ids = [*pairs.prompt_ids[i], *getattr(pairs, f"{side}_ids")[i]]
            n = len(pairs.prompt_ids[i])
            alone = np.random.default_rng(0).normal(size=(V, V))
            logs = alone - np.log(np.exp(alone).sum(1, keepdims=True))
            each = [logs[ids[t - 1], ids[t]] for t in range(n, len(ids))]
            want = np.dot(each, getattr(pairs, f"{side}_weights")[i])
            assert abs(float(found[i, k]) - want) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_of_weight_0_are_not_read(weighed, layout):
    _, pairs = weighed
    (batch,) = pairs.plan(layout=layout, pairs_per_batch=len(pairs), shuffle=False)
    table = batch.table.without_zero_weights()
    assert (table.targets == -100).tolist() == (batch.table.weights == 0).tolist()
    assert (table.targets == -100).any()


def test_a_loader_with_workers_brings_them(weighed):
    _, pairs = weighed
    plan = pairs.plan(layout="packed", pairs_per_batch=2)
    plain = [batch.table.weights.tolist() for batch in plan]
    found = [batch.table.weights.tolist() for batch in PairLoader(plan, device="cpu", prefetch=2)]
    assert found == plain
    sent = pickle.loads(pickle.dumps(plan))
    assert [batch.table.weights.tolist() for batch in sent] == plain


@pytest.mark.slow
def test_workers_of_torch_bring_them_from_a_mapped_file(weighed, tmp_path):
    pytest.importorskip("pyarrow")
    weighed[1].save(tmp_path / "saved")
    plan = PairDataset.load(tmp_path / "saved").plan(layout="shared", pairs_per_batch=2)
    loader = torch.utils.data.DataLoader(
        plan, batch_size=1, collate_fn=first, num_workers=2, multiprocessing_context="spawn"
    )
    found = [np.asarray(batch.weights).tolist() for batch in loader]
    assert found == [batch.weights.tolist() for batch in plan]


def first(batches):
    return batches[0]


def test_weights_of_a_plan_and_of_its_data_multiply(weighed):
    _, pairs = weighed
    given = {
        side: [np.arange(len(ids)) + 1.0 for ids in getattr(pairs, f"{side}_ids")]
        for side in ("chosen", "rejected")
    }
    options = {"layout": "packed", "pairs_per_batch": len(pairs), "shuffle": False}
    (batch,) = pairs.plan(**options, token_weights=given)
    want = [
        weight * factor
        for i in range(len(pairs))
        for side in ("chosen", "rejected")
        for weight, factor in zip(getattr(pairs, f"{side}_weights")[i], given[side][i], strict=True)
    ]
    assert batch.weights.tolist() == want
    huge = {side: [np.full(len(one), 3e38) for one in lists] for side, lists in given.items()}
    with pytest.raises(DataError, match="expected finite products"):
        pairs.plan(**options, token_weights=huge)


def test_the_digest_knows_the_weights_of_the_data():
    ids = ([[1]], [[2, 3]], [[4]])
    weights = [None, [[0.5, 1]], [[1, 0.5]]]
    digests = {
        PairDataset.from_ids(*ids, chosen_weights=one)
        .plan(layout="padded", pairs_per_batch=1)
        .digest
        for one in weights
    }
    assert len(digests) == 3


def test_a_state_of_other_weights_is_refused():
    ids = ([[1]], [[2, 3]], [[4]])
    plans = [
        PairDataset.from_ids(*ids, chosen_weights=one).plan(layout="padded", pairs_per_batch=1)
        for one in (None, [[0.5, 1]])
    ]
    with pytest.raises(DataError, match="other batches"):
        plans[0].load_state_dict(plans[1].state_dict())


def test_they_are_no_extra_column(tok):
    with pytest.raises(ValueError, match="'chosen_weights', which is a field of its own"):
        PairDataset.from_rows(IDS, tok, columns=("chosen_weights",))


NFC = [
    ("x\n\u212b\ny", (2, 3)), ("10 \u212b7", (3, 4)), ("20 \u212a.", (3, 4)), ("5 \u2126.", (2, 3)),
    ("A e\u0301 b", (2, 4)), ("\u1112\u1161\u11ab x", (0, 3)), ("a \uf900 b", (2, 3)),
    ("a \u0958 b", (2, 3)), ("-\U0002f800-", (1, 2)),
]  # fmt: skip


@pytest.mark.skipif(not SHARED.is_dir(), reason=NO_SHARED)
@pytest.mark.parametrize(("text", "span"), NFC, ids=[ascii(text) for text, _ in NFC])
@pytest.mark.parametrize("name", ["qwen2.5", "neox20b"])
def test_characters_that_nfc_rewrites_have_their_own_weight(name, text, span):
    transformers = pytest.importorskip("transformers")
    folder = SHARED / "tokenizers" / name
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tok = Tokenizer.from_pretrained(folder)
    row = {"prompt": "Q:", "chosen": text, "rejected": "no", "chosen_weights": [[*span, 0.0]]}
    pairs = PairDataset.from_rows([row], tok, boundary="separate")
    offsets = theirs(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    wanted = [0.0 if a < span[1] and b > span[0] else 1.0 for a, b in offsets]
    assert pairs.chosen_weights[0][: len(wanted)].tolist() == wanted


@pytest.mark.parametrize(("text", "span"), NFC, ids=[ascii(text) for text, _ in NFC])
def test_bytes_of_characters_that_nfc_rewrites_have_their_weight(text, span, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizer(tmp_path / "nfc", normalizer={"type": "NFC"})
    row = {"prompt": "Q:", "chosen": text, "rejected": "no", "chosen_weights": [[*span, 0.0]]}
    pairs = PairDataset.from_rows([row], tok, boundary="separate")
    found = tokenizers.Tokenizer.from_str(tok.to_json()).encode(text, add_special_tokens=False)
    wanted = [0.0 if a < span[1] and b > span[0] else 1.0 for a, b in found.offsets]
    assert 0.0 in wanted
    assert pairs.chosen_ids[0][: len(wanted)].tolist() == found.ids
    assert pairs.chosen_weights[0][: len(wanted)].tolist() == wanted
