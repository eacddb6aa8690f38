"""A byte-level tokenizer.json made by hand: 256 bytes, a few merges, control tokens; no package is needed."""

import json

from dpo_ext import Tokenizer

TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
PAD, TURN, END, BOS = 256, 257, 258, 259
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ t", "Ġt he", "a a", "aa aa", ": Ġ", "Ġ Ġ"]
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def alphabet():
    """GPT-2's printable character of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (chr(256 + i) for i in range(256 - len(printable)))
    return {b: chr(b) if b in printable else next(rest) for b in range(256)}


def tokenizer_json(
    *, regex=GPT2_REGEX, merges=MERGES, post_processor=None, normalizer=None, **model
):
    """The text of a tokenizer.json; ids 0..255 are the bytes themselves, 260 on the merges."""
    vocab = {c: b for b, c in alphabet().items()}
    for merge in merges:
        vocab["".join(merge.split(" "))] = 260 + len(vocab) - 256
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    control = {"<|pad|>": PAD, "<|turn|>": TURN, "<|end|>": END, "<|bos|>": BOS}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": text, "special": True, **flags} for text, i in control.items()
            ],
            "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": post_processor,
            "decoder": {**byte_level, "use_regex": True},
            "model": {"type": "BPE", "vocab": vocab | control, "merges": merges, **model},
        }
    )


def bos_processor():
    """A post-processor that puts BOS before a text."""
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [BOS], "tokens": ["<|bos|>"]}},
    }


def write_folder(folder, *, config=(), template=TEMPLATE, **options):
    """A model's folder with tokenizer.json and tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(**options), encoding="utf-8")
    settings = {
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(config),
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def tokenizer(folder, **options):
    """That folder as a dpo_ext.Tokenizer."""
    return Tokenizer.from_pretrained(write_folder(folder, **options))


def decode(ids):
    """The text of ids, control tokens as they are spelt."""
    bytes_of = {c: bytes([b]) for b, c in alphabet().items()}
    control = {PAD: b"<|pad|>", TURN: b"<|turn|>", END: b"<|end|>", BOS: b"<|bos|>"}
    out = b""
    for i in ids:
        if i < 256:
            out += bytes([i])
        elif i in control:
            out += control[i]
        else:
            out += b"".join(bytes_of[c] for c in MERGES[i - 260].replace(" ", ""))
    return out.decode()
