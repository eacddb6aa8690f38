"""Which class transformers 5 takes for a folder's tokenizer, and what our loader knows of it.

transformers builds most classes anew: it takes vocabulary and merges from ``tokenizer.json``, the
other steps from its own code. Ours takes the file as it is, so it knows a class where those steps
are the file's own. Everything else is :class:`Foreign`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Parts = Mapping[str, Any]


class Foreign(Exception):  # noqa: N818 - no error: transformers may know it
    """What only transformers knows of a folder; its text says what that is."""


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def regex_split(regex: str) -> Parts:
    pattern = {"Regex": regex}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def byte_level(*, prefix: bool, use_regex: bool) -> Parts:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "use_regex": use_regex}


def sequence(kind: str, *parts: Parts) -> Parts:
    return {"type": "Sequence", kind: list(parts)}


@dataclass(frozen=True)
class Known:
    """A class of transformers that our loader gives exactly.

    Attributes:
        name: without ``Fast``.
        tokens: the named tokens that it has where the folder says nothing of them.
        rebuilt: transformers takes only the vocabulary of tokenizer.json and makes the rest.
        plain_names: its named and extra tokens lose flags such as ``lstrip``.
        keeps_processor: the post-processor of tokenizer.json stays.
    """

    name: str
    tokens: Mapping[str, str | None] = field(default_factory=dict)
    rebuilt: bool = True
    plain_names: bool = False
    keeps_processor: bool = True

    def steps(self, config: Parts) -> Parts:
        """The steps that it makes, in the words of tokenizer.json; keys that change no id are left
        out.
        """
        prefix = bool(config.get("add_prefix_space"))
        plain = {"fuse_unk": False, "byte_fallback": False, "unk_token": None}
        nfc = {"type": "NFC"}
        if self.name == "GPT2Tokenizer":
            pre = byte_level(prefix=prefix, use_regex=True)
            return {"normalizer": None, "pre_tokenizer": pre, "decoder": BYTES, "model": plain}
        if self.name == "GPTNeoXTokenizer":
            pre = byte_level(prefix=prefix, use_regex=True)
            return {"normalizer": nfc, "pre_tokenizer": pre, "decoder": BYTES, "model": plain}
        if self.name in QWEN_REGEX:
            split = regex_split(QWEN_REGEX[self.name])
            pre = sequence("pretokenizers", split, byte_level(prefix=prefix, use_regex=False))
            return {"normalizer": nfc, "pre_tokenizer": pre, "decoder": BYTES, "model": plain}
        spelt = {"fuse_unk": True, "byte_fallback": True}
        if self.name == "GemmaTokenizer":
            space = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
            pre = {
                "type": "Split",
                "pattern": {"String": " "},
                "behavior": "MergedWithPrevious",
                "invert": False,
            }
            unk = text_in(config.get("unk_token", self.tokens["unk_token"]), "content")
            return {
                "normalizer": space,
                "pre_tokenizer": pre,
                "decoder": sequence("decoders", *MARKED_BYTES),
                "model": {**spelt, "unk_token": unk},
            }
        assert self.name == "LlamaTokenizer"
        prefix = config.get("add_prefix_space") is not False
        first = "always" if config.get("legacy", False) else "first"
        pre = {
            "type": "Metaspace",
            "replacement": MARK,
            "prepend_scheme": first if prefix else "never",
            "split": False,
        }
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
        return {
            "normalizer": None,
            "pre_tokenizer": pre,
            "decoder": sequence("decoders", *MARKED_BYTES, *strip),
            "model": {**spelt, "unk_token": None},
        }


MARK = "\u2581"
BYTES = {"type": "ByteLevel"}
MARKED_BYTES = (
    {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
)
QWEN_REGEX = {
    "Qwen2Tokenizer": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "Qwen3_5Tokenizer": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_END = "<|endoftext|>"
_QWEN = {"unk_token": _END, "eos_token": _END, "pad_token": _END}
PLAIN = Known("TokenizersBackend", rebuilt=False)
KNOWN = {
    **dict.fromkeys(("TokenizersBackend", "PreTrainedTokenizer", "BloomTokenizer"), PLAIN),
    **{
        known.name: known
        for known in (
            Known(
                "GPT2Tokenizer",
                dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END) | {"pad_token": None},
            ),
            Known(
                "GPTNeoXTokenizer",
                dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END)
                | {"pad_token": "<|padding|>"},
                keeps_processor=False,
            ),
            Known("Qwen2Tokenizer", _QWEN, plain_names=True),
            Known("Qwen3_5Tokenizer", _QWEN),
            Known(
                "LlamaTokenizer",
                {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
            ),
            Known(
                "GemmaTokenizer",
                {f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")},
            ),
        )
    },
}

# The names of models whose tokenizers transformers 5.24 loads as the file says, whatever the
# folder calls the class. All of them: what stands in neither table follows the folder.
_PLAIN_MODELS = words("""
    EvollaModel arctic aria beam bigbird_pegasus camembertv2-base canary chatlm cohere_asr ernie4_5
    ernie4_5_moe flex_olmo fuyu glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm_image glmasr
    got_ocr2 gpt_bigcode gradium_phonon_tts granite granitemoe granitemoehybrid granitemoeshared
    h2ovl_chat hyperclovax hyperclovax_vlm internlm2 internlm3 iquestcoder jamba kimi_k25
    kimi_linear kosmos-2 llava llava_next mimo_v2_flash minicpm3 minicpm_ocr minicpmv minicpmv4_6
    minicpmv4_7 minimax_m2 modernbert modernbert-decoder molmo molmo2 nemo_speechlm nemotron nvfp4
    nystromformer olmo2 olmo3 olmo_hybrid omniasr opencua openvla paddleocr_vl pegasus_x persimmon
    phi3 phi3_v phimoe pix2struct pocket_tts smolvlm stablelm step3_vl umt5 vipllava xlm-roberta-xl
    """)
# With mistral-common and a tekken.json these have another class, without them the file's.
_MISTRAL = words("""
    ministral ministral3 mistral mistral3 mistral_large4 mixtral pixtral voxtral voxtral_realtime
    """)
# Models whose folders name a wrong class: transformers takes this one.
_FORCED = {
    "qwen2": "Qwen2Tokenizer",
    "hyperclovax_vision_v2": "GPT2Tokenizer",
    "siglip2": "Siglip2Tokenizer",
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"), "Qwen3_5Tokenizer"
    ),
}
# What a model has whose folder names no class.
_OF_MODEL = {
    **dict.fromkeys(
        words("""
        codegen dbrx gpt2 gpt_neo gptj jais2 opt phi starcoder2
        """),
        "GPT2Tokenizer",
    ),
    **dict.fromkeys(
        words("""
        internvl ovis2 qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_moe qwen2_vl qwen3 qwen3_moe
        qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe
        """),
        "Qwen2Tokenizer",
    ),
    "qwen3_5_text": "Qwen3_5Tokenizer",
    **dict.fromkeys(
        words("falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm"), "GPTNeoXTokenizer"
    ),
    **dict.fromkeys(
        words("""
        gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma shieldgemma2 t5gemma
        """),
        "GemmaTokenizer",
    ),
    **dict.fromkeys(
        words("""
        bloom deepseek_v2 deepseek_v3 exaone4 falcon gpt_oss lfm2 llama llama4 nemotron_h seed_oss
        smollm3
        """),
        "TokenizersBackend",
    ),
}


def class_of(config: Parts, model: Parts, *, has_byte_level: bool, has_tekken: bool) -> Known:
    """The class that ``AutoTokenizer`` of transformers 5.24 takes.

    Args:
        config: tokenizer_config.json.
        model: config.json; both empty where there is none.
        has_byte_level: whether tokenizer.json says ByteLevel anywhere.
        has_tekken: whether there is a tekken.json.

    Raises:
        Foreign: it is a class that our loader does not know, or depends on more than that.
    """
    if "auto_map" in config:
        raise Foreign("`auto_map` in tokenizer_config.json")
    if "model_name" in model:
        raise Foreign("`model_name` in config.json")
    kind, said = model.get("model_type"), config.get("tokenizer_class")
    said = said or model.get("tokenizer_class")
    if not isinstance(kind, str | None) or not isinstance(said, str | None):
        raise Foreign("a `model_type` or `tokenizer_class` that is no text")
    if kind in _MISTRAL and not has_tekken:
        return PLAIN
    if kind in _MISTRAL:
        raise Foreign("`tekken.json` beside tokenizer.json")
    if kind in _PLAIN_MODELS:
        return PLAIN
    if kind in _FORCED:
        name = _FORCED[kind]
    elif said:
        name = said.removesuffix("Fast")
        if name == "LlamaTokenizer" and has_byte_level:
            return PLAIN
    elif kind:
        if kind not in _OF_MODEL:
            raise Foreign(f"`model_type` {kind} in config.json without a `tokenizer_class`")
        name = _OF_MODEL[kind]
    else:
        return PLAIN
    if name not in KNOWN:
        raise Foreign(f"the class {name}")
    return KNOWN[name]


def check_steps(known: Known, outline: Parts, config: Parts) -> None:
    """Holds that ``tokenizer.json`` itself says what its class makes.

    Raises:
        Foreign: it says something else, so transformers gives other ids than the file.
    """
    if not known.rebuilt:
        return
    model = outline.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        raise Foreign(f"the class {known.name} over a model that is not BPE")
    steps = known.steps(config)
    for step in ("normalizer", "pre_tokenizer", "decoder"):
        if _shape(outline.get(step), decodes=step == "decoder") != _shape(
            steps[step], decodes=step == "decoder"
        ):
            raise Foreign(f"the class {known.name}, which replaces the {step} of tokenizer.json")
    said = {
        "fuse_unk": bool(model.get("fuse_unk")),
        "byte_fallback": bool(model.get("byte_fallback")),
        "unk_token": model.get("unk_token"),
    }
    if said != steps["model"] or any(
        model.get(key)
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    ):
        raise Foreign(f"the class {known.name}, which replaces the model of tokenizer.json")
    processor = outline.get("post_processor") or {"type": "ByteLevel"}
    if not known.keeps_processor and text_in(processor, "type") != "ByteLevel":
        raise Foreign(f"the class {known.name}, which replaces the post_processor")


def text_in(part: Any, key: str) -> Any:
    return part.get(key) if isinstance(part, Mapping) else part


def _shape(part: Any, *, decodes: bool = False) -> str:
    """A step without the keys that change no id, as comparable text."""
    return json.dumps(_bare(part, decodes=decodes), sort_keys=True)


def _bare(part: Any, *, decodes: bool) -> Any:
    if isinstance(part, list):
        return [_bare(inner, decodes=decodes) for inner in part]
    if not isinstance(part, Mapping):
        return part
    bare = {key: _bare(value, decodes=decodes) for key, value in part.items()}
    if part.get("type") == "ByteLevel":
        bare.pop("trim_offsets", None)
        bare.setdefault("use_regex", True)
        if decodes:
            bare = {"type": "ByteLevel"}
    if part.get("type") == "Metaspace" and "prepend_scheme" in part:
        for key in ("add_prefix_space", "str_rep"):
            bare.pop(key, None)
    return bare
