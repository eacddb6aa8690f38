"""The engine that a tokenizer.json gets, and that both engines give the ids of the tokenizers package.

The engine itself is compared with the crate in `rust/bpe` (`cargo test bpe`; DPO_EXT_DEEP=1 for all of it).
"""

import json

import byte_tokenizer
import pytest

from dpo_ext import Tokenizer

tokenizers = pytest.importorskip("tokenizers")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "",
    "hello  the hello\n\n the",
    "it'S 12345 <|turn|>user\n \u00e9 e\u0301 \u4e2d\u6587 \U0001f600  ",
    "\t\x00\u2028\u3000'\u017f <|end|",
]


def load(tmp_path, change=None, **options):
    """The tokenizer of a file, and the file in the tokenizers package."""
    file = json.loads(byte_tokenizer.tokenizer_json(**options))
    if change is not None:
        change(file)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(file), encoding="utf-8")
    return Tokenizer.from_file(path), tokenizers.Tokenizer.from_str(json.dumps(file))


def assert_same_ids(ours, theirs, text):
    expected = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_special_tokens=False).tolist() == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"regex": LLAMA3, "ignore_merges": True},
        {"regex": LLAMA3, "normalizer": {"type": "NFC"}},
    ],
    ids=["gpt2", "llama3", "llama3-nfc"],
)
def test_a_known_structure_takes_bpe(tmp_path, options):
    ours, theirs = load(tmp_path, **options)
    assert ours.engine == "bpe"
    assert not any("engine" in note for note in ours.notes)
    for text in TEXTS:
        assert_same_ids(ours, theirs, text)


def drop_byte(file):
    del file["model"]["vocab"]["q"]


def set_dropout(file):
    file["model"]["dropout"] = 0.0


def strip_left(file):
    file["added_tokens"][1]["lstrip"] = True


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"regex": r"\p{L}+|\s+|."}, None, "unknown regex"),
        ({"normalizer": {"type": "NFKC"}}, None, "`normalizer`"),
        ({}, drop_byte, "byte 113"),
        ({}, set_dropout, "dropout"),
        ({}, strip_left, "lstrip"),
    ],
    ids=["regex", "normalizer", "byte", "dropout", "lstrip"],
)
def test_another_structure_goes_to_tokenizers_with_the_reason(tmp_path, options, change, reason):
    ours, theirs = load(tmp_path, change, **options)
    assert ours.engine == "tokenizers"
    assert [reason in note for note in ours.notes].count(True) == 1
    for text in TEXTS:
        assert_same_ids(ours, theirs, text)


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    def limit(file):
        file["truncation"] = {
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        file["padding"] = {
            "strategy": {"Fixed": 50},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 256,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        }

    ours, _ = load(tmp_path, limit)
    whole, _ = load(tmp_path)
    text = TEXTS[1] * 3
    assert ours.encode(text).tolist() == whole.encode(text).tolist()
    assert ours.engine == "bpe"
