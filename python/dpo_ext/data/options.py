"""The options of a data set: `Limits`, and what `from_files` and its kin take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime
from difflib import get_close_matches
from os import PathLike
from typing import Any, Literal, TypedDict

from dpo_ext.errors import DataError

Truncation = Literal["keep_start", "keep_end", "keep_completions", "drop", "error"]
Boundary = Literal["joint", "separate", "trl"]
OnBad = Literal["error", "skip"]
SpecialTokensInText = Literal["special", "text", "error"]
Images = Literal["error", "ignore"]
OnUseless = Literal["drop", "keep"]
EmptyThink = Literal["completion", "prompt"]
TrainOn = Literal["completion", "last", "assistant"]
LayoutOfRows = Literal[
    "explicit",
    "implicit",
    "completions",
    "ids",
    "ultrafeedback",
    "messages",
    "sharegpt",
    "alpaca",
    "question",
    "swift",
]
OF_PAIRS = ("implicit", "swift")  # layouts that need two sides
Paths = str | PathLike[str] | Sequence[str | PathLike[str]]
Progress = bool | Callable[[int, int], Any]

# Also what the command line says, in its own spelling.
SKIP_HINT = 'hint: on_bad="skip" drops bad rows and counts them'
DEEPEST = 1024
# These limits are of a whole file, which `on_bad` does not pass over.
OF_FILES = ("max_expansion", "max_unpacked_bytes", "zstd_window")
# Of TRL's layouts, in the order in which Rust asks for them.
FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "tools",
    "chat_template_kwargs",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_weights",
    "rejected_weights",
)


@dataclass(frozen=True)
class Limits:
    """Sizes beyond which input is refused with :class:`LimitExceeded`, whose ``field`` names the
    limit.

    A row over one of the first six is a bad row with the reason ``limit``; a file over one of the
    last two is a bad input, raised whatever ``on_bad`` says, as is a zstd frame that asks for a
    window above 2**27 bytes (``zstd_window``, fixed).

    Attributes:
        max_line_bytes: of one line of text, or one element of a JSON array; of one row of CSV,
            where it is a bad input. A file without line ends costs at most about twice this
            in memory.
        max_rendered_bytes: of one rendered conversation; a template is somebody else's code.
        max_depth: nesting of a row's JSON, also in fields that nobody reads; at most 1024.
        max_keys: of one JSON object.
        max_messages: of one conversation.
        max_row_tokens: of one side with its prompt, before truncation.
        max_expansion: unpacked bytes for each byte of a compressed file, looked at after 64 MiB.
            Real data has 3 to 10, a gzip bomb 1,030, a zstd bomb 32,500.
        max_unpacked_bytes: of one file's text; None for no limit.
    """

    max_line_bytes: int = 16 << 20
    max_rendered_bytes: int = 16 << 20
    max_depth: int = 64
    max_keys: int = 1024
    max_messages: int = 4096
    max_row_tokens: int = 1 << 20
    max_expansion: int = 200
    max_unpacked_bytes: int | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and value < 1:
                raise ValueError(f"`{f.name}` must be at least 1, found {value}")
        if self.max_depth > DEEPEST:
            raise ValueError(f"`max_depth` must be at most {DEEPEST}, found {self.max_depth}")


def local_time(moment: datetime | None = None) -> tuple[int, int, int, int, int, int, int, int]:
    """What templates see as now, taken once a data set."""
    t = (moment or datetime.now()).timetuple()
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


class SharedOptions(TypedDict, total=False):
    """What every way into a data set takes, of pairs or of single completions."""

    max_length: int | None
    truncation: Truncation
    boundary: Boundary
    on_bad: OnBad
    special_tokens_in_text: SpecialTokensInText
    prompt_key: str | None
    columns: Sequence[str]
    ignore_columns: Sequence[str]
    layout_of_rows: LayoutOfRows | None
    images: Images
    keep_nulls: bool
    chat_template_kwargs: Mapping[str, Any] | None
    on_useless: OnUseless
    empty_think: EmptyThink
    now: datetime | None
    limits: Limits | None
    threads: int | None


class Options(SharedOptions, total=False):
    """What every way into pairs takes, as `PairDataset.from_files` documents it."""

    chosen_key: str | None
    rejected_key: str | None
    train_on: TrainOn


class UnpairedOptions(SharedOptions, total=False):
    """What every way into single completions takes, as `UnpairedDataset.from_files` documents
    it.
    """

    completion_key: str
    label_key: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The :class:`Options`, or with a ``label_key`` the :class:`UnpairedOptions`, checked, with
    their defaults; Rust reads them by attribute.
    """

    max_length: int | None = 1024
    truncation: Truncation = "keep_start"
    boundary: Boundary = "joint"
    on_bad: OnBad = "error"
    special_tokens_in_text: SpecialTokensInText = "special"
    prompt_key: str | None = None
    chosen_key: str | None = None
    rejected_key: str | None = None
    label_key: str | None = None
    columns: tuple[str, ...] = ()
    ignore_columns: tuple[str, ...] = ()
    layout_of_rows: LayoutOfRows | None = None
    images: Images = "error"
    keep_nulls: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    on_useless: OnUseless = "drop"
    empty_think: EmptyThink = "completion"
    train_on: TrainOn = "completion"
    limits: Limits = field(default_factory=Limits)
    threads: int | None = None
    now: tuple[int, ...] = field(default_factory=local_time)

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"`max_length` must be at least 1 or None, found {self.max_length}")
        choices = {
            "truncation": Truncation,
            "boundary": Boundary,
            "on_bad": OnBad,
            "special_tokens_in_text": SpecialTokensInText,
            "images": Images,
            "on_useless": OnUseless,
            "empty_think": EmptyThink,
            "train_on": TrainOn,
            "layout_of_rows": LayoutOfRows,
        }
        for name, literal in choices.items():
            value, known = getattr(self, name), literal.__args__  # type: ignore[attr-defined]
            if value not in known and not (name == "layout_of_rows" and value is None):
                raise ValueError(
                    f"unknown `{name}` {value!r}: there is {', '.join(map(repr, known))}"
                )
        if self.special_tokens_in_text == "text" and self.boundary == "trl":
            raise ValueError(
                '`special_tokens_in_text="text"` needs `boundary` "joint" or "separate": '
                "TRL has no such rule"
            )
        self._check_keys()
        if self.prompt_key is not None and self.layout_of_rows not in (None, "explicit"):
            raise ValueError(
                '`prompt_key` names a field of `layout_of_rows` "explicit", found '
                f"{self.layout_of_rows!r}"
            )
        if not isinstance(self.chat_template_kwargs, Mapping):
            found = type(self.chat_template_kwargs).__name__
            raise TypeError(f"`chat_template_kwargs` must be a dict, found {found}")
        self._check_columns()
        self._check_ignored()
        object.__setattr__(self, "threads", default_threads(self.threads))

    @property
    def is_unpaired(self) -> bool:
        """Whether rows hold single completions."""
        return self.label_key is not None

    def _check_keys(self) -> None:
        keys = (self.prompt_key, self.chosen_key, self.rejected_key)
        said = "`prompt_key`, `chosen_key` and `rejected_key`"
        if self.label_key is not None:
            keys = (self.prompt_key, self.chosen_key, self.label_key)
            said = "`prompt_key`, `completion_key` and `label_key`"
            if self.layout_of_rows in OF_PAIRS:
                raise ValueError(
                    f"`layout_of_rows` {self.layout_of_rows!r} is one of pairs: a single "
                    "completion has no other to share a beginning with"
                )
        names = [key for key in keys if key is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"{said} must differ")

    def _names(self, option: str) -> tuple[str, ...]:
        given = getattr(self, option)
        if isinstance(given, str):
            raise TypeError(f"`{option}` must be a sequence of names, found {given!r}")
        names = tuple(given)
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"`{option}` must hold names, found {type(name).__name__}")
        return names

    def _check_ignored(self) -> None:
        ignored = self._names("ignore_columns")
        wanted = {self.prompt_key, self.chosen_key or "chosen", self.rejected_key or "rejected"}
        for name in ignored:
            if name in wanted or name in self.columns:
                raise ValueError(f"`ignore_columns` names {name!r}, which is read")
        object.__setattr__(self, "ignore_columns", ignored)

    def _check_columns(self) -> None:
        columns = self._names("columns")
        for name in columns:
            if name in FIELDS or name in (self.prompt_key, self.chosen_key, self.rejected_key):
                raise ValueError(f"`columns` names {name!r}, which is a field of its own")
        if len(set(columns)) < len(columns):
            raise ValueError(f"`columns` must name every column once, found {list(columns)}")
        object.__setattr__(self, "columns", columns)


