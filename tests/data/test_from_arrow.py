"""Arrow in: every table gives what its rows as dicts give, and no buffer is trusted."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from byte_tokenizer import tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_ext import DataError, LimitExceeded, Limits, PairDataset

pa = pytest.importorskip("pyarrow")

TEXT = [
    {"prompt": "hello ", "chosen": f"the {i}", "rejected": "a" * (i % 5 + 1)} for i in range(40)
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"hi {i}"}],
        "chosen": [{"role": "assistant", "content": "é" * (i + 1)}],
        "rejected": [{"role": "assistant", "content": "no"}, {"role": "user", "content": "🙂"}],
    }
    for i in range(5)
]
IDS = [
    {"prompt_ids": [1, 2, i], "chosen_ids": [3], "rejected_ids": [4, 5], "x": "ignored"}
    for i in range(6)
]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


def outcome(make):
    """What a call gives or raises, as plain values; paths and lines too."""
    try:
        pairs = make()
    except DataError as error:
        return ("raised", type(error), error.reason, error.line, error.field, error.path)
    report = pairs.report.to_dict()
    report.pop("bytes")
    for example in report["first"].values():
        example.pop("message")
    return (
        pairs.prompt_ids.tolist(),
        pairs.chosen_ids.tolist(),
        pairs.rejected_ids.tolist(),
        None if pairs.ref_logps is None else pairs.ref_logps.tolist(),
        {name: values.tolist() for name, values in pairs.columns.items()},
        pairs.rows.tolist(),
        report,
    )


def same(tok, table, rows=None, **options):
    rows = table.to_pylist(maps_as_pydicts="strict") if rows is None else rows
    for on_bad in ("skip", "error"):
        got = outcome(lambda m=on_bad: PairDataset.from_arrow(table, tok, on_bad=m, **options))
        want = outcome(lambda m=on_bad: PairDataset.from_rows(rows, tok, on_bad=m, **options))
        assert got == want
    return got


@pytest.mark.parametrize("rows", [TEXT, CHAT, IDS], ids=["text", "chat", "ids"])
def test_a_table_gives_what_its_rows_give(tok, rows):
    table = pa.Table.from_pylist(rows)
    kept = same(tok, table)
    assert len(kept[0]) == len(rows)
    for form in (
        table.to_batches()[0],
        table.slice(2, 3),
        pa.concat_tables([table.slice(0, 2), table.slice(2)]),
        table.slice(1).to_batches(max_chunksize=2)[0],
    ):
        same(tok, form)
    reader = pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=2))
    got = PairDataset.from_arrow(reader, tok)
    assert got.chosen_ids.tolist() == kept[1]


def test_from_rows_takes_a_table(tok):
    table = pa.Table.from_pylist(TEXT)
    assert (
        PairDataset.from_rows(table, tok).chosen_ids == PairDataset.from_rows(TEXT, tok).chosen_ids
    )


def retyped(table, **types):
    """The table with columns cast."""
    for name, kind in types.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, table.column(name).cast(kind))
    return table


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary", "run_end"])
def test_every_kind_of_string(tok, kind):
    table = pa.Table.from_pylist(TEXT)
    for name in ("prompt", "chosen", "rejected"):
        column = table.column(name).combine_chunks()
        if kind == "dictionary":
            column = column.dictionary_encode()
        elif kind == "run_end":
            column = pa.compute.run_end_encode(column)
        else:
            column = column.cast(getattr(pa, kind)())
        table = table.set_column(table.schema.get_field_index(name), name, column)
    want = outcome(lambda: PairDataset.from_rows(TEXT[3:17], tok))
    assert outcome(lambda: PairDataset.from_arrow(table.slice(3, 14), tok)) == want


@pytest.mark.parametrize("inner", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
@pytest.mark.parametrize("outer", [pa.list_, pa.large_list, pa.list_view, pa.large_list_view])
def test_every_kind_of_list_of_messages(tok, outer, inner):
    message = pa.struct([("role", inner), ("content", inner)])
    schema = pa.schema([(name, outer(message)) for name in CHAT[0]])
    table = pa.Table.from_pylist(CHAT, schema=schema)
    want = outcome(lambda: PairDataset.from_rows(CHAT[1:4], tok))
    assert outcome(lambda: PairDataset.from_arrow(table.slice(1, 3), tok)) == want


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()], ids=str
)  # fmt: skip
def test_every_width_of_ids(tok, kind):
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    for of in (pa.list_(kind), pa.large_list(kind)):
        table = pa.Table.from_pylist(IDS, schema=pa.schema([(name, of) for name in names]))
        assert len(same(tok, table.slice(1, 4))[0]) == 4
    fixed = pa.schema([("prompt_ids", pa.list_(kind, 3)), ("chosen_ids", pa.list_(kind, 1)), ("rejected_ids", pa.list_(kind, 2))])  # fmt: skip
    assert len(same(tok, pa.Table.from_pylist(IDS, schema=fixed).slice(2, 3))[0]) == 3


def test_nulls_ref_logps_tools_and_kwargs(tok, tmp_path):
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ style }}{{ n }}"
        "{% for m in messages %}{{ m.role }}{{ m.content }}"
        "{% if m.tool_calls is defined %}[{{ m.tool_calls }}]{% endif %}{% endfor %}"
    )
    tok = tokenizer(tmp_path / "m", template=template)
    tool = {"type": "function", "function": {"name": "f", "strict": None}}
    rows = [
        {**CHAT[0], "tools": None, "chat_template_kwargs": None},
        {**CHAT[1], "tools": [tool], "chat_template_kwargs": {"style": "brief", "n": 1}},
        {**CHAT[2], "tools": [tool, tool], "chat_template_kwargs": {"style": None, "n": 2}},
    ]
    rows[0]["chosen"][0] = {**rows[0]["chosen"][0], "tool_calls": ["x"]}
    table = pa.Table.from_pylist(rows)
    assert len(same(tok, table, keep_nulls=True)[0]) == 3
    strings = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    by_string = pa.Table.from_pylist(strings)
    assert len(same(tok, by_string, keep_nulls=True)[0]) == 3
    ref = [{**r, "ref_chosen_logps": -i / 3, "ref_rejected_logps": -1} for i, r in enumerate(TEXT)]
    assert same(tok, pa.Table.from_pylist(ref))[3] is not None
    for null in TEXT[0]:
        same(tok, pa.Table.from_pylist([TEXT[0], {**TEXT[1], null: None}, TEXT[2]]))
    same(tok, pa.Table.from_pylist([{**r, "prompt": None} for r in TEXT]))


def test_maps_are_dicts_and_json_is_read(tok, tmp_path):
    tok = tokenizer(
        tmp_path / "m", template="{{ a }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    rows = [{**row, "chat_template_kwargs": {"a": f"A{i}"}} for i, row in enumerate(CHAT)]
    want = outcome(lambda: PairDataset.from_rows(rows, tok))
    table = pa.Table.from_pylist(CHAT)
    maps = pa.array(
        [list(r["chat_template_kwargs"].items()) for r in rows], pa.map_(pa.string(), pa.string())
    )
    assert outcome(lambda: PairDataset.from_arrow(table.append_column("chat_template_kwargs", maps), tok)) == want  # fmt: skip
    texts = pa.array([json.dumps(r["chat_template_kwargs"]) for r in rows])
    as_json = pa.ExtensionArray.from_storage(pa.json_(), texts)
    assert outcome(lambda: PairDataset.from_arrow(table.append_column("chat_template_kwargs", as_json), tok)) == want  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        pa.array([b"x"] * 3),
        pa.array([1, 2, 3]),
        pa.array([1.5, 2.5, 3.5], pa.float16()),
        pa.array([True, False, True]),
        pa.array([0, 1, 2], pa.timestamp("us")),
        pa.array([0, 1, 2], pa.date32()),
        pa.array([1, 2, 3], pa.decimal128(5)),
        pa.array([["a"], [], None]),
        pa.array([{"a": 1}] * 3),
        pa.nulls(3),
        pa.array([b"abcd"] * 3, pa.binary(4)),
    ],
    ids=lambda v: str(v.type),
)
@pytest.mark.parametrize("name", ["chosen", "prompt", "tools", "ref_chosen_logps", "prompt_ids"])
def test_unsupported_types_name_the_column(tok, values, name):
    table = pa.Table.from_pylist(TEXT[:3])
    at = table.schema.get_field_index(name)
    table = table.append_column(name, values) if at < 0 else table.set_column(at, name, values)
    if name == "ref_chosen_logps":
        table = table.append_column("ref_rejected_logps", pa.array([1.0] * 3))
    got = same(tok, table)
    if name == "chosen" and not pa.types.is_list(values.type):
        assert got[:5] == ("raised", DataError, "wrong_type", 1, "chosen")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 300) | st.text(max_size=4) | st.floats(),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=4,
)
text_rows = st.fixed_dictionaries(
    {"chosen": st.none() | st.text(max_size=9), "rejected": st.none() | st.text(max_size=9)},
    optional={"prompt": st.none() | st.text(max_size=9), "n": st.none() | st.integers(-3, 3)},
)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=6)},
    optional={
        "tool_calls": st.lists(st.fixed_dictionaries({"name": st.text(max_size=3)}), max_size=2),
        "name": st.text(max_size=2),
    },
)
messages = st.lists(message, max_size=3)
chat_rows = st.fixed_dictionaries(
    {"chosen": messages, "rejected": messages},
    optional={
        "prompt": messages,
        "tools": st.lists(st.fixed_dictionaries({"type": st.text(max_size=2)}), max_size=2),
        "chat_template_kwargs": st.fixed_dictionaries({}, optional={"z": st.integers(0, 3)}),
    },
)
ids = st.lists(st.integers(-1, 300), max_size=4)
id_rows = st.fixed_dictionaries(
    {"prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids | st.none()}
)
logps = st.none() | st.floats(-9, 0) | st.just(float("nan"))
with_ref = st.tuples(
    text_rows, st.fixed_dictionaries({"ref_chosen_logps": logps, "ref_rejected_logps": logps})
).map(lambda two: two[0] | two[1])


@pytest.mark.parametrize(
    "rows", [text_rows, chat_rows, id_rows, with_ref], ids=["text", "chat", "ids", "ref"]
)
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.differing_executors])
def test_any_table_gives_what_its_rows_give(tok, rows, data):
    values = data.draw(st.lists(rows, min_size=1, max_size=5))
    names = sorted({name for row in values for name in row})
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in values])
    start = data.draw(st.integers(0, len(values)))
    same(tok, table.slice(start), keep_nulls=True)


def test_a_column_twice_is_refused(tok):
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["chosen", "rejected", "chosen"])
    for on_bad in ("error", "skip"):
        with pytest.raises(DataError, match="`chosen`: expected one column of this name") as caught:
            PairDataset.from_arrow(table, tok, on_bad=on_bad)
        assert (caught.value.reason, caught.value.field) == ("duplicate_key", "chosen")


@pytest.mark.parametrize("source", [None, 3, "rows.parquet", [TEXT[0]], {"chosen": ["a"]}], ids=str)
def test_what_is_no_table_is_a_type_error(tok, source):
    with pytest.raises(TypeError, match="__arrow_c_stream__"):
        PairDataset.from_arrow(source, tok)


def test_a_missing_pyarrow_says_what_to_install(tok, monkeypatch):
    table = pa.Table.from_pylist(TEXT)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r'hint: pip install "dpo_ext\[arrow\]"'):
        PairDataset.from_arrow(table, tok)


# -- buffers that lie -------------------------------------------------------------------------


def table_with(column, name="chosen"):
    """A record batch of good columns but one."""
    n = len(column)
    arrays = {"prompt": pa.array(["the"] * n), "chosen": pa.array(["a"] * n)}
    arrays |= {"rejected": pa.array(["b"] * n), name: column}
    return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


def spoiled(array, name, offsets):
    """A record batch with offsets that are overwritten after pyarrow has looked at them."""
    memory = np.frombuffer(array.buffers()[1], np.int32).copy()
    buffers = [None, pa.py_buffer(memory), *array.buffers()[2:3]]
    children = [array.values] if pa.types.is_list(array.type) else None
    buffers = buffers[:2] if children else buffers
    batch = table_with(
        pa.Array.from_buffers(array.type, len(array), buffers, children=children), name
    )
    memory[: len(offsets)] = offsets
    return batch


SIX = pa.array(["ab", "cd", "ef", "gh", "ij", "kl"])
LISTS = pa.array([["a"], ["b", "c"], [], ["d"], ["e"]])
LIES = {
    "falling offsets": (SIX, "chosen", [0, 2, 10, 4, 8, 10, 12]),
    "negative offsets": (SIX, "chosen", [0, 2, -4, 4, 8, 10, 12]),
    "offsets behind the text": (SIX, "chosen", [0, 2, 4, 1 << 30, 8, 10, 12]),
    "a last offset behind the text": (SIX, "chosen", [0, 2, 4, 6, 8, 10, 1 << 30]),
    "falling list offsets": (LISTS, "tools", [0, 1, 5, 3, 4, 5]),
    "negative list offsets": (LISTS, "tools", [0, 1, -1, 3, 4, 5]),
    "list offsets behind the items": (LISTS, "tools", [0, 1, 900, 3, 4, 5]),
    "a last list offset behind the items": (LISTS, "tools", [0, 1, 3, 3, 4, 900]),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_buffers_that_contradict_themselves_are_a_bad_input(tok, lie, on_bad):
    batch = spoiled(*lie)
    with pytest.raises(DataError) as caught:
        PairDataset.from_arrow(batch, tok, on_bad=on_bad, threads=1)
    assert caught.value.reason == "bad_input"


def test_text_that_is_not_utf8_is_a_bad_row(tok):
    for text in (b"ab\xffdefghi", b"ab\xed\xa0\x80ghi\x80"):
        offsets = pa.py_buffer(np.array([0, 1, len(text)], np.int32))
        batch = table_with(
            pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(text)])
        )
        with pytest.raises(DataError) as caught:
            PairDataset.from_arrow(batch, tok)
        error = caught.value
        assert (error.reason, error.line, error.field) == ("bad_utf8", 2, "chosen")
        report = PairDataset.from_arrow(batch, tok, on_bad="skip").report
        assert (report.kept, report.dropped) == (1, {"bad_utf8": 1})


def test_lists_of_nothing_are_bounded(tok):
    """Lists of nulls have no buffer that would bound them."""
    kind = pa.null()
    for size in (1 << 20, 1 << 20, 1000):
        kind = pa.list_(kind, size)
    column = pa.Array.from_buffers(
        kind, 1, [None], children=[
            pa.Array.from_buffers(kind.value_type, 1000, [None], children=[
                pa.Array.from_buffers(kind.value_type.value_type, 1000 << 20, [None], children=[pa.NullArray.from_buffers(pa.null(), 1000 << 40, [None])])
            ])
        ],
    )  # fmt: skip
    with pytest.raises(LimitExceeded) as caught:
        PairDataset.from_arrow(table_with(column, "tools"), tok)
    assert caught.value.field == "max_row_tokens"


def test_limits_of_depth_and_keys(tok):
    deep = pa.Table.from_pylist([{**CHAT[0], "tools": [{"a": {"b": {"c": 1}}}]}])
    wide = pa.Table.from_pylist([{**CHAT[0], "tools": [{f"k{i}": i for i in range(9)}]}])
    for table, limits in ((deep, Limits(max_depth=3)), (wide, Limits(max_keys=4))):
        got = same(tok, table, limits=limits)
        assert got[:2] == ("raised", LimitExceeded)
        same(tok, table)


# -- how it runs ------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_threads_or_chunks(tok):
    rows = [{**TEXT[i % 40], "chosen": "the " * (i % 7), "margin": i} for i in range(20_000)]
    table = pa.Table.from_pylist(rows)
    want = outcome(lambda: PairDataset.from_rows(rows, tok, on_bad="skip", columns=["margin"]))
    for threads in (1, 2, 8):
        for chunked in (table, pa.concat_tables([table.slice(0, 777), table.slice(777)])):
            got = outcome(
                lambda t=chunked, n=threads: PairDataset.from_arrow(
                    t, tok, on_bad="skip", columns=["margin"], threads=n
                )
            )
            assert got == want


def test_progress_is_called_and_its_error_stops_the_call(tok):
    table = pa.Table.from_pylist(
        [{"prompt": "hello ", "chosen": "hello " * 300 + str(i), "rejected": "b"} for i in range(4000)]
    )  # fmt: skip
    table = pa.concat_tables([table] * 40)
    seen = []
    PairDataset.from_arrow(
        table.slice(0, 40_000), tok, threads=1, progress=lambda *done: seen.append(done)
    )
    assert seen
    assert seen == sorted(seen)

    def stop(done, rows):
        raise RuntimeError(rows)

    with pytest.raises(RuntimeError):
        PairDataset.from_arrow(table, tok, threads=1, progress=stop)


@pytest.mark.slow
def test_ctrl_c_stops_the_call(tmp_path):
    tokenizer(tmp_path / "m")
    code = (
        "import sys, time, pyarrow as pa, dpo_ext\n"
        "t = dpo_ext.Tokenizer.from_pretrained(sys.argv[1])\n"
        "row = {'prompt': 'hello ', 'chosen': 'abcdefgh ' * 2000, 'rejected': 'b'}\n"
        "table = pa.concat_tables([pa.Table.from_pylist([row] * 1000)] * 100)\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    dpo_ext.PairDataset.from_arrow(table, t, max_length=None)\n"
        "except KeyboardInterrupt:\n"
        "    print(time.time(), flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "m"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with child:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        sent = time.time()
        os.kill(child.pid, signal.SIGINT)
        assert float(child.stdout.readline()) - sent < 1
