"""`Tokenizer`: text and conversations to token ids, in Rust."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpo_ext import _core
from dpo_ext.layout.batch import Ragged
from dpo_ext.errors import DataError, TokenizerError
from dpo_ext.data.templates import Fallback, choose

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_TOKENIZER_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 1 << 20

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """Text to token ids, messages to text; immutable, shared by all threads, and picklable to
    stable bytes.

    Same as the ``transformers`` tokenizer of the same folder: ``encode`` gives its ``input_ids``,
    ``apply_chat_template`` its ``tokenize=False`` text. Read are ``tokenizer.json``,
    ``tokenizer_config.json``, ``chat_template.jinja`` and ``additional_chat_templates/*.jinja``,
    for the template, which runs with limits.

    Attributes:
        engine: what encodes: ``"bpe"``, our own, for byte-level tokenizers whose structure is known
            and whose self-check agrees; else ``"tokenizers"``, the Rust crate. Same ids either way.
        vocab_size: one more than the largest id; every id is below it.
        bos_id, eos_id, pad_id: ids, None if the tokenizer names no such token.
        chat_template: the jinja text, or None.
        notes: what a reader of a report should know, for example ids that no token has.

    Raises:
        TokenizerError: the files are missing, damaged or name unknown tokens.

    >>> tokenizer = Tokenizer.from_file("tokenizer.json", eos_id=0)  # doctest: +SKIP
    >>> tokenizer.encode("Hello")  # doctest: +SKIP
    array([9707], dtype=int32)
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = dict(state)
        ids = self._state["ids"]
        self._fallback = Fallback()
        self._core = _core.Tokenizer(
            self._state["json"],
            [(name, text) for name, text in self._state["named"]],
            [tuple(added) for added in self._state["added"]],
            (ids[0], ids[1], ids[2]),
            self._state["template"],
            self._state["tool_template"],
            self._fallback,
        )

    @classmethod
    def from_file(
        cls,
        tokenizer_json: str | PathLike[str],
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | None = None,
    ) -> Tokenizer:
        """The tokenizer of one ``tokenizer.json``, which names neither BOS, EOS nor padding: say
        them here.

        Without ``eos_id`` no EOS is appended to text rows; without ``pad_id`` batches are padded
        with 0 under a zero mask.

        Raises:
            FileNotFoundError: no such file.  TokenizerError: it is damaged, or an id is outside its
                vocabulary.
        """
        return cls(
            _state(
                _read_bytes(Path(tokenizer_json), MAX_TOKENIZER_BYTES),
                ids=(bos_id, eos_id, pad_id),
                template=chat_template,
            )
        )

    @classmethod
    def from_pretrained(cls, source: Any, *, chat_template: str | None = None) -> Tokenizer:
        """The tokenizer of a model's folder, or of a live ``transformers`` tokenizer.

        A live one is taken as it is now: its backend's JSON, its template and its named tokens,
            whatever was changed
        since it was loaded. A folder needs ``tokenizer.json``; nothing is downloaded.

        Args:
            source: the folder, the live tokenizer, or a :class:`Tokenizer`, which is given back.
            chat_template: the name of one of several templates, or the text of another one. By
                default, of several named templates ``tool_use`` serves conversations with tools
                and ``default`` the others, as in ``transformers``.

        Raises:
            FileNotFoundError: the folder has no ``tokenizer.json``.  TokenizerError: a file is
                damaged, or a live
            tokenizer has no Rust backend.
        """
        if isinstance(source, cls):
            if chat_template is None:
                return source
            return cls(source._state | {"template": chat_template, "tool_template": None})
        if isinstance(source, str | PathLike):
            return cls(_from_folder(Path(source), chat_template))
        return cls(_from_live(source, chat_template))

    @property
    def engine(self) -> Literal["bpe", "tokenizers"]:
        return "bpe" if self._core.refusal is None else "tokenizers"

    @property
    def vocab_size(self) -> int:
        return self._core.vocab_size

    @property
    def bos_id(self) -> int | None:
        return self._core.bos_id

    @property
    def eos_id(self) -> int | None:
        return self._core.eos_id

    @property
    def pad_id(self) -> int | None:
        return self._core.pad_id

    @property
    def chat_template(self) -> str | None:
        return self._state["template"]

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self._fallback.note is not None:
            notes.append(self._fallback.note)
        if self._core.refusal is not None:
            notes.append(f"the engine is `tokenizers`, several times slower: {self._core.refusal}")
        if self._core.gaps:
            notes.append(
                f"the tokenizer has {self._core.gaps} ids below vocab_size without a token"
            )
        if self.eos_id is None:
            notes.append("the tokenizer names no EOS: none is appended to text rows")
        if self.pad_id is None:
            notes.append(
                "the tokenizer names no padding: batches are padded with 0 under a zero mask"
            )
        return tuple(notes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> NDArray[np.int32]:
        """The ids of ``text``, (n,) int32; with ``add_special_tokens`` also what the post-processor
        puts around them.

        Raises:
            DataError: the text holds a lone surrogate.
        """
        return self._core.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int] | NDArray[np.int32]) -> str:
        """The text of ``ids``, control tokens spelt out.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        return self._core.decode(np.ascontiguousarray(ids, np.int32))

    def to_json(self) -> str:
        """The text of tokenizer.json, as it was read."""
        return self._state["json"].decode()

    def encode_batch(
        self,
        texts: Any,
        *,
        add_special_tokens: bool = True,
        threads: int | None = None,
    ) -> Ragged:
        """Same as ``[encode(text) for text in texts]``, on ``threads`` threads and without the GIL.

        Args:
            texts: an iterable of str; or a column of Arrow strings (``string``, ``large_string``,
                ``string_view``, or a dictionary of them): a pyarrow Array or ChunkedArray, or
                whatever has ``__arrow_c_array__`` or ``__arrow_c_stream__``, such as a polars
                Series. No Python object is made of its rows; pyarrow must be installed.
            threads: None for as many as the process may use.

        Returns:
            Ragged: ``values`` int32, ``offsets`` (n + 1,) int64.

        Raises:
            DataError: a text holds a lone surrogate, a row of the column is null or not UTF-8.
            TypeError: anything but strings.
        """
        if isinstance(texts, str):
            raise TypeError("`texts` must be an iterable of strings, found one string")
        if hasattr(texts, "__arrow_c_stream__") or hasattr(texts, "__arrow_c_array__"):
            values, offsets = self._core.encode_arrow(
                _arrow_buffers(texts), add_special_tokens, default_threads(threads)
            )
            return Ragged(values, offsets)
        values, offsets = self._core.encode_batch(
            texts, add_special_tokens, default_threads(threads)
        )
        return Ragged(values, offsets)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation, byte for byte ``transformers``'
        ``apply_chat_template(tokenize=False)``.

        ``kwargs`` are further variables of the template, such as ``tools`` or ``enable_thinking``.

        Raises:
            TokenizerError: there is no template, or it refuses the conversation.
            DataError: a value cannot be passed to a template.
        """
        before = self._fallback.construct
        text = self._core.apply_chat_template(messages, add_generation_prompt, kwargs, local_time())
        if before is None and self._fallback.note is not None:
            warnings.warn(self._fallback.note, RuntimeWarning, stacklevel=2)
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        # One canonical bytes object: pickling the state itself would depend on which strings happen
        # to be one object.
        state = {**self._state, "json": self.to_json()}
        return _restore, (json.dumps(state, sort_keys=True, ensure_ascii=True).encode(),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._state == other._state

    def __hash__(self) -> int:
        return hash((self._state["json"], self._state["template"]))

    def __repr__(self) -> str:
        return f"Tokenizer(engine={self.engine!r}, vocab_size={self.vocab_size})"


def _arrow_buffers(texts: Any) -> list[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """The bytes and the offsets of each chunk of a column of Arrow strings."""
    import pyarrow as pa

    if isinstance(texts, pa.Array):
        texts = pa.chunked_array([texts])
    elif hasattr(texts, "__arrow_c_stream__"):
        if not isinstance(texts, pa.ChunkedArray):
            texts = pa.chunked_array(texts)
    else:
        texts = pa.chunked_array([pa.array(texts)])
    kind = texts.type.value_type if pa.types.is_dictionary(texts.type) else texts.type
    if not any(is_kind(kind) for is_kind in _arrow_strings()):
        raise TypeError(f"`texts` must be strings, found a column of {texts.type}")
    buffers, before = [], 0
    for chunk in texts.chunks:
        if chunk.null_count:
            row = before + chunk.is_null().index(True).as_py() + 1
            raise DataError(
                f"row {row}: expected a string, found null", line=row, reason="wrong_type"
            )
        before += len(chunk)
        if len(chunk):
            chunk = chunk.cast(pa.large_string())
            _, offsets, data = chunk.buffers()
            places = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            bytes_ = np.frombuffer(b"" if data is None else data, np.uint8)
            buffers.append((bytes_, places))
    return buffers


def _arrow_strings() -> tuple[Any, ...]:
    from pyarrow import types

    return types.is_string, types.is_large_string, types.is_string_view


def _restore(state: bytes) -> Tokenizer:
    loaded = json.loads(state)
    return Tokenizer({**loaded, "json": loaded["json"].encode()})


def _state(
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


def _read_bytes(path: Path, most: int) -> bytes:
    size = path.stat().st_size
    if size > most:
        raise TokenizerError(f"{path}: expected at most {most} bytes, found {size}")
    return path.read_bytes()


def _read(path: Path, most: int) -> str:
    try:
        return _read_bytes(path, most).decode()
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


def _from_folder(folder: Path, chosen: str | None) -> dict[str, Any]:
    tokenizer_json = _read_bytes(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
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
    return _state(
        tokenizer_json,
        named=named,
        added=list(dict.fromkeys(added)),
        template=template,
        tool_template=tool_template,
    )


def _from_live(tokenizer: Any, chosen: str | None) -> dict[str, Any]:
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
    return _state(
        backend.to_str().encode(), named=named, template=template, tool_template=tool_template
    )


def local_time() -> tuple[int, int, int, int, int, int, int, int]:
    """What templates see as now, taken once a data set."""
    t = datetime.now().timetuple()
    return (t.tm_year, t.tm_mon, t.tm_mday, t.tm_hour, t.tm_min, t.tm_sec, t.tm_wday, t.tm_yday)


def default_threads(threads: int | None) -> int | None:
    """``threads``, or 1 inside a worker of torch's DataLoader, where all cores are taken
    already.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"`threads` must be at least 1, found {threads}")
        return threads
    data = sys.modules.get("torch.utils.data")
    if data is not None and data.get_worker_info() is not None:
        return 1
    return None
