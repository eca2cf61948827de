"""Imports run one way between the rooms of the library, and every room says what it is for."""

import ast
from pathlib import Path

import pytest

import fmsam_lib

PACKAGE = Path(fmsam_lib.__file__).parent
# From the ground up: a room imports from the floors below its own, and from itself.
FLOORS = [
    {"records"},
    {"checking"},
    {"parameters"},
    {"pair"},
    {"model"},
    {"phantoms", "metrics"},
    {"images"},
    {"training"},
    {"evaluation", "flatness"},
    {"plotting"},
    {"registration", "widgets"},
    {"study"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
CORE = ("pair", "model", "images", "training")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source):
    """Rooms that a module imports or starts: at its top, inside functions, by `python -m` in a command."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fmsam_lib" and len(parts) > 1 and parts[1] in FLOOR:
                yield parts[1]


def wrong(room, source):
    return {other for other in imported(source) if other != room and FLOOR[other] >= FLOOR[room]}


def test_every_module_is_in_a_room_with_a_floor():
    assert {room_of(path) for path in MODULES} == FLOOR.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    assert not wrong(room_of(path), path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "from fmsam_lib.study import run",
        "from fmsam_lib import study",
        "import fmsam_lib.study.run",
        "def f():\n    from fmsam_lib.study.run import main",
        'command = [sys.executable, "-m", "fmsam_lib.study"]',
    ],
)
def test_an_import_the_other_way_is_found(source):
    assert wrong("training", source) == {"study"}
    assert not wrong("study", source)


@pytest.mark.parametrize("room", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_a_room_says_what_comes_in_and_what_goes_out(room):
    says = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    assert "?" in says.splitlines()[0]
    assert "In: " in says
    assert "Out: " in says


def test_the_library_stays_thin():
    lines = {path: len(path.read_text().splitlines()) for path in MODULES}
    assert not {str(path.relative_to(PACKAGE)): n for path, n in lines.items() if n > 300}
    assert sum(n for path, n in lines.items() if room_of(path) in CORE) <= 3504
    assert sum(lines.values()) <= 9990
