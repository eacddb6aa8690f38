"""JSONL and gzip: what is accepted, what is refused and with which reason, place and message."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from byte_tokenizer import decode, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from dpo_ext import DataError, DpoExtError, LimitExceeded, Limits, PairDataset

GOOD = {"prompt": "hello ", "chosen": "the a", "rejected": "the b"}
LINE = json.dumps(GOOD).encode()


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture
def load(tok, tmp_path):
    """Load bytes as a file, with the options of `from_files`."""

    def load(data, name="rows.jsonl", **options):
        path = tmp_path / name
        path.write_bytes(data)
        return PairDataset.from_files(path, tok, **options)

    return load


def with_value(value, key="extra"):
    """A good row, with a raw value in a field that nobody reads."""
    return LINE[:-1] + b', "' + key.encode() + b'": ' + value + b"}"


# JSON values that must be refused, wherever they stand.
# fmt: off
BAD_VALUES = [
    b"", b"nul", b"nulll", b"True", b"NULL", b"undefined", b"-NaN", b"nan", b"inf", b"-Infinit",
    b"+1", b"01", b"-01", b"1.", b".5", b"-", b"--1", b"1e", b"1e+", b"1.e5", b"1e1.5", b"0x10", b"1_000",
    b"1,", b"2.e3", b"-.1", b"1 2", b"1a", b"0e", b"0E+", b"9.e+", b"1eE2", b"-2.", b"-foo", b"- 1", b"00",
    b"'a'", b'"a', b'"', b'"\\', b'"\\"', b'"\\x41"', b'"\\u00"', b'"\\u00G0"', b'"\\uD800"',
    b'"\\uDC00"', b'"\\uD800\\n"', b'"\\uD800\\uD800"', b'"\\uDC00\\uD800"', b'"\\ud83d\\u0041"',
    b'"\\u 1234"', b'"\\U0041"', b'"\\a"', b'"\\0"', b'"\\\xc3\xa9"', b'"\t"', b'"\x00"', b'"\x1f"', b'"\x01a"',
    b'"a\rb"', b'"\x08"', b'"a" "b"', b'"a"b', b'"\\u123"', b'"\\uqqqq"',
    b"[", b"[1", b"[1,", b"[1,]", b"[,1]", b"[1,,2]", b"[1 2]", b"[1}", b"]", b"[]]", b"[1:2]", b"[\"a\"",
    b"[\"\": 1]", b"[,]", b"[a]", b"[tru]", b"[-]", b"[1]]", b"[[1]", b"[*]", b"[x", b"[3[4]]", b"[[]",
    b"{", b"{}}", b'{"a"}', b'{"a":}', b'{"a":1,}', b'{"a" 1}', b"{a:1}", b"{'a':1}", b'{"a":1 "b":2}',
    b"{1:1}", b'{"a":1,,"b":2}', b'{,"a":1}', b'{"a"::1}', b'{"a":1]', b'{"a": 1', b'{"a', b'{"a":"a', b"{null:null}",
    b'{"a":1}{', b'{"a","b"}', b'{"a":"b",', b'{"\\uD800":1}', b'{"a\tb":1}', b"{[]:1}", b'{"a":/*c*/1}', b'{"a":1}//',
    b"// c", b"/* c */ 1", b"#", b"1;", b"@", b"\\u0031", b"\x0c1", b"\xc2\xa01", b"\xe2\x81\xa01", b"\x0b",
]
# JSON values that must be accepted in a field that nobody reads.
GOOD_VALUES = [
    b"null", b"true", b"false", b"0", b"-0", b"1", b"-1", b"10", b"1.5", b"-1.5e-10", b"1E5", b"1e+5", b"0.1",
    b"0e1", b"0.0e-0", b"1e400", b"-1e400", b"1e-400", b"1" + b"0" * 300, b'""', b'"a"', b'"\\""', b'"\\\\"', b'"\\/"',
    b'"/"', b'"\\b\\f\\n\\r\\t"', b'"\\u0041"', b'"\\u0000"', b'"\\ud83d\\ude00"', b'"\\uFFFF"', b'"\\uabCD"',
    b'"\x7f"', b'"\xe2\x80\xa8"', b'"\xc2\x85"', b'"\xf0\x9f\x99\x82"', b'"\xef\xbb\xbf"', b'"\xef\xbf\xbf"', b"[]", b"[ ]",
    b"[1,2]", b"[[],[]]", b"[null]", b"{}", b"{ }", b'{"a":1}', b'{"":0}', b'{"a":{"a":{"a":[]}}}', b" 1 ", b"\t1\t",
    b"NaN", b"Infinity", b"-Infinity", b'[NaN, {"a": -Infinity}]',
    b'{"a":1,"b":{"a":1}}', b'[{"a":1},{"a":2}]', b"[1,\t2]", b'{"a" : [ 1 , 2 ] }', b'"\\u2028"', b'{"\\u0000":1}',
]
SYNTAX = [with_value(value) for value in BAD_VALUES] + [
    b"{", b"}", b"[", b'{"prompt"', LINE[:-1], LINE[:-2], LINE + b"}", LINE + b"x", LINE + b" {}", LINE + LINE,
    LINE + b",", b"," + LINE, LINE[1:], b"nul", b"'x'", b"<html>", b"prompt,chosen,rejected", b"---", b"\x00",
    b'{"chosen": "a" "rejected": "b"}', b"{\x00}", b"\x0c" + LINE, LINE + b"\x00", LINE + b"\x1a",
]
NOT_AN_OBJECT = [b"1", b'"a"', b"null", b"true", b"[]", b"[1]", b"[{}]", b" -0.5e1 ", b"[" + LINE + b"]", b"false"]
# fmt: on
NOT_UTF8 = [
    (b"\xff", 0),
    (b"\xfe\xff\x00{", 0),
    (b"\xff\xfe{\x00", 0),
    (with_value(b'"\x80"'), None),
    (with_value(b'"\xc3"'), None),
    (with_value(b'"\xc0\x80"'), None),
    (with_value(b'"\xe0\x80\xaf"'), None),
    (with_value(b'"\xed\xa0\x80"'), None),
    (with_value(b'"\xed\xb0\x80"'), None),
    (with_value(b'"\xf4\x90\x80\x80"'), None),
    (with_value(b'"\xf8\x88\x80\x80\x80"'), None),
    (with_value(b'"\xe2\x82"'), None),
    (b"\xa0" + LINE, 0),
    (LINE + b"\xff", len(LINE)),
    (LINE + b"\xef\xbb\xbf", len(LINE)),
]  # fmt: skip
DUPLICATE = [
    (b'{"prompt":"a","prompt":"a","chosen":"b","rejected":"c"}', "prompt"),
    (b'{"chosen":"a","chosen":"b","rejected":"c"}', "chosen"),
    (b'{"chosen":"a","rejected":"c","x":1,"x":1}', "x"),
    (b'{"chosen":"a","rejected":"c","x":1,"\\u0078":1}', "x"),
    (b'{"":1,"":2,"chosen":"a","rejected":"c"}', ""),
    (with_value(b'{"k":1,"k":2}'), "k"),
    (with_value(b'[[{"a":[{"z":1,"y":2,"z":3}]}]]'), "z"),
    (with_value(b"{" + b",".join(b'"k%d":0' % i for i in range(40)) + b',"k7":1}'), "k7"),
    (b'{"x":1,"x":1}', "x"),
]


def fails(load, line, reason, **options):
    """The line fails alone, and behind a good one with its number; skip drops it alone."""
    with pytest.raises(DataError) as caught:
        load(LINE + b"\r\n" + line + b"\n" + LINE, **options)
    error = caught.value
    assert (error.reason, error.line) == (reason, 2)
    assert str(error).startswith(f"{error.path}, line 2")
    assert len(str(error)) < len(str(error.path)) + 400
    kept = load(LINE + b"\n" + line + b"\n" + LINE, on_bad="skip", **options)
    report = kept.report
    assert (report.read, report.kept, report.dropped) == (3, 2, {reason: 1})
    assert report.first[reason].line == 2
    assert kept.rows.tolist() == [0, 2]
    return error


@pytest.mark.parametrize("line", SYNTAX, ids=repr)
def test_bad_syntax_is_bad_json(load, line):
    error = fails(load, line, "bad_json")
    assert error.field is None
    assert len(LINE) + 2 <= error.byte <= len(LINE) + 2 + len(line)


@pytest.mark.parametrize("value", GOOD_VALUES, ids=repr)
def test_any_json_may_stand_in_a_field_that_nobody_reads(load, value):
    pairs = load(with_value(value))
    assert len(pairs) == 1
    json.loads(with_value(value))


@pytest.mark.parametrize("line", NOT_AN_OBJECT, ids=repr)
def test_other_json_is_not_an_object(load, line):
    fails(load, line, "not_an_object")


@pytest.mark.parametrize(("line", "byte"), NOT_UTF8, ids=repr)
def test_other_encodings_are_bad_utf8(load, line, byte):
    error = fails(load, line, "bad_utf8")
    if byte is not None:
        assert error.byte == len(LINE) + 2 + byte


@pytest.mark.parametrize(("line", "key"), DUPLICATE, ids=repr)
def test_a_key_twice_is_refused_at_any_depth(load, line, key):
    assert fails(load, line, "duplicate_key").field == (key or None)


def row(**fields):
    return {k: v for k, v in {**GOOD, **fields}.items() if v is not ...}


def chat(content="the a", role="assistant"):
    return [{"role": role, "content": content}]


CHAT = {"prompt": chat("hello", "user"), "chosen": chat(), "rejected": chat("the b")}
IDS = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
ROWS = [
    ({}, "missing_field", "chosen"),
    (row(chosen=...), "missing_field", "chosen"),
    (row(rejected=...), "missing_field", "rejected"),
    ({**GOOD, "ref_chosen_logps": -1.0}, "missing_field", "ref_rejected_logps"),
    ({**GOOD, "ref_rejected_logps": -1.0}, "missing_field", "ref_chosen_logps"),
    ({"prompt_ids": [1], "chosen_ids": [1]}, "missing_field", "rejected_ids"),
    ({"chosen_ids": [1], "rejected_ids": [2]}, "missing_field", "prompt_ids"),
    *((row(chosen=v), "wrong_type", "chosen") for v in (None, 1, 1.5, True, {"a": 1})),
    *((row(rejected=v), "wrong_type", "rejected") for v in (None, 1, False, {}, [], chat())),
    *((row(prompt=v), "wrong_type", "prompt") for v in (None, 0)),
    *((row(prompt=v), "bad_messages", "prompt") for v in ({}, ["a"])),
    ({**CHAT, "chat_template_kwargs": [1]}, "wrong_type", "chat_template_kwargs"),
    ({**CHAT, "chat_template_kwargs": "x"}, "wrong_type", "chat_template_kwargs"),
    ({**GOOD, "ref_chosen_logps": "x", "ref_rejected_logps": -1}, "wrong_type", "ref_chosen_logps"),
    ({**GOOD, "ref_chosen_logps": -1, "ref_rejected_logps": []}, "wrong_type", "ref_rejected_logps"),
    ({**IDS, "chosen_ids": "3"}, "wrong_type", "chosen_ids"),
    ({**IDS, "prompt_ids": None}, "wrong_type", "prompt_ids"),
    ({**CHAT, "prompt": []}, "bad_messages", "prompt"),
    ({**CHAT, "chosen": []}, "bad_messages", "chosen"),
    ({**CHAT, "chosen": ["a"]}, "bad_messages", "chosen"),
    ({**CHAT, "chosen": [None]}, "bad_messages", "chosen"),
    ({**CHAT, "chosen": [{"content": "a"}]}, "bad_messages", "chosen"),
    ({**CHAT, "chosen": [{"role": "assistant"}]}, "bad_messages", "chosen"),
    ({**CHAT, "chosen": [{"role": 1, "content": "a"}]}, "bad_messages", "chosen"),
    ({**CHAT, "chosen": [{"role": None, "content": "a"}]}, "bad_messages", "chosen"),
    ({**CHAT, "chosen": [{"role": "assistant", "content": None}]}, "bad_messages", "chosen"),
    ({**CHAT, "chosen": [{"role": "assistant", "content": 5}]}, "bad_messages", "chosen"),
    ({**CHAT, "chosen": [{"role": "assistant", "content": {"a": 1}}]}, "bad_messages", "chosen"),
    ({**CHAT, "chosen": [{"role": "assistant", "content": [1]}]}, "bad_messages", "chosen"),
    ({**CHAT, "tools": {"a": 1}}, "bad_messages", "tools"),
    ({**CHAT, "tools": [1]}, "bad_messages", "tools"),
    ({**CHAT, "tools": "[1"}, "bad_messages", "tools"),
    ({**CHAT, "tools": "{}"}, "bad_messages", "tools"),
    ({**CHAT, "tools": '[{"a":1,"a":2}]'}, "bad_messages", "tools"),
    *(
        ({**CHAT, "chat_template_kwargs": {name: "x"}}, "bad_messages", "chat_template_kwargs")
        for name in ("messages", "bos_token", "eos_token", "add_generation_prompt", "tools", "raise_exception")
    ),
    ({**IDS, "chosen_ids": [-1]}, "bad_ids", "chosen_ids"),
    ({**IDS, "chosen_ids": [270]}, "bad_ids", "chosen_ids"),
    ({**IDS, "prompt_ids": [2**40]}, "bad_ids", "prompt_ids"),
    ({**IDS, "rejected_ids": [1.0]}, "bad_ids", "rejected_ids"),
    ({**IDS, "rejected_ids": ["1"]}, "bad_ids", "rejected_ids"),
    ({**IDS, "rejected_ids": [None]}, "bad_ids", "rejected_ids"),
    ({**IDS, "rejected_ids": [[1]]}, "bad_ids", "rejected_ids"),
    ({**IDS, "rejected_ids": [10**40]}, "bad_ids", "rejected_ids"),
    ({**IDS, "chosen_ids": []}, "empty_completion", "chosen_ids"),
    *((row(chosen=v), "empty_completion", "chosen") for v in ("", " ", "\n\t", "\u3000", "<|end|>", " <|end|>")),
    (row(rejected="\u2028"), "empty_completion", "rejected"),
    ({**CHAT, "chosen": chat("")}, "empty_completion", "chosen"),
    ({**CHAT, "rejected": chat(" \n")}, "empty_completion", "rejected"),
    (row(rejected=GOOD["chosen"]), "identical_pair", "rejected"),
    (row(rejected=GOOD["chosen"] + "<|end|>"), "identical_pair", "rejected"),
    ({"chosen": "x a", "rejected": "x a"}, "identical_pair", "rejected"),
    ({**CHAT, "rejected": chat()}, "identical_pair", "rejected"),
    ({"chosen": chat(), "rejected": chat()}, "identical_pair", "rejected"),
    ({**IDS, "rejected_ids": [3]}, "identical_pair", "rejected"),
    ({"prompt_ids": [], "chosen_ids": [3], "rejected_ids": [4]}, "no_completion_tokens", "chosen"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason", "field"), ROWS, ids=lambda v: str(v)[:60])
def test_a_bad_row_has_one_reason_and_field(load, tok, fields, reason, field):
    assert fails(load, json.dumps(fields).encode(), reason).field == field
    with pytest.raises(DataError) as caught:
        PairDataset.from_rows([GOOD, fields], tok)
    error = caught.value
    assert (error.reason, error.field, error.path, error.line) == (reason, field, None, 2)


LONG = {"prompt": "hello " * 9, "chosen": "the a", "rejected": "the b c d e f g h"}
# (row, options, reason, whole message behind the place): one for each reason and site.
GOLDEN = [
    (b"\xff", {}, "byte 0: expected UTF-8, found the byte 0xff"),
    (b'{"a": 1,}', {}, "byte 8: expected a key in double quotes, found `}`"),
    (b'{"a": 1', {}, "byte 7: expected `,` or `}`, found the end of the line"),
    (b'{"a": [1', {}, "byte 8: expected `,` or `]`, found the end of the line"),
    (b'{"a" 1}', {}, "byte 5: expected `:` after the key, found `1`"),
    (b'{"a": }', {}, "byte 6: expected a value, found `}`"),
    (b'{"chosen": NaN}', {}, "byte 11, `chosen`: expected a finite number, found `NaN`"),
    (b'{"a": -NaN}', {}, "byte 7: expected a digit, found `N`"),
    (b'{"a": 01}', {}, "byte 6: expected a number without leading zeros, found `0` and a digit"),
    (b'{"a": 1.}', {}, "byte 8: expected a digit, found `}`"),
    (b'{"a": "b', {}, 'byte 8: expected `"` at the end of the string, found the end of the line'),
    (b'{"a": "\t"}', {}, "byte 7: expected an escape, found the raw control character 0x09"),
    (
        b'{"a": "\\x"}',
        {},
        'byte 7: expected one of the escapes `\\" \\\\ \\/ \\b \\f \\n \\r \\t \\u`',
    ),
    (b'{"a": "\\u12"}', {}, "byte 7: expected four hexadecimal digits after `\\u`"),
    (b'{"a": "\\ud800"}', {}, "byte 7: expected a pair of surrogates, found a lone one"),
    (b"{} {}", {}, "byte 3: expected one value on the line, found `{`"),
    (
        b"[",
        {},
        "byte 1: expected `]` at the end of the array, found the end of the file\n"
        "hint: it may have been cut off: write or fetch it again",
    ),
    (
        b"[[]]",
        {},
        "row 1, byte 1: expected an object, found a list\n"
        "hint: a row is an object; an array of rows is a file of its own",
    ),
    (b"[1]", {}, "row 1, byte 1: expected an object, found a number"),
    (b"1", {}, "expected an object, found a number"),
    (b'{"a": 1, "a": 2}', {}, "`a`: expected every key once, found it twice"),
    (b"{}", {}, "`chosen`: expected this field, found none"),
    (row(chosen=1), {}, "`chosen`: expected a string or a list of messages, found a number"),
    (row(prompt=None), {}, "`prompt`: expected a string, as in the completions, found null"),
    (row(rejected=[]), {}, "`rejected`: expected a string, as in the other side, found a list"),
    ({**CHAT, "chosen": []}, {}, "`chosen`: expected at least one message, found an empty list"),
    (
        {**CHAT, "chosen": [{"content": ""}]},
        {},
        "`chosen`: message 1: expected a `role`, found none",
    ),
    (
        {**CHAT, "tools": "["},
        {},
        "`tools`: expected JSON: expected a value, found the end of the line",
    ),
    (
        {**CHAT, "chat_template_kwargs": {"bos_token": ""}},
        {},
        "`chat_template_kwargs`: `bos_token` belongs to the template's own variables and cannot be "
        "overridden by a row",
    ),
    ({**IDS, "chosen_ids": [270]}, {}, "`chosen_ids`: expected token ids in 0..270, found 270"),
    ({**IDS, "chosen_ids": [1.5]}, {}, "`chosen_ids`: expected whole numbers, found a number"),
    (
        row(chosen="a<|turn|>"),
        {"special_tokens_in_text": "error"},
        "`chosen`: expected plain text, found the spelling of a control token",
    ),
    (row(chosen=" "), {}, "`chosen`: expected a completion, found none but white space"),
    (row(rejected="the a"), {}, "`rejected`: expected two completions, found the same one twice"),
    (LONG, {"max_length": 5}, "`chosen`: empty after truncation to 5 tokens (the prompt has 17)"),
    (
        {**LONG, "chosen": "the b c"},
        {"max_length": 20},
        "`rejected`: both sides have the same ids after truncation to 20 tokens",
    ),
    (
        LONG,
        {"max_length": 25, "truncation": "error"},
        "`rejected`: expected at most 25 tokens with the prompt, found 33",
    ),
    (
        LINE,
        {"limits": Limits(max_line_bytes=9)},
        "`max_line_bytes`: the line has more than 9 bytes",
    ),
    (
        with_value(b"[" * 70 + b"]" * 70),
        {},
        "`max_depth`: a value is nested more than 64 deep",
    ),
    (
        LINE,
        {"limits": Limits(max_row_tokens=4)},
        "`max_row_tokens`: a side has 5 tokens, more than 4",
    ),
    (LINE, {"limits": Limits(max_keys=2)}, "`max_keys`: an object has more than 2 keys"),
    (
        {**CHAT, "chosen": chat() * 3},
        {"limits": Limits(max_messages=2)},
        "`max_messages`: `chosen` has 3 messages, more than 2",
    ),
    (
        CHAT,
        {"limits": Limits(max_rendered_bytes=20)},
        "`max_rendered_bytes`: the rendered conversation has more than 20 bytes",
    ),
]


@pytest.mark.parametrize(("line", "options", "message"), GOLDEN, ids=lambda v: str(v)[:60])
def test_messages(load, line, options, message):
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    with pytest.raises(DataError) as caught:
        load(line, **options)
    assert str(caught.value) == f"{caught.value.path}, line 1, {message}".replace(
        "line 1, expected an object", "line 1: expected an object"
    )
    assert isinstance(caught.value, LimitExceeded) == (caught.value.reason == "limit")


def test_a_template_that_refuses_is_a_template_error(tmp_path):
    tok = tokenizer(tmp_path / "m", template="{{ raise_exception('only poems') }}")
    with pytest.raises(DataError) as caught:
        PairDataset.from_rows([CHAT], tok)
    assert caught.value.reason == "template_error"
    assert str(caught.value) == "row 1, `prompt`: invalid operation: only poems (line 1)"


# -- lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        LINE,
        LINE + b"\n",
        LINE + b"\r\n",
        b"\xef\xbb\xbf" + LINE,
        b"\n\n" + LINE + b"\n\n",
        b" \t\r\n" + LINE,
        LINE + b"\n   ",
        b"  " + LINE + b"  ",
    ],
    ids=repr,
)
def test_line_ends_blank_lines_and_one_bom_are_no_rows(load, data):
    pairs = load(data)
    assert (pairs.report.read, pairs.report.kept) == (1, 1)
    blank = [line for line in data.split(b"\n") if not line.strip()]
    blank = blank[:-1] if data.endswith(b"\n") else blank
    assert pairs.report.warned.get("blank_line", 0) == len(blank)


@pytest.mark.parametrize(
    ("data", "line"), [(b"\n\xef\xbb\xbf" + LINE, 2), (b"\xef\xbb\xbf" * 2 + LINE, 1)]
)
def test_a_bom_elsewhere_is_bad_utf8(load, data, line):
    with pytest.raises(DataError) as caught:
        load(data)
    assert (caught.value.reason, caught.value.line) == ("bad_utf8", line)


def test_lines_split_at_newlines_alone(load):
    text = "a\u2028b\u0085c\x0bd"
    pairs = load(
        json.dumps({**GOOD, "chosen": text}, ensure_ascii=False).replace("\x0b", "\\u000b").encode()
    )
    assert (
        decode([*pairs[0]["prompt_ids"], *pairs[0]["chosen_ids"]])
        == GOOD["prompt"] + text + "<|end|>"
    )


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.booleans(),
)
def test_text_reaches_the_tokenizer_byte_by_byte(tok, tmp_path_factory, chosen, prompt, ascii_only):
    if not chosen.strip() or chosen == "b" or "<|" in chosen + prompt:
        return
    path = tmp_path_factory.getbasetemp() / "text.jsonl"
    fields = {"prompt": prompt, "chosen": chosen, "rejected": "b"}
    path.write_text(json.dumps(fields, ensure_ascii=ascii_only), encoding="utf-8", newline="\n")
    for pairs in (
        PairDataset.from_files(path, tok, on_bad="skip"),
        PairDataset.from_rows([fields], tok, on_bad="skip"),
    ):
        for pair in pairs:
            got = decode([*pair["prompt_ids"], *pair["chosen_ids"]])
            assert got == prompt + chosen + "<|end|>"
    assert sum(pairs.report.dropped.values()) + len(pairs) == 1


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from([*GOOD, *IDS, "tools", "chat_template_kwargs", "ref_chosen_logps", "x"])


@given(st.lists(st.dictionaries(FIELDS, json_values | st.just("ab") | st.just(CHAT["chosen"]))))
def test_counts_add_up_for_any_json(tok, tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    rows = [*rows, GOOD]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8", newline="\n")
    by_file = PairDataset.from_files(path, tok, on_bad="skip")
    by_row = PairDataset.from_rows(rows, tok, on_bad="skip")
    for pairs in (by_file, by_row):
        report = pairs.report
        assert report.read == len(rows) == report.kept + sum(report.dropped.values())
        assert len(pairs) == report.kept
    assert by_file.report.dropped == by_row.report.dropped
    assert by_file.chosen_ids == by_row.chosen_ids


@given(st.binary(max_size=60))
def test_any_bytes_give_rows_or_a_data_error(tok, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    path.write_bytes(data)
    try:
        report = PairDataset.from_files(path, tok, on_bad="skip").report
    except DataError as error:
        reason = error.reason
    else:
        reason = "no_pairs"
        assert report.read == report.kept + sum(report.dropped.values())
    assert reason in ("bad_input", "no_pairs")


@given(st.data())
def test_the_scanner_accepts_what_python_accepts(tok, tmp_path_factory, data):
    # Mutations of a valid line; Python takes NaN, lone surrogates and keys twice, which are set apart.
    line = bytearray(with_value(b'{"k": [1.5, "\\u00e9\\n", null, {"z": -0}]}'))
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(line) - 1))
        line[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from(
                [
                    b"",
                    b'"',
                    b"{",
                    b"}",
                    b"[",
                    b"]",
                    b",",
                    b":",
                    b"\\",
                    b"0",
                    b"1",
                    b"-",
                    b".",
                    b"e",
                    b"u",
                    b" ",
                    b"\t",
                    b"\xff",
                ]
            )
        )
    path = tmp_path_factory.getbasetemp() / "mutant.jsonl"
    path.write_bytes(LINE + b"\n" + bytes(line))
    try:
        json.loads(bytes(line).decode())
        valid = True
    except ValueError:
        valid = False
    report = PairDataset.from_files(path, tok, on_bad="skip").report
    refused = {"bad_json", "bad_utf8"} & set(report.dropped)
    if valid:
        assert not refused or b"\\ud" in bytes(line).lower()
    elif report.read > 1:
        assert refused


# -- limits -----------------------------------------------------------------------------------


def test_a_line_over_the_limit_is_skipped_and_the_next_is_read(load):
    long = with_value(b'"' + b"x" * 3_000_000 + b'"')
    pairs = load(
        LINE + b"\n" + long + b"\n" + LINE, on_bad="skip", limits=Limits(max_line_bytes=1000)
    )
    assert pairs.report.dropped == {"limit": 1}
    assert pairs.report.first["limit"].field == "max_line_bytes"
    assert pairs.rows.tolist() == [0, 2]


@pytest.mark.parametrize("depth", [10**5, 10**6])
def test_deep_nesting_is_a_limit_and_no_signal(load, depth):
    for line in (
        with_value(b"[" * depth + b"]" * depth),
        b"[" * depth,
        with_value(b'{"a":' * depth),
    ):
        with pytest.raises(DataError) as caught:
            load(line)
        # A line that begins with a bracket is an array without an end.
        assert caught.value.reason in ("limit", "bad_json", "bad_input")


def test_the_limits_dataclass_checks_itself():
    for options in ({"max_depth": 2000}, {"max_keys": 0}, {"max_expansion": -1}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be at"):
            Limits(**options)


def test_a_gzip_bomb_is_a_limit(load):
    with pytest.raises(LimitExceeded) as caught:
        load(gzip.compress(b"\n" * (80 << 20)), name="bomb.jsonl.gz", on_bad="skip")
    assert caught.value.field == "max_expansion"
    with pytest.raises(LimitExceeded) as caught:
        load(LINE * 9, on_bad="skip", limits=Limits(max_unpacked_bytes=100))
    assert caught.value.field == "max_unpacked_bytes"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_a_line_without_end_costs_little_memory(tmp_path):
    path = tmp_path / "sparse.jsonl"
    with path.open("wb") as file:
        file.write(b"x" * 8)  # zeros alone are no text
        file.truncate(2 << 30)
    tokenizer(tmp_path / "m")
    code = (
        "import sys, dpo_ext\n"
        # Not `ru_maxrss`, which a child process has from its parent.
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return int(next(x for x in lines if x.startswith('VmHWM')).split()[1])\n"
        "t = dpo_ext.Tokenizer.from_pretrained(sys.argv[1])\n"
        "before = peak()\n"
        "try:\n"
        "    dpo_ext.PairDataset.from_files(sys.argv[2], t, on_bad='skip', threads=1)\n"
        "except dpo_ext.DataError as error:\n"
        "    assert 'dropped limit: 1' in str(error), error\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m", path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < (40 << 10)  # KiB: twice the cap of 16 MiB, and some


# -- gzip -------------------------------------------------------------------------------------

ROWS_20 = [{**GOOD, "chosen": f"the {i}"} for i in range(20)]
TEXT_20 = "".join(json.dumps(r) + "\n" for r in ROWS_20).encode()


def test_members_and_zero_padding_are_read_whole(load):
    half = len(TEXT_20) // 2
    data = gzip.compress(TEXT_20[:half]) + gzip.compress(TEXT_20[half:])
    plain = load(TEXT_20)
    for packed in (data, data + b"\0" * 5, data + b"\0" * 100_000, gzip.compress(b"") + data):
        assert load(packed, name="x.jsonl.gz").chosen_ids == plain.chosen_ids
    # The name does not matter, the first bytes do.
    assert load(data, name="x.jsonl").chosen_ids == plain.chosen_ids


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_every_truncation_of_a_gzip_file_is_raised(load, on_bad):
    data = gzip.compress(TEXT_20, mtime=0)
    for size in range(2, len(data)):
        with pytest.raises(DataError) as caught:
            load(data[:size], name="x.jsonl.gz", on_bad=on_bad)
        assert caught.value.reason == "bad_input"


def test_every_flipped_byte_of_a_gzip_file_is_raised_or_harmless(load):
    data = gzip.compress(TEXT_20, mtime=0)
    want = load(TEXT_20).chosen_ids
    harmless, reasons = 0, set()
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        try:
            pairs = load(bytes(damaged), name="x.jsonl.gz", on_bad="skip")
        except DataError as error:
            reasons.add(error.reason)
        else:
            assert pairs.chosen_ids == want
            harmless += 1
    assert reasons == {"bad_input"}
    assert harmless <= 6  # time, extra flags and system of the header


@pytest.mark.parametrize(
    "tail", [b"x", b"\0x", b"\0" * 600 + b"\x01", LINE, b"\x1f", b"\x1f\x8b\x08"]
)
def test_garbage_behind_a_gzip_file_is_raised_even_with_skip(load, tail):
    with pytest.raises(DataError) as caught:
        load(gzip.compress(TEXT_20) + tail, name="x.jsonl.gz", on_bad="skip")
    assert caught.value.reason == "bad_input"


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (LINE, "x.gz", "expected gzip, as the name says, found other bytes"),
        (LINE, "x.zst", "expected zstd, as the name says, found other bytes"),
    ],
)
def test_other_formats_are_named(load, data, name, message):
    with pytest.raises(DataError) as caught:
        load(data, name=name, on_bad="skip")
    assert str(caught.value) == f"{caught.value.path}: {message}"
    assert caught.value.reason == "bad_input"


def test_every_prefix_of_a_file_gives_its_whole_lines_or_an_error(load):
    text = b"\n".join(LINE.replace(b"the a", b"the %d" % i) for i in range(5))
    for size in range(len(text)):
        whole = text[:size].count(b"\n")
        torn = text[:size].rsplit(b"\n", 1)[-1]
        complete = torn.startswith(b"{") and torn.endswith(b"}")
        if torn and not whole + complete:
            with pytest.raises(DataError, match="dropped bad_json: 1 "):
                load(text[:size], on_bad="skip")
            continue
        pairs = load(text[:size], on_bad="skip")
        assert len(pairs) == whole + complete
        assert pairs.report.dropped == ({} if complete or not torn else {"bad_json": 1})


# -- files ------------------------------------------------------------------------------------


def test_files_that_cannot_be_read(tok, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        PairDataset.from_files(tmp_path / "none.jsonl", tok)
    assert caught.value.filename == str(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError):
        PairDataset.from_files(str(tmp_path / "*.jsonl"), tok)
    with pytest.raises(DataError, match="expected files that end in"):
        PairDataset.from_files(tmp_path, tok)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="expected a regular file"):
        PairDataset.from_files(tmp_path / "pipe", tok)
    with pytest.raises(DataError, match="expected a regular file"):
        PairDataset.from_files("/dev/null", tok)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links"):
        PairDataset.from_files(tmp_path / "loop", tok)
    with pytest.raises(ValueError, match="at least one file"):
        PairDataset.from_files([], tok)
    if os.geteuid() != 0:
        (tmp_path / "secret").write_bytes(LINE)
        (tmp_path / "secret").chmod(0)
        with pytest.raises(PermissionError):
            PairDataset.from_files(tmp_path / "secret", tok)


def test_globs_are_sorted_without_hidden_files_and_no_file_comes_twice(tok, tmp_path):
    for name in ("b.jsonl", "a.jsonl", "._a.jsonl", "c.txt"):
        fields = {**GOOD, "prompt": "", "chosen": f"the {name}"}
        (tmp_path / name).write_text(json.dumps(fields))
    pairs = PairDataset.from_files(str(tmp_path / "*.jsonl"), tok)
    assert [decode(p["chosen_ids"])[4:5] for p in pairs] == ["a", "b"]
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    for twice in ([tmp_path / "a.jsonl"] * 2, [tmp_path / "a.jsonl", tmp_path / "link.jsonl"]):
        with pytest.raises(DataError, match="the same file as"):
            PairDataset.from_files(twice, tok)
    odd = tmp_path / "x[1].jsonl"
    odd.write_bytes(LINE)
    assert len(PairDataset.from_files(odd, tok)) == 1


def test_lines_and_rows_count_over_several_files(tok, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE + b"\n" + LINE)
    (tmp_path / "b.jsonl").write_bytes(LINE + b"\n\n{}\n" + LINE)
    pairs = PairDataset.from_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tok, on_bad="skip")
    first = pairs.report.first["missing_field"]
    assert (first.path, first.line) == (str(tmp_path / "b.jsonl"), 3)
    assert pairs.rows.tolist() == [0, 1, 2, 4]
    assert "line 3, `chosen`" in str(pairs.report)


def test_a_file_that_grows_while_it_is_read_is_refused(tok, tmp_path):
    path = tmp_path / "growing.jsonl"
    path.write_bytes((LINE + b"\n") * 400_000)  # longer than a few ticks of progress
    grown = threading.Event()

    def grow(done, rows):
        if not grown.is_set():
            with path.open("ab") as file:
                file.write(LINE + b"\n")
            grown.set()

    with pytest.raises(DataError) as caught:
        PairDataset.from_files(path, tok, progress=grow, threads=1)
    assert grown.is_set()
    assert str(caught.value) == f"{path}: the file changed while it was read"


# -- threads ----------------------------------------------------------------------------------


def test_the_result_does_not_depend_on_threads(load):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6000):
        fields = {**GOOD, "chosen": "the " * int(rng.integers(0, 9)) + str(i)}
        lines.append(b"{" if i % 97 == 0 else json.dumps(fields).encode())
    data = b"\n".join(lines)
    one, two, eight = (load(data, on_bad="skip", threads=t) for t in (1, 2, 8))
    for other in (two, eight):
        assert other.report == one.report
        assert other.prompt_ids == one.prompt_ids
        assert other.chosen_ids == one.chosen_ids
        assert other.rows.tolist() == one.rows.tolist()
    errors = []
    for threads in (1, 2, 8):
        with pytest.raises(DataError) as caught:
            load(b"\n".join(lines[1:]), threads=threads)
        errors.append(str(caught.value))
    assert len(set(errors)) == 1
    assert "line 97," in errors[0]


def test_the_gil_is_released(load):
    data = json.dumps({**GOOD, "chosen": "the a" * 2000}).encode()
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.005)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    load(b"\n".join([data] * 4000), threads=1, max_length=None)
    end = time.monotonic()
    stop.set()
    thread.join()
    inside = [t for t in ticks if start < t < end]
    assert end - start > 0.1
    assert max(np.diff([start, *inside, end])) < 0.6 * (end - start)


@pytest.mark.slow
def test_ctrl_c_stops_the_call(tmp_path):
    path = tmp_path / "big.jsonl"
    big = json.dumps({**GOOD, "chosen": "the a " * 20_000}).encode()
    path.write_bytes(b"\n".join([big] * 300))
    tokenizer(tmp_path / "m")
    # The slow engine, which needs about 20 s: with ours the call could be over before the signal.
    file = tmp_path / "m" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    file.write_text(json.dumps(content), encoding="utf-8")
    code = (
        "import signal, sys, time, dpo_ext\n"
        # A job in the background inherits an ignored SIGINT, and Python leaves it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "t = dpo_ext.Tokenizer.from_pretrained(sys.argv[1])\n"
        "assert t.engine == 'tokenizers'\n"
        "print('ready', flush=True)\n"
        "try:\n"
        "    dpo_ext.PairDataset.from_files(sys.argv[2], t, max_length=None, threads=2)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', time.monotonic(), flush=True)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "m", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.5)
        sent = time.monotonic()
        child.send_signal(signal.SIGINT)
        words = child.stdout.readline().split()
    assert words[0] == "interrupted"
    # 200 ms on a quiet machine; the bound here allows for a busy one.
    assert float(words[1]) - sent < 1.0


# -- rows from memory -------------------------------------------------------------------------


def test_rows_from_memory_equal_rows_from_a_file(load, tok):
    rows = [GOOD, CHAT, IDS, {"chosen": "x a", "rejected": "x b"}] * 3
    by_file = load("\n".join(map(json.dumps, rows)).encode())
    for source in (rows, iter(rows), tuple(rows), (dict(r) for r in rows)):
        by_row = PairDataset.from_rows(source, tok)
        assert by_row.prompt_ids == by_file.prompt_ids
        assert by_row.chosen_ids == by_file.chosen_ids
        assert by_row.rejected_ids == by_file.rejected_ids


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({**GOOD, "chosen": "\ud800"}, "bad_json"),
        ({**GOOD, "chosen": b"bytes"}, "wrong_type"),
        ({**GOOD, "chosen": object()}, "wrong_type"),
        ({**CHAT, "tools": [{1: 2}]}, "wrong_type"),
        ([1], "not_an_object"),
        ("text", "not_an_object"),
        (None, "not_an_object"),
        ({**GOOD, "ref_chosen_logps": math.nan, "ref_rejected_logps": 0.0}, "wrong_type"),
        ({**GOOD, "ref_chosen_logps": 0.0, "ref_rejected_logps": math.inf}, "wrong_type"),
    ],
)
def test_bad_python_values_are_bad_rows(tok, value, reason):
    with pytest.raises(DataError) as caught:
        PairDataset.from_rows([GOOD, value], tok)
    assert (caught.value.reason, caught.value.line) == (reason, 2)
    assert PairDataset.from_rows([GOOD, value], tok, on_bad="skip").report.dropped == {reason: 1}


def test_a_value_that_contains_itself_is_a_limit(tok):
    loop = []
    loop.append(loop)
    with pytest.raises(LimitExceeded):
        PairDataset.from_rows([{**CHAT, "tools": [{"a": loop}]}], tok)


def test_an_error_of_the_iterable_passes_through(tok):
    def rows():
        yield GOOD
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        PairDataset.from_rows(rows(), tok)


def test_numpy_values_are_values(tok):
    row = {
        "prompt_ids": np.array([1, 2]),
        "chosen_ids": np.array([3], np.int32),
        "rejected_ids": [np.int64(4)],
    }
    row |= {"ref_chosen_logps": np.float32(-1.5), "ref_rejected_logps": np.float64(-2)}
    pairs = PairDataset.from_rows([row], tok)
    assert pairs.ref_logps.tolist() == [[-1.5, -2.0]]
    assert pairs[0]["prompt_ids"].tolist() == [1, 2]


def test_reference_log_probs_in_some_rows_are_noted_and_not_carried(tok):
    with_ref = {**GOOD, "ref_chosen_logps": -1, "ref_rejected_logps": -2}
    pairs = PairDataset.from_rows([with_ref, GOOD], tok)
    assert pairs.ref_logps is None
    assert "reference log-probs stand in 1 of 2 pairs and were not carried" in pairs.report.notes
    batch = PairDataset.from_rows([with_ref] * 2, tok).plan(layout="padded", pairs_per_batch=2)[0]
    assert batch.ref_logps.tolist() == [[-1, -2], [-1, -2]]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_length": 0}, ValueError),
        ({"truncation": "keep"}, ValueError),
        ({"boundary": "x"}, ValueError),
        ({"on_bad": "warn"}, ValueError),
        ({"special_tokens_in_text": "maybe"}, ValueError),
        ({"threads": 0}, ValueError),
        ({"chosen_key": "a", "rejected_key": "a"}, ValueError),
        ({"unknown": 1}, TypeError),
    ],
)
def test_bad_options_are_refused(tok, options, error):
    with pytest.raises(error):
        PairDataset.from_rows([GOOD], tok, **options)


def test_errors_survive_pickling():
    import pickle

    error = DataError("text", "a.jsonl", 3, 17, "chosen", "bad_json")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.path, again.line, again.byte, again.field, again.reason) == (
        "text", "a.jsonl", 3, 17, "chosen", "bad_json",
    )  # fmt: skip
    assert isinstance(again, DpoExtError)
