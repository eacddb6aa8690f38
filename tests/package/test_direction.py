"""The law of imports: lower floors know nothing of higher ones, no file is part of a circle.

Every import counts: at the head of a file, inside a function, under `TYPE_CHECKING`.
"""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from places import ROOT

PACKAGE = ROOT / "python" / "dpo_ext"

# The rooms of `dpo_ext`, from the ground up; two rooms of one floor do not know each other.
FLOORS = [
    {"_core"},
    {"errors", "extras", "pages"},
    {"report"},
    {"pairs"},
    {"layout", "store"},
    {"data", "torch"},
    {"", "arrow", "compat", "lightning", "preference", "reflogps", "testing", "trl"},
    {"bench", "demo"},
    {"cli"},
    {"__main__"},
]
TORCH_FLOORS = [
    {"numbers", "pieces"},
    {"once", "ring", "agreement", "flash_cpu", "audit"},
    {"segments"},
    {"logps", "loader", "attention", "interface"},
    {"losses", "parallel", "adapters"},
    {"pairwise", "heads"},
    {"forward"},
    {"scoring", "probes"},
    {"reference"},
    {""},
]


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "cuda" not in path.parts}


def imports_of(path):
    """The modules of ours that a file imports, with the names that it takes from each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in FILES or inner == "dpo_ext._core":
                    yield inner, ""
                else:
                    yield node.module, alias.name


IMPORTS = {
    name: [
        (module, what) for module, what in imports_of(path) if module.partition(".")[0] == "dpo_ext"
    ]
    for name, path in FILES.items()
}


def room(module, inside="dpo_ext"):
    """The first part of a module's name inside a package; "" for the package's own face."""
    return module.removeprefix(inside).removeprefix(".").partition(".")[0]


def storey(floors, name):
    found = [number for number, floor in enumerate(floors) if name in floor]
    assert found, f"{name!r} stands on no floor: name it in FLOORS"
    return found[0]


@pytest.mark.parametrize(
    ("inside", "floors"), [("dpo_ext", FLOORS), ("dpo_ext.torch", TORCH_FLOORS)]
)
def test_imports_go_down(inside, floors):
    upward = [
        f"{file} imports {module}"
        for file, found in IMPORTS.items()
        for module, _ in found
        if f"{file}.".startswith(f"{inside}.") and f"{module}.".startswith(f"{inside}.")
        if room(file, inside) != room(module, inside)
        and storey(floors, room(file, inside)) <= storey(floors, room(module, inside))
    ]
    assert not upward


def test_no_file_is_part_of_a_circle():
    graph = {file: {module for module, _ in found} for file, found in IMPORTS.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_private_names_stay_in_their_file():
    """What ruff's SLF001 does not see: `from dpo_ext.x import _name`."""
    taken = [
        f"{file} takes {name} from {module}"
        for file, found in IMPORTS.items()
        for module, name in found
        if name.startswith("_") and name != "__version__"
    ]
    assert not taken


def test_cupy_is_imported_in_one_file():
    found = {
        name for name, path in FILES.items() for module, _ in everything(path) if module == "cupy"
    }
    assert found <= {"dpo_ext.torch.logps.cuda"}


def everything(path):
    return ((module.partition(".")[0], name) for module, name in imports_of(path))


def test_the_faces_of_inner_packages_import_nothing():
    faces = ["data", "store", "layout", "pages", "torch.logps", "torch.losses"]
    assert {face: IMPORTS[f"dpo_ext.{face}"] for face in faces} == {face: [] for face in faces}


def test_a_reader_sees_at_most_19_rooms():
    rooms = {room(name) for name in FILES} - {"", "__main__"}
    assert len(rooms) <= 19, sorted(rooms)
