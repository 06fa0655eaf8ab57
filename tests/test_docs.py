"""README and docs: every command is one that its job takes, every link and path leads somewhere, no page is lost."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lvlmrec import config
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features.imported import ImportConfig
from lvlmrec.features.vacuum import VacuumConfig
from lvlmrec.runs.evaluating import EvaluateConfig
from lvlmrec.runs.experiment import TrainConfig
from lvlmrec.runs.grid import StudyConfig
from tests.conftest import ROOT
from tests.videos import write_video

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCHEMAS: dict[str, type[Any]] = {
    "extract": ExtractConfig,
    "import_features": ImportConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "study": StudyConfig,
    "vacuum": VacuumConfig,
}
COMMAND = re.compile(r"python rayjobs/(\w+)\.py((?: \\\n|[^\n;#|])*)")
LINK = re.compile(r"\]\(([^)#]+)(#[\w-]+)?\)")
PATH = re.compile(r"`((?:[\w-]+/)*[\w-]+\.py|(?:lvlmrec|conf|tests|benchmarks|rayjobs|docs)/[\w/.-]+)`")


FENCED = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"(python|ray|make|npm|pip|mlflow|for|aws|docker|curl|bash|sh|\./)\b.*")
MARKS = ("# needs a GPU", "# needs a network", "# needs a cluster")
SMALLER = {  # so that a command takes a minute: what is added to those of a job
    "train": "training.epochs=1",
    "tune": "search.trials=2 training.epochs=1",
    "study": "study.seeds=[0] training.epochs=1",
}


def blocks(page: Path) -> str:
    """The indented and fenced lines of a page, which are what a user copies."""
    text = page.read_text()
    indented = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    return "\n".join([*indented, *FENCED.findall(text)])


def command_lines(page: Path) -> list[str]:
    """The commands of a page with their comments, continued lines joined."""
    lines = blocks(page).replace("\\\n", " ").splitlines()
    return [line for line in lines if PROGRAM.match(line)]


def runnable() -> list[str]:
    """The commands of jobs that are not marked and are no template, each once."""
    lines = dict.fromkeys(line for page in PAGES for line in command_lines(page) if COMMAND.search(line))
    return [line.partition(" #")[0].strip() for line in lines if "<job>" not in line and not line.endswith(MARKS)]


def commands() -> Iterator[Any]:
    for page in PAGES:
        for job, arguments in COMMAND.findall(blocks(page)):
            if job != "X":
                yield pytest.param(job, arguments.replace("\\\n", " "), id=f"{page.stem}-{job}")


def schema(job: str) -> type[Any]:
    if job == "tune":
        from lvlmrec.jobs.tuning import TuneConfig

        return TuneConfig
    return SCHEMAS[job]


@pytest.mark.parametrize(("job", "arguments"), list(commands()))
def test_a_command_is_one_that_its_job_takes(job: str, arguments: str) -> None:
    """Words in capitals stand for what is the user's; all else is read as the job reads it."""
    assert (ROOT / "rayjobs" / f"{job}.py").exists()
    given = [word for word in shlex.split(arguments) if not word.startswith("$")]
    layers = [ROOT / word for word in given if word.endswith(".yaml")]
    overrides = [word for word in given if "=" in word and "$" not in word]
    assert len(layers) + len(overrides) + sum("$" in word for word in given) == len(given), given
    config.load(schema(job), layers or [config.CONF / f"{job}.yaml"], overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target, _ in LINK.findall(text):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: no {target}"
    for path in PATH.findall(text):
        assert "NAME" in path or [*ROOT.glob(path), *(ROOT / "lvlmrec").rglob(path)], f"{page.name}: no {path}"


def test_every_page_is_found_from_the_readme_which_is_short() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120
    linked = {ROOT / target for target, _ in LINK.findall(readme)}
    pages = {page for page in PAGES if page.parent.name == "docs"}
    for page in [*linked & pages]:
        linked |= {page.parent / target for target, _ in LINK.findall(page.read_text())}
    assert pages <= linked, f"not linked: {sorted(page.name for page in pages - linked)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_command_is_run_or_marked(page: Path) -> None:
    """Commands of jobs without a mark are run below, targets of make by every change; a comment marks the others."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in command_lines(page):
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert set(arguments) <= targets, line
        elif not line.endswith(MARKS) and "<job>" not in line:
            known = line.partition(" #")[0].strip() in runnable() or line.startswith("npm install s3rver ")
            assert known, f"{page.name}: neither run nor marked with one of {MARKS}: {line}"


def test_commands_in_fences_and_of_several_lines_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n    python rayjobs/train.py a=1 \\\n        b=2  # c\n\n```bash\nray up x.yaml\n```\n")
    assert [" ".join(line.split()) for line in command_lines(page)] == [
        "python rayjobs/train.py a=1 b=2 # c",
        "ray up x.yaml",
    ]


def shell(command: str, workspace: Path, address: str) -> dict[str, Any]:
    """Runs the command as it is written, in a workspace and made smaller, and gives its last JSON."""

    def complete(found: re.Match[str]) -> str:
        job, arguments = found.groups()
        added = f"workspace={workspace} {SMALLER.get(job, '')}"
        return f"{sys.executable} rayjobs/{job}.py {arguments} {added} "

    script = "set -e\n" + COMMAND.sub(complete, command)
    environment = os.environ | {"RAY_ADDRESS": address}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=580, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, f"{script}\n{done.stderr[-3000:]}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> dict[str, str]:
    """What stands for the words in capitals: the sample, its features, a checkpoint and its ranks."""
    folder = tmp_path_factory.mktemp("docs")
    workspace = folder / "workspace"
    (folder / "videos").mkdir()
    for name in ("a", "b"):
        write_video(folder / "videos" / f"{name}.mp4", num_frames=30)
    np.save(folder / "image_feat.npy", np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32))
    features = shell("python rayjobs/extract.py", workspace, ray_address)["feature_set"]
    checkpoint = shell("python rayjobs/train.py", workspace, ray_address)["checkpoint"]
    ranks = shell(f"python rayjobs/evaluate.py checkpoint={checkpoint}", workspace, ray_address)["ranks"]
    shutil.copyfile(ranks, folder / "ranks.parquet")
    return {
        "WORKSPACE": str(workspace),
        "image_feat.npy": str(folder / "image_feat.npy"),
        "VIDEOS": str(folder / "videos"),
        "STORE": str(folder / "store"),
        "FOLDER": str(workspace / "sample" / "interactions"),
        "FEATURE_SET": features,
        "CHECKPOINT": checkpoint,
        "RANKS_OF_ANOTHER_RUN": ranks,
        "RANKS_OF_ONE_RUN": ranks,
        "RANKS_OF_ANOTHER": str(folder / "ranks.parquet"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", runnable())
def test_a_command_runs_on_the_sample(command: str, places: dict[str, str], ray_address: str) -> None:
    for word, place in sorted(places.items(), key=lambda pair: -len(pair[0])):
        command = re.sub(rf"(?<![\w/]){re.escape(word)}(?!\w)", place, command)
    assert shell(command, Path(places["WORKSPACE"]), ray_address)["run_id"]
