"""What the folder of a model, or a live tokenizer, says of its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from errno import ENOENT, ENOTDIR
from os import PathLike, fspath, strerror
from pathlib import Path
from typing import Any

from dpo_ext.data.templates import choose
from dpo_ext.errors import TokenizerError

MAX_TOKENIZER_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 1 << 20
# How models are called on the hub: `name` or `owner/name`.
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def state_of(
    tokenizer_json: bytes,
    *,
    named: Sequence[tuple[str, str]] = (),
    added: Sequence[tuple[str, bool, bool, bool, bool, bool]] = (),
    ids: tuple[int | None, int | None, int | None] = (None, None, None),
    template: str | None = None,
    tool_template: str | None = None,
) -> dict[str, Any]:
    for name, value in zip(("bos_id", "eos_id", "pad_id"), ids, strict=True):
        if value is not None and not 0 <= value < 2**31:
            raise ValueError(f"`{name}` must be in 0..2**31, found {value}")
    for text in (template, tool_template):
        if text is not None and len(text) > MAX_TEMPLATE_BYTES:
            raise TokenizerError(f"the chat template has more than {MAX_TEMPLATE_BYTES} bytes")
    return {
        "json": tokenizer_json,
        "named": [list(pair) for pair in named],
        "added": [list(token) for token in added],
        "ids": list(ids),
        "template": template,
        "tool_template": tool_template,
    }


def read_bytes(path: Path, most: int) -> bytes:
    size = path.stat().st_size
    if size > most:
        raise TokenizerError(f"{path}: expected at most {most} bytes, found {size}")
    return path.read_bytes()


def _read(path: Path, most: int) -> str:
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: expected UTF-8: {error}") from error


def _token(value: Any, *, special: bool = True) -> tuple[str, bool, bool, bool, bool, bool] | None:
    """(content, lstrip, rstrip, single word, normalized, special) of a token in
    tokenizer_config.json.
    """
    if isinstance(value, str):
        return (value, False, False, False, not special, special)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        flags = (bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word"))
        lstrip, rstrip, single_word = flags
        normalized = bool(value.get("normalized", not special))
        return (value["content"], lstrip, rstrip, single_word, normalized, special)
    return None


def folder_of(source: str | PathLike[str]) -> Path:
    """The folder of a tokenizer, named by itself or by the ``tokenizer.json`` in it.

    Raises:
        FileNotFoundError: there is no such folder, or none with a ``tokenizer.json``.
        NotADirectoryError: it is another file.
    """
    path = Path(source)
    error: OSError
    if path.is_file():
        if path.name == "tokenizer.json":
            return path.parent
        error = NotADirectoryError(ENOTDIR, strerror(ENOTDIR), str(path))
        error.add_note(
            "hint: name the folder of a model, or load this file by Tokenizer.from_file, with the "
            "ids of BOS, EOS and padding"
        )
        raise error
    if path.is_dir() and not (path / "tokenizer.json").exists():
        error = FileNotFoundError(ENOENT, strerror(ENOENT), str(path / "tokenizer.json"))
        error.add_note(
            "hint: AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes it, if "
            "transformers has a Rust backend for this tokenizer"
        )
        raise error
    if not path.exists():
        error = FileNotFoundError(ENOENT, strerror(ENOENT), str(path))
        if HUB_NAME.fullmatch(fspath(source)):
            error.add_note(
                f"hint: nothing is downloaded here; `hf download {path} --include '*token*' "
                "'*.jinja' --local-dir DIR` makes a folder, and Tokenizer.from_pretrained takes "
                "what AutoTokenizer.from_pretrained gives"
            )
        raise error
    return path


def state_of_folder(folder: Path, chosen: str | None) -> dict[str, Any]:
    tokenizer_json = read_bytes(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
    config: dict[str, Any] = {}
    config_file = folder / "tokenizer_config.json"
    if config_file.exists():
        try:
            config = json.loads(_read(config_file, MAX_TOKENIZER_BYTES))
        except ValueError as error:
            raise TokenizerError(f"{config_file}: {error}") from error
        if not isinstance(config, dict):
            raise TokenizerError(f"{config_file}: expected an object")
    named, added = [], []
    extra = [
        *(config.get("extra_special_tokens") or []),
        *(config.get("additional_special_tokens") or []),
    ]
    for name, value in [*((name, config.get(name)) for name in _NAMED), *(("", v) for v in extra)]:
        token = _token(value)
        if token is None:
            continue
        if name:
            named.append((name, token[0]))
        added.append(token)
    # As in transformers, `add_bos_token` changes nothing: tokenizer.json's post-processor wins.
    template_file = folder / "chat_template.jinja"
    templates = config.get("chat_template")
    if template_file.exists():
        templates = _read(template_file, MAX_TEMPLATE_BYTES)
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        if more:
            named_ones = {path.stem: _read(path, MAX_TEMPLATE_BYTES) for path in more}
            templates = {"default": templates} | named_ones
    template, tool_template = choose(templates, chosen)
    return state_of(
        tokenizer_json,
        named=named,
        added=list(dict.fromkeys(added)),
        template=template,
        tool_template=tool_template,
    )


def state_of_live(tokenizer: Any, chosen: str | None) -> dict[str, Any]:
    # A processor of a multi-modal model carries its tokenizer along.
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found = type(tokenizer).__name__
        raise TokenizerError(
            f"expected a folder or a transformers tokenizer with a Rust backend, found {found}"
        )
    named = []
    for name in _NAMED:
        token = getattr(tokenizer, name, None)
        if token is not None:
            named.append((name, str(token)))
    template, tool_template = choose(getattr(tokenizer, "chat_template", None), chosen)
    return state_of(
        backend.to_str().encode(), named=named, template=template, tool_template=tool_template
    )
