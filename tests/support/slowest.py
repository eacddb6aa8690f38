"""Which tests take the most CPU time, of their own process and of the children it waited for.

Wall time would tell more of what else the machine did.
"""

from __future__ import annotations

import os
from collections import defaultdict

import pytest
import warm


def cpu_seconds() -> float:
    """Of this process and of the children that ended, user and system."""
    return sum(os.times()[:4]) + warm.spent


class Clock:
    """Measures in each worker; what a report carries is summed where the summary is written."""

    def __init__(self, shown: int) -> None:
        self.shown = shown
        self.tests: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        now = cpu_seconds()
        report.user_properties = [("cpu", now - getattr(item.session, "_cpu", now))]
        item.session._cpu = now
        return report

    def pytest_collection_finish(self, session) -> None:
        session._cpu = cpu_seconds()

    def pytest_runtest_logreport(self, report) -> None:
        self.tests[report.nodeid] += sum(v for k, v in report.user_properties if k == "cpu")

    def pytest_terminal_summary(self, terminalreporter) -> None:
        files: dict[str, float] = defaultdict(float)
        for test, seconds in self.tests.items():
            files[test.split("::")[0]] += seconds
        for what, found in (("files", files), ("tests", self.tests)):
            terminalreporter.section(f"slowest {what}, of {sum(found.values()):.0f} s of CPU")
            for name, seconds in sorted(found.items(), key=lambda one: -one[1])[: self.shown]:
                terminalreporter.write_line(f"{seconds:8.2f}  {name}")
