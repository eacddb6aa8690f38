"""Where the engine is the `tokenizers` crate: its ids, and a prompt that ends where its offsets say."""

import json

import pytest
from byte_tokenizer import alphabet
from hypothesis import assume, given, reject
from hypothesis import strategies as st

from dpo_ext import DataError, PairDataset, Tokenizer

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["▁", "▁the", "the", "▁a", "a", "b", "ab", "▁ab", "é", "ir", "##ab", "##a", "##b", "ba"]


def sentencepiece():
    """Llama's layout: no pre-tokenizer, bytes where a character is unknown."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    merges = [["a", "b"], ["▁", "ab"], ["▁", "a"], ["▁", "▁"]]
    vocab += ["".join(merge) for merge in merges]
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(vocab)},
            "merges": merges,
        },
    }


def unigram():
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return {
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [["<unk>", 0.0], *([word, -1.0 - i / 8] for i, word in enumerate(WORDS))],
        },
    }


def wordpiece():
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: i for i, token in enumerate(["[UNK]", *WORDS])},
        },
    }


def bytes_with(*, prefix_space):
    vocab = {c: byte for byte, c in alphabet().items()} | {"ab": 256, "Ġab": 257}
    return {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": prefix_space,
            "trim_offsets": True,
            "use_regex": prefix_space,
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["Ġ", "ab"]]},
    }


FILES = {
    "sentencepiece": sentencepiece(),
    "unigram": unigram(),
    "wordpiece": wordpiece(),
    "bytes behind a space": bytes_with(prefix_space=True),
    "bytes of the whole text": bytes_with(prefix_space=False),
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    def load(name):
        path = tmp_path_factory.mktemp("fallback") / "tokenizer.json"
        whole = {"version": "1.0", "added_tokens": [], "decoder": None, "post_processor": None}
        path.write_text(json.dumps(whole | FILES[name]), encoding="utf-8")
        return Tokenizer.from_file(path), tokenizers.Tokenizer.from_file(str(path))

    return {name: load(name) for name in FILES}


def prompt_of(oracle, texts, cut):
    """The ids that both texts begin with and that end at or before character `cut`."""
    found = [oracle.encode(text, add_special_tokens=False) for text in texts]
    count, end = 0, 0
    for first, second, (_, a), (_, b) in zip(
        *(one.ids for one in found), *(one.offsets for one in found), strict=False
    ):
        end = max(end, a, b)
        if first != second or end > cut:
            break
        count += 1
    return count, [one.ids for one in found]


TEXTS = st.text(st.sampled_from("ab the éé\u0301ﬁ👍中\n▁#İ"), min_size=1, max_size=12)


@pytest.mark.parametrize("name", FILES)
@given(st.tuples(TEXTS, TEXTS, TEXTS))
def test_the_prompt_ends_where_the_offsets_say(engines, name, texts):
    prompt, *sides = texts
    assume(sides[0] != sides[1] and not any(side.isspace() for side in sides))
    ours, oracle = engines[name]
    assert ours.engine == "tokenizers"
    row = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
    try:
        pairs = PairDataset.from_rows([row], ours)
    except DataError:  # a side without an id, such as one that the normalizer takes away
        reject()
    count, both = prompt_of(oracle, [prompt + side for side in sides], len(prompt))
    got = pairs[0]
    assert got["prompt_ids"].tolist() == both[0][:count]
    assert got["chosen_ids"].tolist() == both[0][count:]
    assert got["rejected_ids"].tolist() == both[1][count:]


@pytest.mark.parametrize("name", FILES)
def test_ids_are_the_reference_librarys(engines, name):
    ours, oracle = engines[name]
    for text in ("", " ", "ab", "the ab é👍", "▁ab  b\n", "\ufb01 e\u0301 İ"):
        assert ours.encode(text).tolist() == oracle.encode(text, add_special_tokens=False).ids
