"""README and docs: every command is one that its job takes, every link and path leads somewhere, no page is lost."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lvlmrec import config
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features.imported import ImportConfig
from lvlmrec.features.vacuum import VacuumConfig
from lvlmrec.runs.evaluating import EvaluateConfig
from lvlmrec.runs.experiment import TrainConfig
from lvlmrec.runs.grid import StudyConfig
from tests.conftest import ROOT

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


def blocks(page: Path) -> str:
    """The indented lines of a page, which are what a user copies."""
    return "\n".join(line[4:] for line in page.read_text().splitlines() if line.startswith("    "))


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


@pytest.mark.parametrize(("job", "arguments"), commands())
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
