"""The walls between rooms, held by reading the imports of every file."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lvlmrec"
MODULES = sorted(PACKAGE.rglob("*.py"))

# library -> rooms that may import it
LIBRARIES = {
    "ray": ("cluster", "extraction", "jobs", "serving"),
    "mlflow": ("tracking",),
    "transformers": ("lvlms",),
    "fsspec": ("storage",),
    "s3fs": ("storage",),
    "pyarrow.fs": ("storage",),
    "boto3": (),
}
# From the ground up: a room imports rooms of lower floors alone. What is not named here is no room.
FLOORS = (
    ("errors", "columns", "processes", "baselines"),
    ("config", "taps", "locks", "storage", "cluster", "evaluation", "media"),
    ("tables", "tracking", "models"),
    ("models/sequential", "features", "data"),
    ("lvlms/protocol", "runs"),
    ("lvlms/files", "report"),
    ("lvlms/engine",),
    ("lvlms/families", "lvlms/encoders"),
    ("lvlms/ports",),
    ("lvlms/tiny",),
    ("lvlms",),
    ("extraction",),
    ("jobs",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LOOKING = {room for room in FLOOR if room.split("/")[0] in ("lvlms", "extraction", "media")}
RECOMMENDING = {
    room
    for room in FLOOR
    if room.split("/")[0] in ("data", "models", "baselines", "evaluation", "runs", "report", "serving")
}
GROUND = {"cluster", "columns", "config", "errors", "processes", "storage", "tables", "taps"}
# room -> all that it may import of the project; its own floor decides for the others
ALLOWED = {
    "models": {"config", "errors", "taps"},
    "models/sequential": {"models", "config", "errors", "taps"},
    "evaluation": {"columns", "config", "errors"},
    "baselines": {"columns", "config", "errors"},
    "media": {"errors"},
    "features": {"config", "columns", "errors", "processes", "storage", "tables", "taps"},
    # of the models their table, what they promise, and their files
    "extraction": {"lvlms", "lvlms/protocol", "lvlms/files", "features", "media", *GROUND},
    "data": {"config", "columns", "errors", "storage", "tables"},
    "report": {"evaluation", "taps"},
}


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str:
    """The room of a module or of what is in it: the deepest of those in FLOORS, as `lvlms/engine`."""
    parts = name.split(".")[1:]
    deepest = "/".join(parts[:2])
    return deepest if deepest in FLOOR else parts[0]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def rooms_imported(path: Path) -> set[str]:
    """Rooms of what a file imports; `from lvlmrec.lvlms import protocol` is of `lvlms/protocol` alone."""
    names = {name for name in imports(path) if name.startswith("lvlmrec.")}
    packages = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    return {room(name) for name in names - packages} - {room(module(path))}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_library_stays_in_its_rooms(path: Path) -> None:
    place = room(module(path)).split("/")[0] if path.parent != PACKAGE else path.stem
    for library, rooms in LIBRARIES.items():
        uses = any(name == library or name.startswith(f"{library}.") for name in imports(path))
        assert not uses or place in rooms, f"{path.name} imports {library}; only {rooms} may"


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "__init__.py"], ids=module)
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    here, found = room(module(path)), rooms_imported(path)
    assert here in FLOOR, f"{here} is no room of FLOORS"
    upwards = {other for other in found if FLOOR[other] >= FLOOR[here]}
    assert not upwards, f"{module(path)} imports {upwards}, of its own floor or above"
    assert found <= ALLOWED.get(here, found)
    assert here not in LOOKING or not found & RECOMMENDING
    assert here not in RECOMMENDING or not found & LOOKING


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_an_error_is_put_on_one_line_in_one_place(path: Path) -> None:
    again = re.search(r"""["'] ["']\.join\((str\(|f["']).*split\(\)\)""", path.read_text())
    assert not again or path.name == "errors.py", f"{path.name}: {again[0]}; use errors.one_line"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_of_a_configuration_become_absolute_in_one_place(path: Path) -> None:
    """In `jobs/job.py`. Elsewhere: where a job writes, what is in a file of MLflow, what lies within another value."""
    of_contents = ("jobs/places.py", "tracking/__init__.py", "tracking/database.py", "runs/grid.py")
    place = path.relative_to(PACKAGE).as_posix()
    uses = re.search(r"storage\.absolute\b|import .*\babsolute\b", path.read_text())
    assert not uses or place.startswith("storage/") or place in ("jobs/job.py", *of_contents)


def test_every_folder_of_tests_has_a_room() -> None:
    for folder in (path for path in (ROOT / "tests").rglob("*") if path.is_dir() and path.name != "__pycache__"):
        assert (PACKAGE / folder.relative_to(ROOT / "tests")).is_dir(), f"{folder} mirrors no room"


def test_no_circle_of_imports() -> None:
    names = {module(path): path for path in MODULES}
    graph = {}
    for name, path in names.items():
        nodes = ast.walk(ast.parse(path.read_text()))
        targets = set()
        for node in (node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)):
            if isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(names)
                targets |= inner or ({node.module} & set(names))
            else:
                targets |= {alias.name for alias in node.names} & set(names)
        graph[name] = targets - {name}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"circle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name in state:
            return
        state[name] = 1
        for target in sorted(graph[name]):
            visit(target, (*trail, name))
        state[name] = 2

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("path", sorted((ROOT / "rayjobs").glob("*.py")), ids=lambda p: p.name)
def test_a_job_is_short_and_imported_by_nobody(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 80
    for other in [*MODULES, *(ROOT / "rayjobs").glob("*.py")]:
        assert not any(name.split(".")[0] == "rayjobs" for name in imports(other))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 50, f"{path.name}: {node.name} is long"
