"""Small tokenizers of many classes, and the folders that are made of them; no package is needed."""

import json
import random

from byte_tokenizer import bos_processor, tokenizer_json

MARK = "\u2581"
NAMES = (
    *("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image", "audio", "boi", "x", "think"),
    "video",
)
TEMPLATE = (
    "".join(f"[{name}:{{{{ {name}_token }}}}]" for name in NAMES)
    + "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
)
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def token(text, number, *, special=True, **flags):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **plain, "special": special, **flags}


def added(text, **flags):
    """An AddedToken as tokenizer_config.json has it."""
    written = {key: value for key, value in token(text, 0, **flags).items() if key != "id"}
    return {"__type": "AddedToken", **written}


def decoder_entry(text, **flags):
    return {key: value for key, value in added(text, **flags).items() if key != "__type"}


def byte_level(**flags):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, **flags}


def with_parts(text=None, **parts):
    data = json.loads(text or tokenizer_json())
    for key, value in parts.items():
        target, _, name = key.rpartition("__")
        (data[target] if target else data)[name] = value
    return data


def split():
    """The one of byte_tokenizer: a regex and bytes, ids 0..255 the bytes, 256..259 control."""
    return with_parts()


def bos():
    return with_parts(tokenizer_json(post_processor=bos_processor()))


def gpt2():
    """As GPT2Tokenizer makes it."""
    return with_parts(pre_tokenizer=byte_level(use_regex=True), decoder=byte_level())


def neox():
    nfc = {"type": "NFC"}
    return with_parts(pre_tokenizer=byte_level(), decoder=byte_level(), normalizer=nfc)


def qwen2():
    return with_parts(tokenizer_json(regex=QWEN, normalizer={"type": "NFC"}))


def padded():
    """tokenizer.json names the padding itself."""
    return with_parts(
        padding={
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 256,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        }
    )


def pieces(*special):
    """A vocabulary of SentencePiece's kind: special tokens, bytes, letters and a few merges."""
    letters = [MARK, *"abcdefghijklmnopqrstuvwxyz.,!0123456789ABCH", "é"]
    merges = [[MARK, "t"], ["h", "e"], [MARK + "t", "he"], ["l", "l"], [MARK, MARK], ["o", "w"]]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += ["".join(pair) for pair in merges]
    return {text: number for number, text in enumerate(tokens)}, merges


def spelt(specials, *, normalizer, pre_tokenizer, strip, unk, processor=None):
    vocab, merges = pieces(*specials)
    decoders = [
        {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token(text, number) for number, text in enumerate(specials)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": processor,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def processor_of(text, number):
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": text, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]}},
    }


LLAMA = ("<unk>", "<s>", "</s>")


def llama():
    """As LlamaTokenizer of transformers 5 writes it."""
    return spelt(
        LLAMA,
        normalizer=None,
        pre_tokenizer={
            "type": "Metaspace",
            "replacement": MARK,
            "prepend_scheme": "first",
            "split": False,
        },
        strip=True,
        unk=None,
        processor=processor_of("<s>", 1),
    )


def old_llama():
    """As it stands in Llama 2's folder: a mark behind every special token."""
    prepend = {"type": "Prepend", "prepend": MARK}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    return spelt(
        LLAMA,
        normalizer={"type": "Sequence", "normalizers": [prepend, replace]},
        pre_tokenizer=None,
        strip=True,
        unk="<unk>",
        processor=processor_of("<s>", 1),
    )


def gemma():
    return spelt(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"),
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": MARK},
        pre_tokenizer={
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        strip=False,
        unk="<unk>",
        processor=processor_of("<bos>", 2),
    )


def t5():
    specials = ("<pad>", "</s>", "<unk>")
    vocab = [[text, 0.0] for text in specials]
    vocab += [
        [text, -float(2 + i % 7)] for i, text in enumerate([MARK, *"abcdehlort", MARK + "the"])
    ]
    space = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "always", "split": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token(text, number) for number, text in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": space,
        "post_processor": None,
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False},
    }


def bert():
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    words = [*specials, *"abcdehlortABH", *("##" + c for c in "abcdehlort"), "hello", "the", "é"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token(text, number) for number, text in enumerate(specials)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": False,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {text: number for number, text in enumerate(words)},
        },
    }


def words():
    vocab = {text: number for number, text in enumerate(["[UNK]", "hello", "the", "a", ",", "<s>"])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token("[UNK]", 0), token("<s>", 5)],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    }


def write(folder, made, files):
    """A folder of tokenizer.json and other files, whose contents are JSON or text."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
    return folder


SPECIAL_TEXTS = [
    *("<|endoftext|>", "<|end|>", "<|pad|>", "<|turn|>", "<s>", "</s>", "<unk>", "<pad>", "<bos>"),
    *("<eos>", "<mask>", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "<image>", "<boi>", "<audio>", "<x>"),
    *("<new>", "<more>", "image_token", "boi_token", "bos_token", "<video>"),
]


def nasty_texts(count=300):
    """Texts of letters, spaces, combining marks, bytes without a token, and special tokens."""
    rng = random.Random(5)
    parts = [
        *SPECIAL_TEXTS,
        *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b"),
        *("hello", "Hello", "the", " the", "HELLO", "a", "aaaa", "l", "low", "ow", ".", ",", "!"),
        *(
            "\u00e9",
            "e\u0301",
            "\u00c9",
            "\ufb01",
            "\u2167",
            "\u01c5",
            "\u0130",
            "\u4e2d",
            "\u6587",
        ),
        *("\U0001f642", "\u200d", "\u2581", "\0", "0", "12", "1000", "'s", "'LL", "##a", "_", "\\"),
    ]
    texts = ["", " ", *SPECIAL_TEXTS]
    while len(texts) < count:
        texts.append("".join(rng.choices(parts, k=rng.randint(1, 12))))
    return texts[:count]
