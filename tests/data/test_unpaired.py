"""Single completions with labels: rows in, ids out."""

import json

import byte_tokenizer
import numpy as np
import pytest
import tiny

from dpo_ext import DataError, PairDataset, UnpairedDataset

USER = {"role": "user", "content": "sky?"}
BLUE = {"role": "assistant", "content": "blue"}
CHAT = {"prompt": [USER], "completion": [BLUE]}
TEXT = {"prompt": "say hello", "completion": " hello the", "label": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return byte_tokenizer.tokenizer(tmp_path_factory.mktemp("bytes"))


def rows(n=12):
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in tiny.rows(n)
        for side in ("chosen", "rejected")
    ]


def same(a, b):
    return (
        a.prompt_ids == b.prompt_ids
        and a.completion_ids == b.completion_ids
        and np.array_equal(a.labels, b.labels)
    )


@pytest.mark.parametrize("boundary", ["joint", "separate", "trl"])
@pytest.mark.parametrize("is_chat", [False, True], ids=["text", "chat"])
def test_a_completion_has_the_ids_it_has_in_a_pair(tokenizer, is_chat, boundary):
    pairs = tiny.rows(12)
    if is_chat:
        pairs = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                **{
                    side: [{"role": "assistant", "content": row[side]}]
                    for side in row
                    if side != "prompt"
                },
            }
            for row in pairs
        ]
    both = PairDataset.from_rows(pairs, tokenizer, boundary=boundary)
    for side, ids in (("chosen", both.chosen_ids), ("rejected", both.rejected_ids)):
        single = [{"prompt": r["prompt"], "completion": r[side], "label": 1} for r in pairs]
        examples = UnpairedDataset.from_rows(single, tokenizer, boundary=boundary)
        assert examples.prompt_ids == both.prompt_ids
        assert examples.completion_ids == ids


def test_every_way_in_gives_the_same(tokenizer, tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist(rows())
    lines = tiny.write_jsonl(tmp_path / "rows.jsonl.gz", rows())
    parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows()))
    expected = UnpairedDataset.from_rows(rows(), tokenizer)
    assert len(expected) == expected.report.kept == 24
    assert same(UnpairedDataset.from_arrow(table, tokenizer), expected)
    for name in (lines, tmp_path / "rows.parquet", tmp_path / "rows.json"):
        assert same(UnpairedDataset.from_files(name, tokenizer, threads=2), expected)
    parquet.write_table(expected.to_arrow(), tmp_path / "ids.parquet")
    again = UnpairedDataset.from_files(tmp_path / "ids.parquet", tokenizer)
    assert same(again, expected)
    assert again.report.layouts == {"ids": 24}


SHAPES = {
    "text as a turn": {"prompt": [USER], "completion": "blue"},
    "ms-swift": {"messages": [USER, BLUE]},
    "LLaMA-Factory": {
        "conversations": [
            {"from": "human", "value": "sky?"},
            {"from": "gpt", "value": "blue"},
        ]
    },
    "alpaca": {"instruction": "sky?", "input": "", "output": "blue"},
    "query and response": {"query": "sky?", "response": "blue", "history": []},
    "whole conversations": {"prompt": "sky?", "completion": [USER, BLUE]},
    "JSON text": {"messages": json.dumps([USER, BLUE])},
}


@pytest.mark.parametrize("name", SHAPES)
def test_rows_as_others_write_them_are_found(tokenizer, name):
    expected = UnpairedDataset.from_rows([{**CHAT, "label": True}], tokenizer)
    found = UnpairedDataset.from_rows(
        [{**SHAPES[name], "kto_tag": True}], tokenizer, label_key="kto_tag"
    )
    assert same(found, expected)
    assert found.report.unread == ()


def test_a_completion_of_several_turns_stays_whole(tokenizer):
    row = {"prompt": [USER], "completion": [BLUE, USER, BLUE], "label": False}
    examples = UnpairedDataset.from_rows([row], tokenizer)
    alone = UnpairedDataset.from_rows([{**CHAT, "label": False}], tokenizer)
    assert examples.prompt_ids == alone.prompt_ids
    text = byte_tokenizer.decode(examples[0]["completion_ids"])
    assert text.count("blue") == 2


def test_a_system_turn_comes_first(tokenizer):
    system = {"role": "system", "content": "be brief"}
    one = {"messages": [USER, BLUE], "system": "be brief", "label": True}
    other = {"prompt": [system, USER], "completion": [BLUE], "label": True}
    assert same(
        UnpairedDataset.from_rows([one], tokenizer), UnpairedDataset.from_rows([other], tokenizer)
    )


