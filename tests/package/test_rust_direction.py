"""The direction of imports between the files of `rust/`: no circles, floors from low to high, Python in `py/` alone.

What a file needs is read from its `use` lines and its paths. A name that a `mod.rs` only hands on (`pub use` of its own
children) counts for the file that defines it, and handing it on is no need; whatever else a `mod.rs` takes from its
children, or they from it, counts. A method called through a value names no file and is not seen.
"""

import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

RUST = next(folder / "rust" for folder in Path(__file__).parents if (folder / "rust").is_dir())

# Each module knows those of lower floors only.
FLOORS = [
    {"error"},
    {"fork"},
    {"pool"},
    {"read", "bpe", "layout", "logps", "loss"},
    {"template"},
    {"tokenize"},
    {"pair"},
    {"encode"},
    {"py"},
]

Module = tuple[str, ...]
Graph = dict[str, set[str]]

NOISE = re.compile(
    r"""//[^\n]* | /\*.*?\*/
    | b?r(?P<hashes>\#*)".*?"(?P=hashes) | b?"(?:\\.|[^"\\])*"
    | b?'(?:\\(?:u\{[^}]*\}|x[0-9a-fA-F]{2}|.)|[^'\\\n])'""",
    re.DOTALL | re.VERBOSE,
)
TEST_ITEM = re.compile(r"#\[cfg\(test\)\]\s*(?:#\[[^\]]*\]\s*)*(?P<head>[^{;]*)")
PATH = re.compile(r"(?<![\w:$])\$?([a-zA-Z_]\w*(?:\s*::\s*[a-zA-Z_]\w*)+)")


def test_no_circles(crate):
    assert " -> ".join(circles(crate.needs)) == ""


def test_no_circles_between_the_parts_of_a_folder(crate):
    assert [
        " -> ".join(circles(graph)) for graph in crate.folders().values() if circles(graph)
    ] == []


def test_every_module_has_one_floor(crate):
    modules = {module[0] for module in crate.files if module}
    assert sorted(modules) == sorted(name for floor in FLOORS for name in floor)


def test_lower_floors_know_nothing_of_higher_ones(crate):
    assert climbs(crate) == []


def test_only_py_knows_python(crate):
    knows = re.compile(r"\b(?:pyo3|numpy)\s*::")
    outside = {
        crate.files[m] for m, text in crate.texts.items() if m[:1] != ("py",) and knows.search(text)
    }
    assert outside == set()


def test_the_needs_of_known_files_are_found(crate):
    assert crate.needs["pair/boundary.rs"] >= {
        "pair/text.rs",
        "bpe/pair.rs",
        "error.rs",
        "tokenize/mod.rs",
    }
    assert "read/json/value.rs" in crate.needs["template/jinja.rs"]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (
            {"a.rs": "use crate::b::B; pub struct A;", "b.rs": "pub struct B(crate::a::A);"},
            "a.rs b.rs",
        ),
        # By a name that the folder hands on.
        (
            {
                "p/mod.rs": "mod a; mod b; pub use a::A; pub use b::B;",
                "p/a.rs": "use super::B; pub struct A;",
            }
            | {"p/b.rs": "use crate::{p::{A as Other}}; pub struct B;"},
            "p/a.rs p/b.rs",
        ),
        # Parent and child.
        (
            {
                "p/mod.rs": "mod a; pub struct P; pub fn f() { a::f() }",
                "p/a.rs": "use super::P; pub fn f() {}",
            },
            "p/a.rs p/mod.rs",
        ),
        # Between folders only, never between two files.
        (
            {"p/mod.rs": "mod a; mod b;", "p/a.rs": "use crate::q::c::f;", "p/b.rs": ""}
            | {
                "q/mod.rs": "pub mod c; mod d;",
                "q/c.rs": "pub fn f() {}",
                "q/d.rs": "use crate::p::b;",
            },
            "p q",
        ),
    ],
)
def test_a_planted_circle_is_found(files, found):
    crate = Crate(files | {"lib.rs": "mod a; mod b; mod p; mod q;"})
    circle = next(filter(None, [circles(crate.needs), *map(circles, crate.folders().values())]))
    assert " ".join(sorted(set(circle))) == found


@pytest.mark.parametrize(
    "text",
    [
        "// use crate::py::x;",
        'const X: &str = "use crate::py::x;"; const Y: char = \'"\';',
        "#[cfg(test)]\nmod tests { use crate::py::x; fn f() { if true { } } }",
        '#[cfg(test)]\n#[path = "x"]\nuse crate::py::x;',
    ],
)
def test_comments_strings_and_tests_need_nothing(text):
    crate = Crate({"lib.rs": "mod error; mod py;", "error.rs": text, "py.rs": "pub fn x() {}"})
    assert crate.needs["error.rs"] == set()


def test_a_planted_climb_is_found():
    files = {"lib.rs": "mod error; mod read; mod bpe; mod py;", "py.rs": "", "bpe.rs": ""}
    crate = Crate(files | {"error.rs": "fn f() { crate::py::g() }", "read.rs": "use crate::bpe;"})
    assert climbs(crate) == ["error.rs -> py.rs", "read.rs -> bpe.rs"]


def test_files_of_tests_are_left_out():
    crate = Crate(
        {"lib.rs": "mod a;\n#[cfg(test)]\nmod tests;", "a.rs": "", "tests.rs": "use crate::a;"}
    )
    assert "tests.rs" not in crate.needs


@pytest.fixture(scope="module")
def crate():
    return Crate(
        {str(path.relative_to(RUST)): path.read_text("utf-8") for path in RUST.rglob("*.rs")}
    )


