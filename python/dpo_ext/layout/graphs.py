"""`outside_graphs`: what the compiler does not look into, without its import."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
_watcher = torch._C._dynamo.eval_frame.get_eval_frame_callback  # noqa: SLF001 - no public name


def outside_graphs(reason: str | None = None) -> Callable[[F], F]:
    """A function where Dynamo does not look; same as ``torch.compiler.disable(reason=reason)``.

    Behind a graph break Dynamo watches every call, an operator's body too, and stops at functions
    of Rust and CuPy. Telling it takes its import, of two seconds, and 8 us a call: only a call that
    it watches pays for them.
    """

    def decorate(body: F) -> F:
        hidden: Callable[..., Any] | None = None

        @functools.wraps(body)
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal hidden
            # Dynamo may look at this very frame, once, and knows no `_watcher`
            if not torch.compiler.is_compiling() and _watcher() is None:
                return body(*arguments, **options)
            if hidden is None:
                from torch._dynamo.decorators import skip

                hidden = torch.compiler.disable(body, reason=reason)
                skip(run)
            return hidden(*arguments, **options)

        # as `disable` marks what it returns, for a graph that comes to this call
        run._torchdynamo_disable = True  # type: ignore[attr-defined] # noqa: SLF001
        run._torchdynamo_disable_msg = reason  # type: ignore[attr-defined] # noqa: SLF001
        return run  # type: ignore[return-value]

    return decorate
