"""What the folder of a model, or a live tokenizer, says of its tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from errno import ENOENT, ENOTDIR
from os import PathLike, fspath, strerror
from pathlib import Path
from typing import Any

from dpo_ext import _core
from dpo_ext.data.classes import Foreign, check_steps, class_of
from dpo_ext.data.special import Token, special_tokens
from dpo_ext.data.templates import choose
from dpo_ext.errors import TokenizerError
from dpo_ext.extras import install, need

MAX_TOKENIZER_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 1 << 20
# How models are called on the hub: `name` or `owner/name`.
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Vocabularies that only transformers turns into a tokenizer.
VOCABULARIES = ("*.model", "*.model.v*", "tekken.json", "*.tiktoken", "vocab.json", "vocab.txt")
# Those that transformers takes for any class.
_ANY_CLASS = ("tekken.json", "tokenizer.model*", "tiktoken.model")
# What a class written in Python might change of its backend's ids.
SAMPLE = (
    "",
    " ",
    "Hello, World!  it's\t2024\n\n",
    " leading and trailing ",
    "\u00c9cole na\u00efve \u4e2d\u6587 \ud55c\uad6d\uc5b4 \U0001f642\u200d\u2642",
    "a\u0301 \ufb01 \u2167 \u0130 <s></s> <unk> <mask> [CLS] <|endoftext|>x",
    "x = f(a)\r\n    return 1000000\u00a0\u3000end",
)
_ENCODE = ("__call__", "_encode_plus", "_batch_encode_plus", "_call_one", "encode")


def state_of(
    tokenizer_json: bytes,
    *,
    named: Sequence[tuple[str, str]] = (),
    added: Sequence[Token] = (),
    split_special: bool = False,
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
        if text is not None and not _is_unicode(text):
            raise TokenizerError("the chat template has a lone surrogate")
    return {
        "json": tokenizer_json,
        "named": [list(pair) for pair in named],
        "added": [list(token) for token in added],
        "split_special": split_special,
        "ids": list(ids),
        "template": template,
        "tool_template": tool_template,
        "read_by": None,
    }


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


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


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        read = json.loads(_read(path, MAX_TOKENIZER_BYTES))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: {error}") from error
    if not isinstance(read, dict):
        raise TokenizerError(f"{path}: expected an object")
    return read


def folder_of(source: str | PathLike[str]) -> Path:
    """The folder of a tokenizer, named by itself or by the ``tokenizer.json`` in it.

    Raises:
        FileNotFoundError: there is no such folder, or none with a vocabulary.
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
    if path.is_dir() and not (path / "tokenizer.json").exists() and _vocabulary(path) is None:
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


def _vocabulary(folder: Path) -> Path | None:
    return next((path for name in VOCABULARIES for path in sorted(folder.glob(name))), None)


def state_of_folder(folder: Path, chosen: str | None) -> dict[str, Any]:
    """What a folder says, through transformers where our loader does not know all of it."""
    try:
        return _known_folder(folder, chosen)
    except Foreign as foreign:
        return _through_transformers(folder, chosen, str(foreign))