LABELS = {
    True: [True, 1, 1.0, "true", "True", " 1", "desirable", "chosen", np.True_, np.int64(1)],
    False: [False, 0, 0.0, "false", "FALSE", "0", "undesirable", "rejected", np.False_, np.int8(0)],
}


@pytest.mark.parametrize("meant", [True, False])
def test_labels_are_read_as_others_write_them(tokenizer, meant):
    given = [{**TEXT, "label": label} for label in LABELS[meant]]
    examples = UnpairedDataset.from_rows(given, tokenizer)
    assert examples.labels.dtype == bool
    assert examples.labels.tolist() == [meant] * len(given)
    assert examples[0]["label"] is meant


@pytest.mark.parametrize("label", [2, -1, 0.5, float("nan"), "good", "", None, [True], {"is": 1}])
def test_another_label_is_a_bad_row(tokenizer, label):
    given = [TEXT, {**TEXT, "label": label}]
    with pytest.raises(DataError, match="row 2, `label`: expected a label: a boolean, 0 or 1") as e:
        UnpairedDataset.from_rows(given, tokenizer)
    assert (e.value.line, e.value.field, e.value.reason) == (2, "label", "wrong_type")
    report = UnpairedDataset.from_rows(given, tokenizer, on_bad="skip").report
    assert (report.read, report.kept, report.dropped) == (2, 1, {"wrong_type": 1})


@pytest.mark.parametrize(
    ("row", "field", "hint"),
    [
        ({"prompt": "a", "completion": "b"}, "label", "label_key"),
        ({"prompt": "a", "label": 1}, "completion", "completion_key"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "label": 1}, "completion", "from_pairs"),
        ({"completion": "b", "label": 1}, "prompt", "on_bad"),
        ({"completion": [USER, BLUE], "label": 1}, "prompt", "on_bad"),
        ({"messages": [USER], "label": 1}, "messages", "on_bad"),
        ({"messages": [BLUE], "label": 1}, "messages", "on_bad"),
        ({"prompt_ids": [1], "label": 1}, "completion_ids", "on_bad"),
        ({"prompt_ids": [1], "completion_ids": [], "label": 1}, "completion_ids", "on_bad"),
        ({"prompt": "a", "completion": " ", "label": 1}, "completion", "on_bad"),
        ({"prompt": "a", "completion": 3, "label": 1}, "completion", "on_bad"),
    ],
)
def test_a_bad_row_names_its_field(tokenizer, row, field, hint):
    with pytest.raises(DataError) as error:
        UnpairedDataset.from_rows([TEXT, row], tokenizer)
    assert (error.value.line, error.value.field) == (2, field)
    said = "\n".join([str(error.value), *getattr(error.value, "__notes__", ())])
    assert hint in said


def test_no_example_at_all_names_the_keys(tokenizer):
    bad = [{"question": "a", "answer": "b", "good": 1}] * 3
    with pytest.raises(DataError, match="no row gives an example") as error:
        UnpairedDataset.from_rows(bad, tokenizer, on_bad="skip")
    assert error.value.reason == "no_pairs"
    assert "`label_key` give other names" in str(error.value)


def test_blank_completions_are_kept_where_asked(tokenizer):
    blank = {"prompt": "a", "completion": "", "label": False}
    report = UnpairedDataset.from_rows([TEXT, blank], tokenizer, on_bad="skip").report
    assert report.dropped == {"empty_completion": 1}
    kept = UnpairedDataset.from_rows([TEXT, blank], tokenizer, on_useless="keep")
    assert kept.completion_ids[1].tolist() == [byte_tokenizer.END]


def test_names_of_fields_are_the_callers(tokenizer):
    given = {"q": "say hello", "a": " hello the", "ok": 1, "note": "x"}
    keys = {"prompt_key": "q", "completion_key": "a", "label_key": "ok"}
    examples = UnpairedDataset.from_rows([given], tokenizer, **keys, columns=["note"])
    assert same(examples, UnpairedDataset.from_rows([TEXT], tokenizer))
    assert examples.columns["note"].tolist() == ["x"]
    assert examples[0]["note"] == "x"


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"chosen_key": "a"}, TypeError, "unknown option `chosen_key`"),
        ({"label_keys": "a"}, TypeError, "did you mean `label_key`"),
        ({"label_key": 3}, TypeError, "`label_key` must be a name, found int"),
        ({"label_key": "completion"}, ValueError, "`completion_key` and `label_key` must differ"),
        ({"columns": "label"}, TypeError, "`columns` must be a sequence of names"),
        ({"columns": ["label"]}, ValueError, "every column once"),
        ({"layout_of_rows": "implicit"}, ValueError, "is one of pairs"),
        ({"truncation": "keep"}, ValueError, "unknown `truncation`"),
    ],
)
def test_wrong_options_are_refused(tokenizer, options, kind, said):
    with pytest.raises(kind, match=said):
        UnpairedDataset.from_rows([TEXT], tokenizer, **options)


