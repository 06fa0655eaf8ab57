"""The walls between rooms, held by reading the imports of every file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lvlmrec"
MODULES = sorted(PACKAGE.rglob("*.py"))

# library -> rooms and files that may import it
LIBRARIES = {
    "ray": ("rayjobs", "extraction", "cluster.py", "training.py", "tuning.py", "study.py", "serving"),
    "mlflow": ("tracking.py", "tracking_database.py"),
    "transformers": ("lvlms",),
    "fsspec": ("storage.py",),
    "s3fs": ("storage.py",),
    "pyarrow.fs": ("storage.py",),
    "boto3": (),
}
LOOKING = {"lvlms", "extraction"}
RECOMMENDING = {
    "data",
    "models",
    "baselines",
    "evaluation",
    "training",
    "tuning",
    "grid",
    "study",
    "fitting",
    "experiment",
    "checkpoint",
}
GROUND = {
    "config",
    "columns",
    "errors",
    "storage",
    "text_file",
    "tables",
    "s3",
    "tracking",
    "tracking_database",
    "tracking_names",
    "run_owner",
    "untracked",
    "locks",
    "processes",
    "video",
    "video_file",
    "motion",
    "orientation",
    "truncation",
    "taps",
    "bitstream",
    "av1",
    "av1_headers",
    "job",
}
# room -> what of the project it may import
ALLOWED = {
    "models": {"models", "config", "taps", "errors"},
    "evaluation": {"evaluation", "columns", "config", "errors"},
    "columns": set(),
    "errors": set(),
    "config": {"errors"},
    "taps": {"errors"},
    "text_file": {"errors", "storage"},
    "tables": {"errors", "storage", "text_file"},
    "features": {"features", "config", "columns", "errors", "processes", "storage", "tables", "taps", "text_file"},
    "baselines": {"baselines", "config", "errors", "columns"},
    "lvlms": {"lvlms", "features", "config", "columns", "errors", "storage", "taps", "video", "video_file", "motion"},
    "data": {"data", "config", "columns", "errors", "storage", "tables", "text_file", "video"},
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


def room(path: Path) -> str:
    """The room of a file: its folder in the package, or its own name at the top."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def rooms_imported(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("lvlmrec.") and name.count(".") >= 1}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_library_stays_in_its_rooms(path: Path) -> None:
    place = path.relative_to(PACKAGE).parts[0]
    for library, rooms in LIBRARIES.items():
        uses = any(name == library or name.startswith(f"{library}.") for name in imports(path))
        assert not uses or place in rooms, f"{path.name} imports {library}; only {rooms} may"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    here = room(path)
    if here in ALLOWED:
        assert rooms_imported(path) <= ALLOWED[here] | {here}
    if here in LOOKING:
        assert not rooms_imported(path) & RECOMMENDING
    if here in RECOMMENDING:
        assert not rooms_imported(path) & LOOKING


def test_no_circle_of_imports() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
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
