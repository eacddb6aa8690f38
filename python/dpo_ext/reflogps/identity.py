"""What log-probs of a reference depend on, beside the tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Of these no log-prob depends, whatever a trainer calls them.
NEVER = frozenset(
    {
        "batch_size",
        "beta",
        "epochs",
        "gamma",
        "gradient_accumulation_steps",
        "label_smoothing",
        "layout",
        "learning_rate",
        "loss",
        "loss_type",
        "lr",
        "num_train_epochs",
        "optimizer",
        "packing",
        "padding",
        "pairs_per_batch",
        "per_device_train_batch_size",
        "rank",
        "seed",
        "shuffle",
        "threads",
        "tokens_per_batch",
        "weight_decay",
        "world_size",
    }
)
_ABSENT = "nothing"


@dataclass(frozen=True)
class Fingerprint:
    """What log-probs of a reference depend on, beside the tokens; made by `fingerprint`.

    Attributes:
        parts: by name, of what JSON holds. In any other, values are other values.
        soft: by name; in another, values differ by rounding. Unknown ones are left out.

    >>> Fingerprint({"parameters": "ab"}).digest == Fingerprint({"parameters": "cd"}).digest
    False
    """

    parts: Mapping[str, Any]
    soft: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Fingerprint | Mapping[str, Any] | str) -> Fingerprint:
        """A fingerprint, also one given by hand: parts, or one name for all of them.

        Raises:
            TypeError: it is none, or a part is nothing that JSON holds.
        """
        if isinstance(given, str):
            given = {"name": given}
        made = given if isinstance(given, Fingerprint) else None
        if made is None and isinstance(given, Mapping):
            made = cls(given)
        if made is None or not made.parts:
            raise TypeError(
                "`fingerprint` must be what `dpo_ext.reflogps.fingerprint` gives, parts by name or "
                f"a name, found {type(given).__name__ if made is None else 'no part'}"
            )
        for name in made.parts:
            check_part(name)
        return cls(*(json.loads(_text(half)) for half in (made.parts, made.soft)))

    @property
    def digest(self) -> str:
        """64 hexadecimal digits of the parts; the soft ones are not in it."""
        return hashlib.sha256(_text(self.parts).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return {"parts": dict(self.parts), "soft": dict(self.soft)}

    def differences(self, other: Fingerprint) -> list[str]:
        """What differs, a line a part: "`dtype`: bfloat16, and float32 in the other"."""
        return _differences(self.parts, other.parts)

    def soft_differences(self, other: Fingerprint) -> list[str]:
        """What differs of the soft parts that both know."""
        both = self.soft.keys() & other.soft.keys()
        ours, theirs = ({name: half.soft[name] for name in both} for half in (self, other))
        return _differences(ours, theirs)


def check_part(name: str) -> None:
    """That a part is one.

    Raises:
        TypeError: log-probs never depend on it.
    """
    if name in NEVER:
        raise TypeError(
            f"`{name}` is no part of a fingerprint: log-probs of a reference do not depend on it\n"
            "hint: leave it out"
        )


def _text(parts: Mapping[str, Any]) -> str:
    return json.dumps(dict(parts), sort_keys=True, allow_nan=False)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], inside: str = "") -> list[str]:
    """A line a part, ``config.rope_theta`` for one of an object in an object."""
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(name, _ABSENT), theirs.get(name, _ABSENT)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            lines += _differences(one, other, f"{inside}{name}.")
        elif _text({"": one}) != _text({"": other}):
            lines.append(f"`{inside}{name}`: {_shown(one)}, and {_shown(other)} in the other")
    return lines


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