def circles(graph: Graph) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def climbs(crate: "Crate") -> list[str]:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    top = {file: module[0] for module, file in crate.files.items() if module}
    return sorted(
        f"{file} -> {needed}"
        for file, needs in crate.needs.items()
        for needed in needs
        if file in top and top.get(needed) != top[file]
        if needed not in top or floor[top[needed]] >= floor[top[file]]
    )


class Crate:
    """The files of a crate, and which other ones each needs."""

    def __init__(self, sources: dict[str, str]):
        texts = {module_of(file): NOISE.sub('""', text) for file, text in sources.items()}
        tests = set()
        for module, text in texts.items():
            texts[module], names = without_tests(text)
            tests |= {(*module, name) for name in names}
        self.texts = {
            module: re.sub(r"\bpub\s*\((?:crate|super|self|in\s[\w:\s]+)\)", "pub", text)
            for module, text in texts.items()
            if not any(module[: len(test)] == test for test in tests)
        }
        self.files = {module_of(file): file for file in sources if module_of(file) in self.texts}
        uses = {module: list(self.uses(module)) for module in self.texts}
        # A macro may name what its own file hands on.
        self.names = {
            m: {name: path for _, name, path in uses[m] if path != (*m, name)} for m in uses
        }
        self.needs: Graph = {self.files[module]: set() for module in self.files}
        for module, lines in uses.items():
            for is_public, _, path in lines:
                target = self.home(path)
                if not (is_public and target[: len(module)] == module and target != module):
                    self.need(module, target)
            rest = re.sub(r"\buse\s[^;]*;", "", self.texts[module])
            for match in PATH.finditer(rest):
                path = self.absolute(module, re.split(r"\s*::\s*", match[1]))
                if path is not None:
                    self.need(module, self.home(path))

    def need(self, module: Module, target: Module) -> None:
        if target != module:
            self.needs[self.files[module]].add(self.files[target])

    def folders(self) -> dict[str, Graph]:
        """For each folder what its parts need of each other, a part being a file or a folder."""
        out: dict[str, Graph] = {}
        modules = {file: module for module, file in self.files.items()}
        for folder in {module[:-1] for module in self.files if module}:
            graph: Graph = {}
            for file, needs in self.needs.items():
                for needed in needs:
                    a, b = modules[file], modules[needed]
                    if a[: len(folder)] == b[: len(folder)] == folder:
                        a, b = a[: len(folder) + 1], b[: len(folder) + 1]
                        if a != b:
                            graph.setdefault("::".join(a), set()).add("::".join(b))
            out["::".join(folder)] = graph
        return out

    def uses(self, module: Module) -> Iterator[tuple[bool, str, Module]]:
        """Each name that a `use` brings: whether it is handed on, the name here, the path from the root."""
        for match in re.finditer(r"(\bpub\s+)?\buse\s+([^;]*);", self.texts[module]):
            for path, name in leaves(match[2]):
                absolute = self.absolute(module, path)
                if absolute is not None:
                    yield match[1] is not None, name, absolute

    def absolute(self, module: Module, path: list[str]) -> Module | None:
        """The path from the root, or `None` for one that leads out of the crate."""
        first, *rest = path
        if first == "crate":
            return tuple(rest)
        if first == "self":
            return (*module, *rest)
        if first == "super":
            base = module[:-1]
            while rest and rest[0] == "super":
                base, rest = base[:-1], rest[1:]
            return (*base, *rest)
        return (*module, *path) if (*module, first) in self.texts else None

    def home(self, path: Module) -> Module:
        """The module that defines what `path` names."""
        at: Module = ()
        for i, part in enumerate(path):
            if (*at, part) in self.texts:
                at = (*at, part)
                continue
            there = self.names[at].get(part)
            return at if there is None else self.home((*there, *path[i + 1 :]))
        return at


def module_of(file: str) -> Module:
    parts = Path(file).with_suffix("").parts
    return () if parts == ("lib",) else parts[:-1] if parts[-1] == "mod" else parts


def without_tests(text: str) -> tuple[str, set[str]]:
    """The text without its `#[cfg(test)]` items, and the names of the modules among them that are files."""
    names = set()
    while match := TEST_ITEM.search(text):
        end = match.end()
        if text[end] == ";":
            names |= set(re.findall(r"\bmod\s+(\w+)", match["head"]))
            end += 1
        else:
            depth = 0
            while True:
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
                if depth == 0:
                    break
        text = text[: match.start()] + text[end:]
    return text, names


def leaves(tree: str) -> Iterator[tuple[list[str], str]]:
    """The paths of a `use` tree, each with the name that it gets: `a::{b, c as d}` is `a::b` and `a::c`."""
    tree = tree.strip().removeprefix("$")
    head, brace, inside = tree.partition("{")
    prefix = [part.strip() for part in head.split("::") if part.strip()]
    if not brace:
        path, _, name = head.partition(" as ")
        parts = [part.strip() for part in path.split("::") if part.strip() not in ("", "*")]
        if parts[-1] == "self" and len(parts) > 1:
            parts.pop()
        yield parts, name.strip() or parts[-1]
        return
    for item in split(inside.rpartition("}")[0]):
        for path, name in leaves(item):
            alone = path == ["self"]
            yield (prefix, prefix[-1]) if alone else (prefix + path, name)


def split(items: str) -> Iterator[str]:
    """The items of a list, by the commas outside of braces."""
    depth, start = 0, 0
    for i, c in enumerate(items + ","):
        depth += {"{": 1, "}": -1}.get(c, 0)
        if c == "," and depth == 0:
            if items[start:i].strip():
                yield items[start:i]
            start = i + 1
