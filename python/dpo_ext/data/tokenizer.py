"""`Tokenizer`: text and conversations to token ids, in Rust."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dpo_ext import _core
from dpo_ext.data.options import default_threads, local_time
from dpo_ext.data.pretrained import (
    MAX_TOKENIZER_BYTES,
    folder_of,
    read_bytes,
    state_of,
    state_of_folder,
    state_of_live,
)
from dpo_ext.data.tables import text_buffers
from dpo_ext.data.templates import Fallback
from dpo_ext.pairs import Ragged

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_NAMED = 8  # tokens in a note


class Tokenizer:
    """Text to token ids, messages to text; immutable, shared by all threads, and picklable to
    stable bytes.

    Same as the ``transformers`` tokenizer of the same folder: ``encode`` gives its ``input_ids``,
    ``apply_chat_template`` its ``tokenize=False`` text, by templates that run with limits.
    :meth:`from_pretrained` says what is read.

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
            self._state.get("split_special", False),  # pickles of before have none
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
            state_of(
                read_bytes(Path(tokenizer_json), MAX_TOKENIZER_BYTES),
                ids=(bos_id, eos_id, pad_id),
                template=chat_template,
            )
        )

    @classmethod
    def from_pretrained(cls, source: Any, *, chat_template: str | None = None) -> Tokenizer:
        """The tokenizer of a model's folder, or of a live ``transformers`` tokenizer.

        Same as ``AutoTokenizer.from_pretrained(folder)`` of transformers 5.24. Read are
        ``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json`` and
        ``added_tokens.json`` (where there is no ``added_tokens_decoder``), the ``model_type`` of
        ``config.json``, ``chat_template.jinja`` and ``additional_chat_templates/*.jinja``. A class
        or a key that changes ids in a way not known here, or a vocabulary without a
        ``tokenizer.json``, goes through transformers, if it is installed; :attr:`notes` says so.
        Nothing is downloaded, and no code of the folder runs.

        A live one is taken as it is now: its backend's JSON, its template, its named tokens and
        its ``split_special_tokens``, whatever was changed since it was loaded.

        Args:
            source: the folder, or the ``tokenizer.json`` in it; the live tokenizer; or a
                :class:`Tokenizer`, which is given back.
            chat_template: the name of one of several templates, or the text of another one. By
                default, of several named templates ``tool_use`` serves conversations with tools
                and ``default`` the others, as in ``transformers``.

        Raises:
            FileNotFoundError: the folder has no vocabulary.  NotADirectoryError: a file of another
                name.  TokenizerError: a file is damaged; only transformers knows the folder, and
                it is not installed or does not load it; a live tokenizer has no Rust backend or
                does more than that.
        """
        if isinstance(source, cls):
            if chat_template is None:
                return source
            return source.with_chat_template(chat_template)
        if isinstance(source, str | PathLike):
            return cls(state_of_folder(folder_of(source), chat_template))
        return cls(state_of_live(source, chat_template))

    def with_chat_template(self, chat_template: str) -> Tokenizer:
        """The same tokenizer with the text of another template, for conversations of every kind."""
        return Tokenizer(self._state | {"template": chat_template, "tool_template": None})

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
    def chat_templates(self) -> tuple[str, ...]:
        """All templates that conversations may be rendered by: with tools another one may serve."""
        templates = (self._state["template"], self._state["tool_template"])
        return tuple(text for text in templates if text is not None)

    @property
    def notes(self) -> tuple[str, ...]:
        notes = []
        if self._state["read_by"] is not None:
            notes.append(f"the tokenizer was read by {self._state['read_by']}")
        if self._fallback.note is not None:
            notes.append(self._fallback.note)
        if self._core.refusal is not None:
            notes.append(f"the engine is `tokenizers`, several times slower: {self._core.refusal}")
        if self._core.gaps:
            notes.append(
                f"the tokenizer has {self._core.gaps} ids below vocab_size without a token"
            )
        if self._core.merged:
            some = ", ".join(self._core.merged[:MOST_NAMED])
            more = len(self._core.merged) - MOST_NAMED
            notes.append(
                "control tokens that are ordinary merges, too, so that their spelling gives them "
                f"even as text: {some}" + (f" and {more} more" if more > 0 else "")
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
                text_buffers(texts), add_special_tokens, default_threads(threads)
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


def _restore(state: bytes) -> Tokenizer:
    loaded = json.loads(state)
    return Tokenizer({**loaded, "json": loaded["json"].encode()})


def checked_tokenizer(tokenizer: Any) -> Tokenizer:
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"`tokenizer` must be a dpo_ext.Tokenizer, found {type(tokenizer).__name__}\n"
            "hint: use Tokenizer.from_pretrained(tokenizer)"
        )
    return tokenizer