def settings(options: Mapping[str, Any]) -> Settings:
    """The options of a caller who reads pairs, checked.

    Raises:
        TypeError: there is no such option.  ValueError: it has no such value.
    """
    return _checked(options, Options.__annotations__)


def unpaired_settings(options: Mapping[str, Any]) -> Settings:
    """The options of a caller who reads single completions, checked: both sides are the completion,
    and the label is the first of the extra columns.

    Raises:
        TypeError, ValueError: as :func:`settings`.
    """
    given = dict(options)
    completion, label = given.pop("completion_key", "completion"), given.pop("label_key", "label")
    for name, key in (("completion_key", completion), ("label_key", label)):
        if not isinstance(key, str):
            raise TypeError(f"`{name}` must be a name, found {type(key).__name__}")
    sides = {"chosen_key": completion, "rejected_key": completion, "label_key": label}
    columns = given.pop("columns", ())
    if isinstance(columns, str):
        raise TypeError(f"`columns` must be a sequence of names, found {columns!r}")
    known = UnpairedOptions.__annotations__
    return _checked(given, known, columns=(label, *columns), **sides)


def _checked(options: Mapping[str, Any], known: Mapping[str, Any], **more: Any) -> Settings:
    unknown = [name for name in options if name not in known]
    if unknown:
        close = get_close_matches(unknown[0], known, n=1)
        raise TypeError(
            f"unknown option `{unknown[0]}`: there is {', '.join(sorted(known))}"
            + (f"\nhint: did you mean `{close[0]}`?" if close else "")
        )
    given = {**options, **more}
    for name in ("limits", "chat_template_kwargs"):
        if name in given and given[name] is None:
            del given[name]
    now = given.pop("now", None)
    if now is not None and not isinstance(now, datetime):
        raise TypeError(f"`now` must be a datetime, found {type(now).__name__}")
    return Settings(**given, now=local_time(now))


@contextmanager
def row_hints(settings: Settings) -> Iterator[None]:
    """Notes at the error of a bad row that it could be skipped, and what most often stands behind
    one without label or completion.
    """
    try:
        yield
    except DataError as error:
        is_row = error.line is not None and error.reason != "bad_input"
        could_be = is_row and error.field not in OF_FILES and "hint:" not in str(error)
        if settings.on_bad == "error" and could_be:
            error.add_note(SKIP_HINT)
        if settings.is_unpaired and error.reason == "missing_field":
            if error.field == settings.label_key:
                error.add_note("hint: `label_key` names the field of the labels, such as `kto_tag`")
            if error.field == settings.chosen_key:
                error.add_note(
                    "hint: `completion_key` names the completion's field; of rows of `chosen` "
                    "and `rejected`, UnpairedDataset.from_pairs(PairDataset...) makes single "
                    "completions"
                )
        raise