def _known_folder(folder: Path, chosen: str | None) -> dict[str, Any]:
    config = _read_object(folder / "tokenizer_config.json") or {}
    model = _read_object(folder / "config.json") or {}
    if not (folder / "tokenizer.json").exists():
        vocabulary = _vocabulary(folder)
        raise Foreign(f"`{vocabulary and vocabulary.name}` without a tokenizer.json")
    tokenizer_json = read_bytes(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
    known = class_of(
        config,
        model,
        has_byte_level=b'"ByteLevel"' in tokenizer_json,
        has_tekken=(folder / "tekken.json").exists(),
    )
    outline = json.loads(_core.tokenizer_outline(tokenizer_json))
    check_steps(known, outline, config)
    special = special_tokens(
        known,
        config,
        outline,
        _read_object(folder / "special_tokens_map.json"),
        _read_object(folder / "added_tokens.json"),
    )
    # As in transformers, `add_bos_token` changes nothing: tokenizer.json's post-processor wins.
    template, tool_template = choose(_templates(folder, config), chosen)
    return state_of(
        tokenizer_json,
        named=special.named,
        added=special.added,
        split_special=special.split,
        template=template,
        tool_template=tool_template,
    )


def _templates(folder: Path, config: Mapping[str, Any]) -> Any:
    files = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if (folder / "chat_template.jinja").exists():
        files.insert(0, folder / "chat_template.jinja")
    texts = {
        "default" if path.parent == folder else path.stem: _read(path, MAX_TEMPLATE_BYTES)
        for path in files
    }
    if not texts:
        return config.get("chat_template")
    return texts["default"] if set(texts) == {"default"} else texts


def _through_transformers(folder: Path, chosen: str | None, why: str) -> dict[str, Any]:
    try:
        transformers = need("transformers", f"{folder}: {why}")
    except ModuleNotFoundError as error:
        raise TokenizerError(
            f"{folder}: only transformers knows {why}\nhint: {install('hf')}"
        ) from error
    by = f"transformers {transformers.__version__}"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a class of theirs raises
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise TokenizerError(
            f"{folder}: only transformers knows {why}, and {by} does not load it: {said}\n"
            "hint: a vocabulary of SentencePiece or tiktoken needs the package of that name; code "
            "of the folder never runs here, but Tokenizer.from_pretrained takes what AutoTokenizer "
            "gives"
        ) from error
    if not (folder / "tokenizer.json").exists() and not _reads(tokenizer, folder):
        found = type(tokenizer).__name__
        raise TokenizerError(
            f"{folder}: only transformers knows {why}, and its {found} reads no file of it\n"
            "hint: name the class in tokenizer_config.json"
        )
    state = state_of_live(tokenizer, chosen, sample=True)
    return state | {"read_by": f"{by}, which alone knows {why}"}


def _reads(tokenizer: Any, folder: Path) -> bool:
    """Whether a folder has a file of its class; without one transformers makes up a vocabulary."""
    names = [name for name in tokenizer.vocab_files_names.values() if name]
    return any(next(folder.glob(name), None) for name in (*names, *_ANY_CLASS))


def state_of_live(tokenizer: Any, chosen: str | None, *, sample: bool = False) -> dict[str, Any]:
    """What a live tokenizer says; with ``sample`` its ids are compared with its backend's."""
    # A processor of a multi-modal model carries its tokenizer along.
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found = type(tokenizer).__name__
        raise TokenizerError(
            f"expected a folder or a transformers tokenizer with a Rust backend, found {found}"
        )
    if sample or _encodes_itself(type(tokenizer)):
        _check_backend(tokenizer, backend)
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    if split:
        _check_special(backend)
    # Under transformers 4 a list stands there too, which templates of 5 do not see.
    named = {
        name: str(token)
        for name, token in tokenizer.special_tokens_map.items()
        if not isinstance(token, list | tuple)
    }
    ids = [
        tokenizer.convert_tokens_to_ids(named[name]) if name in named else None
        for name in ("bos_token", "eos_token", "pad_token")
    ]
    template, tool_template = choose(getattr(tokenizer, "chat_template", None), chosen)
    return state_of(
        backend.to_str().encode(),
        named=list(named.items()),
        split_special=split,
        ids=(ids[0], ids[1], ids[2]),
        template=template,
        tool_template=tool_template,
    )


def _encodes_itself(kind: type) -> bool:
    """Whether a class has its own way to encode, above the one that only calls the backend."""
    for above in kind.__mro__:
        if "backend_tokenizer" in vars(above):
            return False
        if any(name in vars(above) for name in _ENCODE):
            return True
    return True


def _check_backend(tokenizer: Any, backend: Any) -> None:
    found = type(tokenizer).__name__
    for text in SAMPLE:
        try:
            want = list(tokenizer(text)["input_ids"])
        except Exception as error:  # whatever a class of theirs raises
            said = f"{type(error).__name__}: {error}"
            raise TokenizerError(f"{found} does not encode a text alone: {said}") from error
        got = backend.encode(text).ids
        if got != want:
            raise TokenizerError(
                f"{found} does more than its Rust backend: {text!r} gives {want}, the backend {got}"
            )


def _check_special(backend: Any) -> None:
    """Holds that what the backend leaves as text is what its JSON calls special: it does not
    forget that a token was special once.
    """
    copy = type(backend).from_str(backend.to_str())
    was, copy.encode_special_tokens = backend.encode_special_tokens, True
    backend.encode_special_tokens = True
    try:
        for token in backend.get_added_tokens_decoder().values():
            text = token.content
            if not token.special and backend.encode(text).ids != copy.encode(text).ids:
                raise TokenizerError(
                    f"`split_special_tokens`: {text!r} was special once and is not now, which no "
                    "tokenizer.json can say"
                )
    finally:
        backend.encode_special_tokens = was