def test_pairs_do_not_take_a_label_key(tokenizer):
    with pytest.raises(TypeError, match="unknown option `label_key`"):
        PairDataset.from_rows([TEXT], tokenizer, label_key="label")


def test_whole_completions_are_kept_and_prompts_without_room_are_not(tokenizer):
    given = [
        {"prompt": "a" * 30, "completion": "b" * 50, "label": 1},
        {"prompt": "c" * 70, "completion": "d", "label": 0},
    ]
    options = {"max_length": 40, "on_bad": "skip"}
    examples = UnpairedDataset.from_rows(given, tokenizer, **options)
    pairs = PairDataset.from_rows(
        [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "e"} for r in given],
        tokenizer,
        **options,
    )
    assert len(examples) == len(pairs) == 1
    assert examples.report.dropped == {"no_completion_tokens": 1}
    assert examples.report.warned == {"truncated": 1, "eos_cut": 1}
    whole = UnpairedDataset.from_rows(given[:1], tokenizer, max_length=None)
    assert examples.completion_ids == whole.completion_ids
    kept = len(pairs.chosen_ids[0])
    assert examples.completion_ids[0][:kept].tolist() == pairs.chosen_ids[0].tolist()
    assert examples.tokens.tolist() == [40]


@pytest.mark.parametrize("truncation", ["keep_end", "keep_completions"])
def test_other_cuts_are_those_of_pairs(tokenizer, truncation):
    given = [
        {"prompt": f"say {i} " + "hello " * i, "completion": " the" * (20 - i), "label": i % 2}
        for i in range(20)
    ]
    options = {"max_length": 24, "truncation": truncation}
    examples = UnpairedDataset.from_rows(given, tokenizer, **options)
    for i, row in enumerate(given):
        pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " x"}
        pairs = PairDataset.from_rows([pair], tokenizer, **options)
        if len(pairs.chosen_ids[0]) >= len(pairs.rejected_ids[0]):
            assert examples[i]["prompt_ids"].tolist() == pairs.prompt_ids[0].tolist()
            assert examples[i]["completion_ids"].tolist() == pairs.chosen_ids[0].tolist()
    assert (examples.tokens <= 24).all()


def test_long_rows_are_dropped_or_refused(tokenizer):
    given = [TEXT, {"prompt": "a" * 30, "completion": "b" * 50, "label": 1}]
    dropped = UnpairedDataset.from_rows(given, tokenizer, max_length=40, truncation="drop")
    assert dropped.report.dropped == {"too_long": 1}
    with pytest.raises(DataError, match="row 2, `completion`: expected at most 40 tokens"):
        UnpairedDataset.from_rows(given, tokenizer, max_length=40, truncation="error")


def test_what_is_known_of_an_example_goes_where_it_goes(tokenizer):
    examples = UnpairedDataset.from_rows(
        [{**row, "n": i} for i, row in enumerate(rows())], tokenizer, columns=["n"]
    )
    examples = examples.with_ref_logps(np.arange(24.0) - 24)

    def check(part, index):
        index = np.asarray(index)
        assert part.labels.tolist() == examples.labels[index].tolist()
        assert part.ref_logps.tolist() == (index - 24.0).tolist()
        assert part.columns["n"].tolist() == index.tolist()
        assert part.completion_ids.tolist() == [examples.completion_ids[i].tolist() for i in index]

    check(examples.select([3, 1, 20]), [3, 1, 20])
    check(examples[4:9], range(4, 9))
    check(examples[::5], range(0, 24, 5))
    good = examples.filter(lambda one: one["label"])
    check(good, range(0, 24, 2))
    train, held_out = examples.split(0.25)
    assert not {i.tobytes() for i in train.prompt_ids} & {i.tobytes() for i in held_out.prompt_ids}
    both = train.concat(held_out)
    check(both, [*train.columns["n"], *held_out.columns["n"]])
    assert isinstance(both, UnpairedDataset)
    assert both.max_length == examples.max_length
    assert "24 examples, 12 of them desirable" in examples._repr_html_()


