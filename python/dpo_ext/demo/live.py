"""What the reader sees while the demo runs: a rich view in a terminal, plain lines elsewhere and in
CI.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from dpo_ext.pages.numbers import duration

BLOCKS = " ▁▂▃▄▅▆▇█"
EVERY_SECONDS = 10.0


class PlainShow:
    """One line for each stage, and one about every ten seconds inside a stage, with its time left.

    ``promise`` says how long the whole takes on a machine that does nothing else.
    """

    def __init__(
        self,
        title: str,
        stages: tuple[str, ...],
        promise: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._names, self._steps, self._promise, self._clock = stages, 0, promise, clock
        self._started = self._stage_started = self._last = clock()
        self._first: tuple[int, float] | None = None
        self._say(title)
        if promise:
            self._say(f"about {promise}")

    def __enter__(self) -> PlainShow:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    @contextmanager
    def stage(self, name: str, steps: int = 0) -> Iterator[None]:
        """A named stage, timed; ``steps`` is how often `step` will be called."""
        self._steps, self._first = steps, None
        self._stage_started = self._last = self._clock()
        self._open(name)
        yield
        self.seconds[name] = self._clock() - self._stage_started
        self._close(name)

    def step(self, done: int, **values: float) -> None:
        """Progress inside the stage, with the numbers to show."""
        self._reached(done)
        now = self._clock()
        if now - self._last >= EVERY_SECONDS or done == self._steps:
            self._last = now
            numbers = [f"{name} {value:.3f}" for name, value in values.items()]
            self._say("  ".join([f"  {done}/{self._steps}", *numbers, self._left(done)]).rstrip())

    def note(self, text: str) -> None:
        """A finding worth a line."""
        self._say(f"  {text}")

    def answer(self, prompt: str, answer: str, reward: float | None) -> None:
        """What the policy answers at this moment to the prompt that the demo follows."""
        value = "" if reward is None else f"  (true reward {reward:+.1f})"
        self._say(f"  {prompt.strip()} -> {answer.strip()}{value}")

    def _reached(self, done: int) -> None:
        """The first step warms things up, so that the clock of the others starts behind it."""
        if self._first is None:
            self._first = done, self._clock()

    def _left(self, done: int) -> str:
        """How long the stage still takes if it goes on as it went behind the first step."""
        if self._first is None or not self._first[0] < done < self._steps:
            return ""
        first, since = self._first
        return f"{duration((self._clock() - since) / (done - first) * (self._steps - done))} left"

    def _open(self, name: str) -> None:
        self._say(name)

    def _close(self, name: str) -> None:
        self._say(f"  {name}: {duration(self.seconds[name])}")

    def _say(self, text: str) -> None:
        print(f"[{self._clock() - self._started:6.1f} s] {text}", flush=True)


class RichShow(PlainShow):
    """The same, redrawn in place: stages and their seconds, curves, and an answer as it changes."""

    def __init__(
        self,
        title: str,
        stages: tuple[str, ...],
        console: Any,
        promise: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        self._title = title
        self._spinner = Spinner("dots")
        self._now = ""
        self._done = 0
        self._curves: dict[str, list[float]] = {}
        self._notes: list[str] = []
        self._answers: list[tuple[str, str, float | None]] = []
        super().__init__(title, stages, promise, clock)
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._draw)

    def __enter__(self) -> RichShow:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._now = ""
        self._live.refresh()
        self._live.__exit__(*exc)

    def step(self, done: int, **values: float) -> None:
        self._reached(done)
        self._done = done
        for name, value in values.items():
            self._curves.setdefault(name, []).append(value)

    def note(self, text: str) -> None:
        self._notes = [*self._notes[-4:], text]

    def answer(self, prompt: str, answer: str, reward: float | None) -> None:
        self._answers = [*self._answers[-5:], (prompt, answer, reward)]

    def _open(self, name: str) -> None:
        self._now, self._done = name, 0
        if self._steps:  # a stage without steps leaves the curves of the last one in view
            self._curves = {}

    def _close(self, name: str) -> None:
        pass

    def _say(self, text: str) -> None:
        pass

    def _draw(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table

        body = Table.grid(padding=(0, 3))
        body.add_row(self._draw_stages(), self._draw_numbers())
        parts: list[Any] = [body]
        if self._answers:
            parts += ["", self._draw_answers()]
        passed = duration(self._clock() - self._started)
        return Panel(
            Group(*parts),
            title=f"[bold]{self._title}[/]",
            subtitle=f"{passed} of about {self._promise}" if self._promise else passed,
            border_style="cyan",
            padding=(1, 2),
        )

    def _draw_stages(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 1))
        for name in self._names:
            if name in self.seconds:
                table.add_row("[green]✓[/]", name, f"[dim]{duration(self.seconds[name])}[/]")
            elif name == self._now:
                bar = (
                    ProgressBar(total=self._steps, completed=self._done, width=16)
                    if self._steps
                    else ""
                )
                table.add_row(self._spinner, f"[bold]{name}[/]", bar, self._left(self._done))
            else:
                table.add_row(" ", f"[dim]{name}[/]", "")
        return table

    def _draw_numbers(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        for name, values in self._curves.items():
            table.add_row(
                f"[bold]{name}[/]", f"[cyan]{values[-1]:8.3f}[/]", Text(_spark(values, 32), "cyan")
            )
        if self._curves and self._notes:
            table.add_row("")
        grid = Table.grid()
        if self._curves:
            grid.add_row(table)
        for text in self._notes:
            grid.add_row(Text(text, "dim"))
        return grid

    def _draw_answers(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        table.add_row("", Text(self._answers[-1][0].strip(), "bold"))
        for i, (_, answer, reward) in enumerate(self._answers):
            last = i == len(self._answers) - 1
            value = Text("")
            if reward is not None:
                value = Text(
                    f"{reward:+.1f}", "green" if reward > 2 else "red" if reward < -2 else "yellow"
                )
            table.add_row(value, Text(answer.strip(), "" if last else "dim"))
        return table


def open_show(title: str, stages: tuple[str, ...], promise: str = "") -> PlainShow:
    """The rich view where there is a terminal, no CI, and rich is installed; else plain lines."""
    if sys.stdout.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb":
        try:
            from rich.console import Console
        except ImportError:
            return PlainShow(title, stages, promise)
        return RichShow(title, stages, Console(), promise)
    return PlainShow(title, stages, promise)


def _spark(values: list[float], width: int) -> str:
    """The values as block characters, averaged down to ``width``."""
    count = min(width, len(values))
    cuts = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BLOCKS[1 + round(7 * (v - low) / span)] for v in means)
