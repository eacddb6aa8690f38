"""`Tokenizer`: files, live tokenizers, engines, hostile input, pickling."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from byte_tokenizer import BOS, END, bos_processor, decode, tokenizer, tokenizer_json, write_folder
from hypothesis import given
from hypothesis import strategies as st

from dpo_ext import DataError, Tokenizer, TokenizerError

TEXTS = ["", "a", "hello the  hello", "é\n\n🙂", "<|end|>x", " \t\r\n", "a" * 3000, "\0", "Ⅷ ǅ"]
COLLISION = "MHYQTZE"  # by a hash alone it is " LGPL" of Qwen2.5's vocabulary: docs/engines.md


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_ids_are_transformers_ids(tmp_path, special, bos):
    transformers = pytest.importorskip("transformers")
    options = {"post_processor": bos_processor(), "config": {"bos_token": "<|bos|>"}} if bos else {}
    folder = write_folder(tmp_path / "m", **options)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for ours in (Tokenizer.from_pretrained(folder), Tokenizer.from_pretrained(theirs)):
        assert ours.engine == "bpe"
        for text in TEXTS:
            got = ours.encode(text, add_special_tokens=special)
            assert got.dtype == np.int32
            assert got.tolist() == theirs(text, add_special_tokens=special)["input_ids"]
        names = ("bos", "eos", "pad")
        assert [getattr(ours, f"{n}_id") for n in names] == [
            getattr(theirs, f"{n}_token_id") for n in names
        ]
        assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_files_post_processor_wins_over_the_configuration(tmp_path, add_bos):
    transformers = pytest.importorskip("transformers")
    config = {"bos_token": "<|bos|>", "add_bos_token": add_bos}
    folder = write_folder(tmp_path / "m", post_processor=bos_processor(), config=config)
    want = transformers.AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    assert Tokenizer.from_pretrained(folder).encode("a").tolist() == want
    assert want == [BOS, ord("a")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "neox20b", "qwen2.5"])
def test_published_tokenizers_give_transformers_ids(shared_dir, name):
    transformers = pytest.importorskip("transformers")
    folder = shared_dir / "tokenizers" / name
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(folder),
        Tokenizer.from_pretrained(folder),
    )
    assert ours.engine == "bpe"
    for text in (*TEXTS, COLLISION):
        assert ours.encode(text).tolist() == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text).tolist())


@given(st.lists(st.text(max_size=20)), st.integers(1, 3))
def test_a_batch_is_its_texts_one_by_one(tok, texts, threads):
    ragged = tok.encode_batch(texts, threads=threads)
    assert ragged.tolist() == [tok.encode(text).tolist() for text in texts]
    assert ragged.values.dtype == np.int32
    assert ragged.offsets.dtype == np.int64


@given(st.text(max_size=30))
def test_decode_gives_the_text_back(tok, text):
    assert tok.decode(tok.encode(text)) == text == decode(tok.encode(text).tolist())


@pytest.mark.parametrize("ids", [[-1], [270], [2**31 - 1]])
def test_decode_refuses_other_ids(tok, ids):
    with pytest.raises(TokenizerError, match=r"decode: expected ids in 0\.\.270"):
        tok.decode(ids)


def test_other_types_and_lone_surrogates_are_typed_errors(tok):
    with pytest.raises(DataError, match="lone surrogate"):
        tok.encode("\ud800")
    with pytest.raises(DataError, match=r"row 2: .*lone surrogate"):
        tok.encode_batch(["a", "\udfff"])
    for bad in (b"a", None, 1, ["a"]):
        with pytest.raises(TypeError):
            tok.encode(bad)
    with pytest.raises(TypeError, match="found one string"):
        tok.encode_batch("text")
    with pytest.raises(TypeError, match="must be strings, found int at 1"):
        tok.encode_batch(["a", 1])
    with pytest.raises(TokenizerError, match="found int"):
        Tokenizer.from_pretrained(5)


def test_truncation_and_padding_blocks_are_switched_off(tmp_path, tok):
    data = json.loads(tokenizer_json())
    data["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    data["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>",
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert Tokenizer.from_file(path).encode("abcd").tolist() == tok.encode("abcd").tolist()


@pytest.mark.slow
def test_pickles_are_stable_bytes_in_every_process(tmp_path):
    folder = write_folder(tmp_path / "m")
    ours = Tokenizer.from_pretrained(folder)
    code = (
        "import sys, pickle, hashlib, dpo_ext\n"
        "t = dpo_ext.Tokenizer.from_pretrained(sys.argv[1])\n"
        "t.encode('hello')\n"
        "print(hashlib.sha256(pickle.dumps(t)).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(digests) == 1
    again = pickle.loads(pickle.dumps(ours))
    assert again == ours
    assert pickle.dumps(again) == pickle.dumps(ours)
    assert again.encode("hello").tolist() == ours.encode("hello").tolist()
    assert (again.eos_id, again.chat_template) == (END, ours.chat_template)


def changed(**parts):
    data = json.loads(tokenizer_json())
    for path, value in parts.items():
        *head, last = path.split("__")
        target = data
        for name in head:
            target = target[name]
        target[last] = value
    return json.dumps(data)


HOSTILE = {
    "not json": "{",
    "an array": "[]",
    "empty": "",
    "no model": '{"version": "1.0"}',
    "other version": changed(version="9.0"),
    "huge id": changed(model__vocab={"a": 4294967295}, model__merges=[], added_tokens=[]),
    "id far outside": changed(model__vocab={"a": 0, "b": 10**9}, model__merges=[], added_tokens=[]),
    "negative id": changed(model__vocab={"a": -1}),
    "merge outside the vocabulary": changed(model__merges=["q x"]),
    "bad regex": changed(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "("},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
    "processor without its token": changed(
        post_processor={**bos_processor(), "special_tokens": {}}
    ),
    "processor with two texts": changed(
        post_processor={
            **bos_processor(),
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
        }
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_tokenizer_error(tmp_path, tok, name, capfd):
    path = tmp_path / "tokenizer.json"
    path.write_text(HOSTILE[name], encoding="utf-8")
    with pytest.raises(TokenizerError):
        Tokenizer.from_file(path)
    assert capfd.readouterr().err == ""
    assert tok.encode("a").tolist() == [97]


@given(st.data())
def test_damaged_files_load_or_are_tokenizer_errors(tmp_path_factory, data):
    text = bytearray(tokenizer_json().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(bytes(text))
    try:
        ids = Tokenizer.from_file(path).encode("hello the <|end|>")
    except TokenizerError:
        return
    assert (ids >= 0).all()


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_json(), encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"`eos_token`: expected an id in 0\.\.270, found 270"):
        Tokenizer.from_file(path, eos_id=270)
    with pytest.raises(ValueError, match="`pad_id` must be in"):
        Tokenizer.from_file(path, pad_id=-1)


def test_an_unknown_structure_is_served_by_the_crate_and_says_why(tmp_path):
    ours = tokenizer(tmp_path / "m", regex=r"\w+|\W+")
    assert ours.engine == "tokenizers"
    assert any("the engine is `tokenizers`" in note for note in ours.notes)
    assert ours.decode(ours.encode("hello, the é")) == "hello, the é"


def test_missing_and_damaged_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_pretrained(tmp_path / "none")
    folder = write_folder(tmp_path / "m")
    for text in ("{", "[]"):
        (folder / "tokenizer_config.json").write_text(text)
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
            Tokenizer.from_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()
    bare = Tokenizer.from_pretrained(folder)
    assert (bare.eos_id, bare.chat_template) == (None, None)
    (folder / "chat_template.jinja").write_text("{{ messages | length }}")
    assert Tokenizer.from_pretrained(folder).apply_chat_template([]) == "0"
