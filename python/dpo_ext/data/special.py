"""Which tokens a folder names and adds, as transformers 5 reads them of its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dpo_ext.data.classes import Foreign, Known, words

NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
EXTRA, OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_SPECIFIC = "model_specific_special_tokens"
_DECODER = "added_tokens_decoder"
# Keys of tokenizer_config.json that are read here and in `classes`, and those that change no id of
# a class that we know.
_KEYS = words(f"""
    {EXTRA} {OLD_EXTRA} {_SPECIFIC} {_DECODER} add_bos_token add_eos_token add_prefix_space legacy
    chat_template split_special_tokens tokenizer_class
    backend bos_token_id chat_control_tokens clean_up_tokenization_spaces
    clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output do_basic_tokenize
    do_lower_case eos_token_id errors from_slow is_local keep_accents local_files_only lowercase
    max_len max_length merges_file model_input_names model_max_length name_or_path never_split
    pad_to_multiple_of pad_token_id pad_token_type_id padding padding_side processor_class
    remove_space response_schema response_template return_token_type_ids sp_model_kwargs
    spaces_between_special_tokens special_tokens_map_file stride strip_accents
    tokenize_chinese_chars tokenizer_file trim_offsets truncation truncation_side
    truncation_strategy unk_token_id use_default_system_prompt use_fast verbose vocab_file
    """)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Token(NamedTuple):
    """``tokenizers.AddedToken``; None for a flag that nobody said."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None
    special: bool = False

    def settled(self) -> Token:
        """With ``normalized`` as the crate takes it."""
        normalized = not self.special if self.normalized is None else self.normalized
        return self._replace(normalized=normalized)


class Special(NamedTuple):
    """What a folder says of its tokens.

    Attributes:
        named: name and text, as templates know them.
        added: tokens beside those of tokenizer.json, in order; one that is there takes the flags.
        split: whether text that spells a special token stays text.
    """

    named: list[tuple[str, str]]
    added: list[Token]
    split: bool


def special_tokens(
    known: Known,
    config: Mapping[str, Any],
    outline: Mapping[str, Any],
    special_map: Mapping[str, Any] | None,
    added_ids: Mapping[str, Any] | None,
) -> Special:
    """The tokens of a folder.

    Same as those of ``AutoTokenizer.from_pretrained`` of transformers 5.24
    (``PreTrainedTokenizerBase._from_pretrained`` and both ``__init__``), step by step.

    Args:
        known: its class.
        config: tokenizer_config.json.
        outline: tokenizer.json without its vocabulary.
        special_map: special_tokens_map.json, or None.
        added_ids: added_tokens.json, or None.

    Raises:
        Foreign: a key or a value that is read by no rule known here.
    """
    for key in config:
        if key not in _KEYS and not key.endswith("_token"):
            raise Foreign(f"`{key}` in tokenizer_config.json")
    split = config.get("split_special_tokens", False)
    if not isinstance(split, bool):
        raise Foreign("a `split_special_tokens` that is no bool")
    said = dict(config)
    if OLD_EXTRA in said and not said.get(EXTRA):
        said[EXTRA] = said.pop(OLD_EXTRA)
    specific: dict[str, Any] = {
        key: said.pop(key)
        for key in list(said)
        if key not in NAMED and key.endswith("_token") and isinstance(said[key], str)
    }
    if isinstance(said.get(EXTRA), Mapping):
        specific |= said.pop(EXTRA)
    specific = specific or dict(_mapping(said.get(_SPECIFIC) or {}, _SPECIFIC))

    in_file = [_token(token) for token in _list(outline.get("added_tokens"), "added_tokens")]
    decoder: dict[int, Token] = {}
    if _DECODER in said:
        for index, token in _mapping(said[_DECODER], _DECODER).items():
            decoder[_index(index)] = _token(token)
    else:
        _read_map(special_map or {}, said, specific)
        special = {_spelt(said[key]) for key in NAMED if said.get(key)}
        special |= {_spelt(token) for token in _list(said.get(EXTRA) or [], EXTRA)}
        for text, index in (added_ids or {}).items():
            is_special = text in special
            decoder[_index(index)] = Token(text, normalized=not is_special, special=is_special)
        for token, written in zip(in_file, outline["added_tokens"], strict=True):
            decoder[_index(written.get("id"))] = token
    of_text = {token.content: token for token in decoder.values()}

    values: dict[str, Any] = {key: _named(value) for key, value in said.items() if key in NAMED}
    values = {key: of_text.get(spelling(value), value) for key, value in values.items()}
    values = {**known.tokens, **values}
    padding = outline.get("padding")
    if isinstance(padding, Mapping) and "pad_token" not in values:
        values["pad_token"] = _named(padding.get("pad_token"))
    names: dict[str, Token | str | None] = {name: values.get(name) for name in NAMED}
    for key, value in said.items():
        if key not in NAMED and key.endswith("_token") and isinstance(value, str | Mapping | Token):
            names[key] = _named(value)
    for key, value in specific.items():
        names[key] = _named(value)
        if names[key] is None:
            raise Foreign(f"`{key}` without a text")
    extra = said[EXTRA] if EXTRA in said else said.get(OLD_EXTRA)
    extras = [_said(token) for token in _list(extra or [], EXTRA)]
    texts = {name: spelling(token) for name, token in names.items() if token is not None}
    spelt = {*texts.values(), *map(spelling, extras), *of_text}
    if "" in spelt:
        raise Foreign("a token without any text")
    if any("\ud800" <= char <= "\udfff" for char in "".join(spelt)):
        raise Foreign("a token with a lone surrogate")

    there = [] if known.rebuilt else in_file
    if known.rebuilt:
        _check_order(known, in_file, decoder)
    settled = {token.settled() for token in there}
    more: list[Token | str] = [
        token for _, token in sorted(decoder.items()) if token.settled() not in settled
    ]
    taken = {token.content for token in there} | {spelling(token) for token in more}
    for value in [*names.values(), *extras]:
        if value is not None and spelling(value) not in taken and value not in more:
            more.append(value)
    added = []
    for token in more:
        if isinstance(token, str):
            added.append(Token(token, special=True))
        elif token.content in texts.values():
            added.append(token._replace(special=True))
        else:
            added.append(token)
    if known.plain_names:
        plain = [*texts.values(), *map(spelling, extras)]
        added += [Token(text, special=True) for text in dict.fromkeys(plain)]
    # The crate forgets what it was told of a token but not that it was special.
    specials = {token.content for token in in_file if token.special}
    last = {token.content: token.special for token in added}
    if split and any(not special and text in specials for text, special in last.items()):
        raise Foreign("`split_special_tokens` with a token that is special in tokenizer.json alone")
    return Special(list(texts.items()), [token.settled() for token in added], split)