def test_unlike_examples_are_no_data_set(tokenizer):
    examples = UnpairedDataset.from_rows(rows(), tokenizer)
    with pytest.raises(ValueError, match="`max_length` differs, 1024 and 99"):
        examples.concat(UnpairedDataset.from_rows(rows(), tokenizer, max_length=99))
    pairs = PairDataset.from_rows(tiny.rows(3), tokenizer)
    with pytest.raises(TypeError, match="expected UnpairedDataset, found PairDataset"):
        examples.concat(pairs)
    with pytest.raises(TypeError, match="expected PairDataset, found UnpairedDataset"):
        pairs.concat(examples)


def test_both_sides_of_pairs_are_examples(monkeypatch):
    monkeypatch.setattr("dpo_ext.data.unpaired.TRLS_PART", 2)
    pairs = PairDataset.from_ids([[1], [2], [3]], [[4], [5], [6]], [[7], [8], [9]])
    pairs = pairs.with_ref_logps([[-1, -2], [-3, -4], [-5, -6]])
    examples = UnpairedDataset.from_pairs(pairs)
    assert examples.prompt_ids.tolist() == [[1], [2], [1], [2], [3], [3]]
    assert examples.completion_ids.tolist() == [[4], [5], [7], [8], [6], [9]]
    assert examples.labels.tolist() == [True, True, False, False, True, False]
    assert examples.ref_logps.tolist() == [-1, -3, -2, -4, -5, -6]
    assert examples.rows.tolist() == [0, 1, 0, 1, 2, 2]
    assert examples.report.read == examples.report.kept == 6


def test_sides_of_pairs_are_cut_in_batches_where_asked():
    pairs = PairDataset.from_ids([[1], [2] * 3], [[3] * 4] * 2, [[4] * 2] * 2)
    examples = UnpairedDataset.from_pairs(pairs, max_length=4)
    assert examples.tokens.tolist() == [4, 4, 3, 4]
    with pytest.raises(DataError, match="example 1: expected a completion with a token"):
        UnpairedDataset.from_pairs(pairs, max_length=3)
    with pytest.raises(ValueError, match="`max_length` must be at least 1 or None, found 0"):
        UnpairedDataset.from_pairs(pairs, max_length=0)


def test_pairs_whose_tokens_have_weights_are_refused():
    pairs = PairDataset.from_ids([[1]], [[3, 4]], [[5]], chosen_weights=[[1, 0.5]])
    with pytest.raises(ValueError, match="single completions have no weights of tokens"):
        UnpairedDataset.from_pairs(pairs)


def test_completions_without_any_prompt_are_read_where_asked(tokenizer):
    row = {"completion": "hello the", "label": True}
    examples = UnpairedDataset.from_rows([row] * 2, tokenizer, layout_of_rows="completions")
    assert examples.prompt_ids.tolist() == [[], []]
    batch = examples.plan(layout="padded", examples_per_batch=2)[0]
    assert batch.seq_offsets[-1] == 2 * (len(examples.completion_ids[0]) - 1)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        (([[1]], [[2]], [2]), DataError, "example 0, `labels`: expected a boolean, 0 or 1"),
        (([[1]], [[2]], ["true"]), DataError, "example 0, `labels`"),
        (([[1]], [[2]], [True, False]), ValueError, "`labels` must have the shape"),
        (([[1]], [[-2]], [1]), DataError, "-2"),
        (([[1]], [[]], [1]), DataError, "example 0: expected a completion with a token"),
        (([[]], [[1]], [1]), DataError, "example 0: expected a completion with a token"),
        (
            ([[1], [1, 1, 1]], [[1], [1]], [1, 1], 3),
            DataError,
            "example 1: .*the prompt has 3 ids",
        ),
    ],
)
def test_wrong_ids_are_refused(given, kind, said):
    *lists, max_length = given if len(given) == 4 else (*given, None)
    with pytest.raises(kind, match=said):
        UnpairedDataset.from_ids(*lists, max_length=max_length)


def test_reference_log_probs_are_checked():
    examples = UnpairedDataset.from_ids([[1], [2]], [[3], [4]], [1, 0])
    with pytest.raises(ValueError, match=r"`values` must have the shape \(2,\), found \(2, 2\)"):
        examples.with_ref_logps(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="`values` must be finite, found nan at example 1"):
        examples.with_ref_logps([0.0, np.nan])
    with pytest.raises(ValueError, match="must both be given"):
        examples.with_ref_logps([0.0, 0.0], kl=[0.0, 0.0])
    with pytest.raises(ValueError, match="`kl_completions` must be 2 whole numbers"):
        examples.with_ref_logps([0.0, 0.0], kl=[0.0, 0.0], kl_completions=[0, 2])
