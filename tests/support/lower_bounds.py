"""Every lower bound that pyproject.toml declares, as constraints for pip: the oldest set there may be.

python tests/support/lower_bounds.py > constraints.txt
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?>=(?P<bound>[0-9.]+)(?:,<[0-9.]+)?(?:; .*)?"
)
ITSELF = re.compile(r"dpo_ext\[[^]]*\]")


def requirements(project: dict) -> list[str]:
    """What the package and all its extras name, but for the extras of its own."""
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [line for group in groups for line in group if not ITSELF.fullmatch(line)]


def lower_bounds(project: dict) -> dict[str, str]:
    """Name to lower bound.

    Raises:
        ValueError: a requirement has none, or two of one package differ.
    """
    bounds: dict[str, str] = {}
    for line in requirements(project):
        found = REQUIREMENT.fullmatch(line)
        if found is None:
            raise ValueError(f"{line!r}: expected a name and a lower bound")
        name, bound = found["name"], found["bound"]
        if bounds.setdefault(name, bound) != bound:
            raise ValueError(f"{name}: expected one lower bound, found {bounds[name]} and {bound}")
    return bounds


if __name__ == "__main__":
    declared = lower_bounds(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"])
    print("\n".join(f"{name}=={bound}" for name, bound in sorted(declared.items())))
