"""`encode_table` in the pipelines of others: the same ids as from rows, whatever carries them."""

import functools
import json
import pickle

import pytest
import tiny

from dpo_ext import DataError, PairDataset, Tokenizer
from dpo_ext.arrow import REPORT_KEY, encode_table, report_of

pa = pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

IDS = ["prompt_ids", "chosen_ids", "rejected_ids"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(tiny.tokenizer())


@pytest.fixture(scope="module")
def rows():
    return tiny.rows(300)


def lists(table):
    return [table[name].to_pylist() for name in IDS]


def expected(rows, tokenizer, **options):
    pairs = PairDataset.from_rows(rows, tokenizer, **options)
    return [getattr(pairs, name).tolist() for name in IDS]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "chunked"])
def test_a_table_gives_the_ids_of_its_rows(rows, tokenizer, kind):
    table = pa.Table.from_pylist(rows)
    if kind == "dictionary":
        table = pa.table({n: table[n].dictionary_encode() for n in table.column_names})
    elif kind == "chunked":
        table = pa.concat_tables([table.slice(i, 7) for i in range(0, 300, 7)])
    else:
        table = table.cast(pa.schema([(n, getattr(pa, kind)()) for n in table.column_names]))
    out = encode_table(table, tokenizer, max_length=60)
    assert isinstance(out, pa.Table)
    out.validate(full=True)
    assert out.column_names == IDS
    assert {field.type for field in out.schema} == {pa.list_(pa.int32())}
    assert lists(out) == expected(rows, tokenizer, max_length=60)


def test_slices_begin_where_they_begin(rows, tokenizer):
    table = pa.Table.from_pylist(rows)
    assert lists(encode_table(table.slice(100, 50), tokenizer)) == expected(
        rows[100:150], tokenizer
    )


def test_a_record_batch_gives_a_record_batch(rows, tokenizer):
    batch = pa.RecordBatch.from_pylist(rows)
    out = encode_table(batch, tokenizer)
    assert isinstance(out, pa.RecordBatch)
    assert lists(out) == expected(rows, tokenizer)


@pytest.mark.parametrize("protocol", ["__arrow_c_stream__", "__arrow_c_array__"])
def test_anything_with_the_capsule_protocol_gives_a_table(rows, tokenizer, protocol):
    inner = pa.Table.from_pylist(rows) if "stream" in protocol else pa.RecordBatch.from_pylist(rows)
    method = staticmethod(lambda requested_schema=None: getattr(inner, protocol)(requested_schema))
    foreign = type("Foreign", (), {protocol: method})()
    out = encode_table(foreign, tokenizer)
    assert isinstance(out, pa.Table)
    assert lists(out) == expected(rows, tokenizer)


def test_messages_come_as_lists_of_structs(tokenizer):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"number {i}?"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no " * i + "!"}],
        }
        for i in range(20)
    ]
    assert lists(encode_table(pa.Table.from_pylist(rows), tokenizer)) == expected(rows, tokenizer)


def test_reference_log_probs_and_extra_columns_pass(rows, tokenizer):
    extended = [
        {**row, "ref_chosen_logps": -1.5 * i, "ref_rejected_logps": -2.0, "weight": i / 4, "id": i}
        for i, row in enumerate(rows)
    ]
    out = encode_table(pa.Table.from_pylist(extended), tokenizer, columns=["weight", "id"])
    assert out.column_names == [*IDS, "ref_chosen_logps", "ref_rejected_logps", "weight", "id"]
    for name in out.column_names[3:]:
        assert out[name].to_pylist() == [row[name] for row in extended]


def test_an_empty_table_gives_one(rows, tokenizer):
    out = encode_table(pa.Table.from_pylist(rows).slice(0, 0), tokenizer)
    assert (out.num_rows, out.column_names) == (0, IDS)
    assert report_of(out).read == 0


def test_offsets_grow_to_64_bits_where_32_do_not_reach(rows, tokenizer, monkeypatch):
    monkeypatch.setattr("dpo_ext.store.columns.MAX_INT32", 50)
    out = encode_table(pa.Table.from_pylist(rows), tokenizer)
    assert {field.type for field in out.schema} == {pa.large_list(pa.int32())}
    assert lists(out) == expected(rows, tokenizer)


def test_the_report_travels_with_the_schema(rows, tokenizer):
    bad = [dict(row) for row in rows]
    for i in (3, 150, 151):
        bad[i]["chosen"] = " "
    table = pa.Table.from_pylist(bad)
    parts = [encode_table(table.slice(i, 100), tokenizer, on_bad="skip") for i in (0, 100, 200)]
    assert [part.num_rows for part in parts] == [99, 98, 100]
    values = json.loads(parts[1].schema.metadata[REPORT_KEY])
    assert values["dropped"] == {"empty_completion": 2}
    merged = report_of(*parts)
    assert (merged.read, merged.kept, merged.dropped) == (300, 297, {"empty_completion": 3})
    assert merged.first["empty_completion"].line == 4
    assert report_of(parts[0].schema) == report_of(parts[0].to_batches()[0])
    with pytest.raises(ValueError, match="no"):
        report_of(table)
    with pytest.raises(DataError) as caught:
        encode_table(table, tokenizer)
    assert (caught.value.line, caught.value.reason) == (4, "empty_completion")


# Hugging Face

datasets = pytest.importorskip("datasets")


@pytest.fixture
def hf(rows, tmp_path):
    """A data set on disk, so that its map has a cache."""
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "hf"))
    return datasets.load_from_disk(str(tmp_path / "hf"))


@pytest.mark.slow
@pytest.mark.parametrize("num_proc", [None, 2])
def test_map_gives_the_ids_and_its_cache_is_hit(hf, rows, tokenizer, num_proc, monkeypatch):
    def run(tok):
        return hf.with_format("arrow").map(
            lambda table: encode_table(table, tok, max_length=60, threads=1),
            batched=True,
            batch_size=64,
            num_proc=num_proc,
        )

    first = run(tokenizer)
    assert first.column_names == IDS
    assert [first.with_format(None)[name][:] for name in IDS] == expected(
        rows, tokenizer, max_length=60
    )
    files = [file["filename"] for file in first.cache_files]
    before = [pa.OSFile(file).size() for file in files]
    # Made again from the same files, by another object: the fingerprint is the same.
    again = run(Tokenizer.from_pretrained(tiny.tokenizer()))
    assert [file["filename"] for file in again.cache_files] == files
    assert again._fingerprint == first._fingerprint
    assert [pa.OSFile(file).size() for file in files] == before
    other = run(Tokenizer({**tokenizer._state, "ids": [None, 5, None]}))
    assert other._fingerprint != first._fingerprint


def test_a_streamed_data_set_is_mapped(hf, rows, tokenizer):
    stream = hf.to_iterable_dataset().with_format("arrow")
    out = stream.map(
        functools.partial(encode_table, tokenizer=tokenizer, max_length=60),
        batched=True,
        batch_size=64,
    )
    got = list(out.with_format(None))
    assert [[row[name] for row in got] for name in IDS] == expected(rows, tokenizer, max_length=60)


def test_the_tokenizer_has_one_hash(tokenizer):
    hasher = datasets.fingerprint.Hasher
    again = Tokenizer.from_pretrained(tiny.tokenizer())
    assert hasher.hash(tokenizer) == hasher.hash(again)
    assert hasher.hash(tokenizer) == hasher.hash(pickle.loads(pickle.dumps(tokenizer)))