def spelling(token: Token | str | None) -> str:
    return token.content if isinstance(token, Token) else token or ""


def _read_map(
    special_map: Mapping[str, Any], said: dict[str, Any], specific: dict[str, Any]
) -> None:
    """special_tokens_map.json over tokenizer_config.json, which has no added_tokens_decoder."""
    for key, value in special_map.items():
        if key in (EXTRA, OLD_EXTRA):
            if key == EXTRA and isinstance(value, list):
                known = list(_list(said.get(EXTRA) or [], EXTRA))
                for token in value:
                    made = _token({**token, "special": True}) if _is_map(token) else token
                    known += [made] if made not in known else []
                value = known
        elif not key.endswith("_token") or key in ("add_bos_token", "add_eos_token"):
            raise Foreign(f"`{key}` in special_tokens_map.json")
        elif isinstance(value, Mapping):
            value = _token({**value, "special": True})
        elif not isinstance(value, str | None):
            raise Foreign(f"`{key}` in special_tokens_map.json")
        said[key] = value
    if isinstance(said.get(EXTRA), Mapping):
        specific |= said.pop(EXTRA)


def _check_order(known: Known, in_file: list[Token], decoder: Mapping[int, Token]) -> None:
    """Holds that the tokens which the class adds itself begin with those of the file, so that each
    has the file's id.
    """
    own = [token for _, token in sorted(decoder.items())]
    head = own[: len(in_file)]
    texts = [token.content for token in own]
    if [token.content for token in head] != [token.content for token in in_file]:
        raise Foreign(f"the class {known.name}, which does not add the tokens of tokenizer.json")
    if len(set(texts)) < len(texts):
        raise Foreign("a token that is added twice")


def _spelt(value: Any) -> str:
    """What transformers compares with added_tokens.json, which is read before objects become
    tokens.
    """
    return spelling(value) if isinstance(value, str | Token) else ""


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Foreign(f"`{what}` that is no object")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise Foreign(f"`{what}` that is no list")
    return value


def _index(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise Foreign(f"an id that is no number: {value!r}") from None


def _token(value: Any) -> Token:
    """``AddedToken(**value)``."""
    if isinstance(value, Token):
        return value
    fields = {key: part for key, part in _mapping(value, _DECODER).items() if key != "id"}
    content = fields.pop("content", None)
    if not isinstance(content, str) or _unlike(fields.items()):
        raise Foreign(f"a token with other fields: {value!r}")
    return Token(content, **fields)


def _unlike(fields: Iterable[tuple[str, Any]]) -> bool:
    return any(key not in _FLAGS or not isinstance(part, bool) for key, part in fields)


def _said(value: Any) -> Token | str:
    """A text, or an object of the type AddedToken."""
    if isinstance(value, str | Token):
        return value
    if not isinstance(value, Mapping) or value.get("__type") != "AddedToken":
        raise Foreign(f"a token that is neither text nor an AddedToken: {value!r}")
    return _token({key: part for key, part in value.items() if key != "__type"})


def _named(value: Any) -> Token | str | None:
    return None if value is None else _said(value)
