"""`patch`: a peer's own functions replaced in place, listed, and put back."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import threading
import types
import warnings
from typing import Any, NamedTuple

from dpo_ext.compat.swaps import PEERS, Peer, Swap, misfit
from dpo_ext.errors import PatchError
from dpo_ext.extras import install_other


class Patch:
    """What one call of `patch` did. A context manager that undoes it at its end.

    Attributes:
        peer: the name that was given.
        swapped: ``module.name`` of every attribute that is replaced, homes first, then the modules
            that had imported it from there.
        left: ``(module.name, why)`` of what is in the table and was not replaced though the
            installed version has it.
    """

    def __init__(
        self, peer: str, keys: tuple[_Key, ...], swapped: list[str], left: list[tuple[str, str]]
    ) -> None:
        self.peer = peer
        self.swapped = tuple(swapped)
        self.left = tuple(left)
        self._keys: tuple[_Key, ...] | None = keys

    def undo(self) -> None:
        """Puts the peer's own functions back, unless another `patch` of the peer still holds; a
        second call does nothing. What somebody else has put in their place since is left, with a
        warning.
        """
        with _LOCK:
            keys, self._keys = self._keys, None
            _release(keys or ())

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "undone" if self._keys is None else f"{len(self.swapped)} names"
        return f"Patch({self.peer!r}, {state})"


class _Key(NamedTuple):
    module: str
    name: str


class _Held:
    """One attribute that is replaced, and by how many patches."""

    def __init__(self, theirs: Any, ours: Any) -> None:
        self.theirs, self.ours, self.count = theirs, ours, 0


_LOCK = threading.RLock()
_HELD: dict[_Key, _Held] = {}


def patch(peer: str) -> Patch:
    """Replaces a code base's own functions by ours, in the whole process, until undone.

    Same as, for each function of the table and each module that holds it::

        module.name = ours

    Found by identity in every loaded module, so that ``from trl.trainer.utils import
    selective_log_softmax`` in TRL's trainers, and in yours, is replaced too. A module that is
    imported later takes ours from the peer's module, and gets theirs back at the end. Not found:
    what closures, default arguments, partials and instances hold already, and copies of the source
    (Unsloth's compiled trainers).

    Args:
        peer: ``"trl"`` (0.18 to 1.16: log-probs, entropies, the fused head, Online DPO; with them
            DPO, KTO, CPO, ORPO, BCO, GRPO, RLOO, Nash-MD, XPO, PPO), ``"liger"`` (also where TRL
            uses it), ``"llamafactory"``, ``"openrlhf"``, ``"verl"``, ``"torchtune"``,
            ``"open_instruct"``, ``"dpo"`` (the original code's ``trainers.py``, importable), or
            ``"torch"`` (``F.linear_cross_entropy``).

    Returns:
        Patch, with the names that were swapped, and ``undo()``. As a context it undoes itself.
        Patches may be nested, of one peer too: the last one undone puts theirs back.

    Raises:
        ValueError: no such peer.
        ModuleNotFoundError: the peer is not installed.
        PatchError: the installed version has nothing that could be replaced; the message names the
            version and, for each function, why.

    It replaces for all threads at once; a call that has looked its function up already runs to its
    end with that. A spawned process needs its own patch.

    >>> import torch
    >>> if hasattr(torch.nn.functional, "linear_cross_entropy"):
    ...     with patch("torch") as done:
    ...         print(done.swapped[0])
    ... else:
    ...     print("torch.nn.functional.linear_cross_entropy")
    torch.nn.functional.linear_cross_entropy
    """
    if peer not in PEERS:
        raise ValueError(f"`peer` must be one of {', '.join(PEERS)}, found {peer!r}")
    known = PEERS[peer]
    _import_package(peer, known)
    with _LOCK:
        keys: list[_Key] = []
        left: list[tuple[str, str]] = []
        missing: list[str] = []
        for swap in known.swaps:
            key, why = _take(swap)
            if key is not None:
                keys.append(key)
            elif why is None:
                missing.append(f"{swap.modules[-1]}.{swap.name}: not in this version")
            else:
                left.append((f"{swap.modules[0]}.{swap.name}", why))
        if not keys:
            reasons = [*(f"{name}: {why}" for name, why in left), *missing]
            raise PatchError(
                f"nothing of {peer} {_version(known)} can be replaced\n" + "\n".join(reasons)
            )
        places = _replace_everywhere({id(_HELD[key].theirs): _HELD[key].ours for key in keys})
        homes = [f"{key.module}.{key.name}" for key in keys]
        held = {id(_HELD[key].ours) for key in keys}
        everywhere = [*places, *(place for place in _places(held) if place not in places)]
        swapped = [*homes, *(place for place in everywhere if place not in homes)]
        return Patch(peer, tuple(keys), swapped, left)


def _import_package(peer: str, known: Peer) -> None:
    try:
        importlib.import_module(known.package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != known.package:
            raise
        hint = "add its folder to sys.path"
        if known.distribution:
            hint = install_other(known.distribution)
        raise ModuleNotFoundError(
            f"patch({peer!r}) needs the module {known.package}\nhint: {hint}", name=known.package
        ) from error


def _version(known: Peer) -> str:
    try:
        return importlib.metadata.version(known.distribution) if known.distribution else ""
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules[known.package], "__version__", "of unknown version"))


def _take(swap: Swap) -> tuple[_Key | None, str | None]:
    """Replaces one attribute in its home; else why not, None if the version lacks it."""
    why = None
    for module_name in swap.modules:
        try:
            with warnings.catch_warnings():  # that trl.experimental may change
                warnings.filterwarnings("ignore", category=Warning, module=r"trl\.")
                warnings.filterwarnings("ignore", message=".*experimental.*")
                module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if not module_name.startswith(error.name or "?"):
                why = f"importing {module_name} failed: {error}"
            continue
        except Exception as error:  # an optional package of another version
            why = f"importing {module_name} failed: {type(error).__name__}: {error}"
            continue
        owner, attribute = _owner(module, swap.name)
        theirs = None if owner is None else vars(owner).get(attribute)
        if theirs is None:
            continue
        key = _Key(module_name, swap.name)
        held = _HELD.get(key)
        if held is not None and held.ours is theirs:
            held.count += 1
            return key, None
        misfits = [misfit(theirs, ours) for ours in swap.replacements]
        if None not in misfits:
            why = misfits[0]
            continue
        ours = _copy(swap.replacements[misfits.index(None)], theirs)
        _HELD[key] = _Held(theirs, ours)
        _HELD[key].count = 1
        setattr(owner, attribute, ours)
        return key, None
    return None, why


def _owner(module: types.ModuleType, name: str) -> tuple[Any, str]:
    first, _, method = name.partition(".")
    return (vars(module).get(first), method) if method else (module, first)


def _copy(ours: Any, theirs: Any) -> Any:
    """An object of its own, so that undoing it does not touch who imported ours by its name."""
    if isinstance(ours, type):
        made: Any = type(ours.__name__, (ours,), {"__doc__": ours.__doc__})
    else:
        made = types.FunctionType(
            ours.__code__, ours.__globals__, ours.__name__, ours.__defaults__, ours.__closure__
        )
        made.__kwdefaults__, made.__doc__ = ours.__kwdefaults__, ours.__doc__
        made.__annotations__ = dict(ours.__annotations__)
    # found under the peer's name, as pickle looks it up
    made.__module__ = getattr(theirs, "__module__", made.__module__)
    made.__qualname__ = getattr(theirs, "__qualname__", made.__qualname__)
    return made


def _modules() -> list[tuple[str, types.ModuleType]]:
    return [(name, m) for name, m in list(sys.modules.items()) if isinstance(m, types.ModuleType)]


def _replace_everywhere(by_identity: dict[int, Any]) -> list[str]:
    places = []
    for module_name, module in _modules():
        for name, value in list(vars(module).items()):
            if id(value) in by_identity:
                setattr(module, name, by_identity[id(value)])
                places.append(f"{module_name}.{name}")
    return places


def _places(identities: set[int]) -> list[str]:
    return [
        f"{module_name}.{name}"
        for module_name, module in _modules()
        for name, value in list(vars(module).items())
        if id(value) in identities
    ]


def _release(keys: tuple[_Key, ...]) -> None:
    back: dict[int, Any] = {}
    for key in keys:
        held = _HELD[key]
        held.count -= 1
        if held.count:
            continue
        del _HELD[key]
        back[id(held.ours)] = held.theirs
        owner, attribute = _owner(sys.modules[key.module], key.name)
        if vars(owner).get(attribute) is held.ours:
            setattr(owner, attribute, held.theirs)
        else:
            warnings.warn(
                f"{key.module}.{key.name} was replaced by somebody else and is left as it is",
                RuntimeWarning,
                stacklevel=3,
            )
    if back:
        _replace_everywhere(back)
