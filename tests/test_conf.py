"""Every file in conf/ parses, and the jobs' own layers say what the schema's defaults are."""

from pathlib import Path

import pytest

from lvlmrec.config import CONF, load, to_dict
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features import recipe_config as recipes
from lvlmrec.features.imported import ImportConfig
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.features.vacuum import VacuumConfig
from lvlmrec.jobs.tuning import TuneConfig
from lvlmrec.models.sequential.backbones import BACKBONES
from lvlmrec.runs.evaluating import EvaluateConfig
from lvlmrec.runs.experiment import TrainConfig
from lvlmrec.runs.grid import StudyConfig

JOBS = {
    "extract": ExtractConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "evaluate": EvaluateConfig,
    "vacuum": VacuumConfig,
    "study": StudyConfig,
    "import_features": ImportConfig,
}
ROOMS = {"lvlm": "extract", "recipe": "extract", "dataset": "train", "model": "train", "study": "study"}
LAYERS = sorted(CONF.rglob("*.yaml"))


def job_of(layer: Path) -> str:
    """The job a layer is for: its own name, its folder's, or the first word of a cluster layer."""
    if layer.parent == CONF:
        return layer.stem
    return ROOMS.get(layer.parent.name) or layer.stem.split("_")[0]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda p: str(p.relative_to(CONF)))
def test_every_layer_parses_and_changes_something(layer: Path) -> None:
    schema = JOBS[job_of(layer)]
    resolved = to_dict(load(schema, [layer]))
    if layer.parent == CONF:
        assert resolved == to_dict(load(schema, [])), "a job's own layer is the schema's defaults, written out"
    else:
        assert resolved != to_dict(load(schema, []))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda p: str(p.relative_to(CONF)))
def test_every_layer_begins_with_its_command(layer: Path) -> None:
    assert f"python rayjobs/{job_of(layer)}.py" in layer.read_text().split("\n\n")[0]


def test_every_job_has_its_own_layer() -> None:
    assert {layer.stem for layer in CONF.glob("*.yaml")} == set(JOBS)


@pytest.mark.parametrize("layer", sorted((CONF / "recipe").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_layer_resolves_on_a_model(layer: Path) -> None:
    info = LVLMInfo("any", "x", "float32", {"llm": 6, "vision": 3}, {"llm": 128, "vision": 96})
    recipe = recipes.resolve_source(load(ExtractConfig, [layer]).recipe, info)
    named = {name.prompt for name in recipe.shapes} | {name.split("/")[0] for name in recipe.text_names}
    assert named == set(recipe.prompts)


@pytest.mark.parametrize("job", ["train", "tune", "study"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_jobs_own_layer_leaves_every_backbone_its_own_settings(job: str, backbone: str) -> None:
    config = load(JOBS[job], [CONF / f"{job}.yaml"], [f"model.backbone.name={backbone}"])
    assert config.model.backbone == BACKBONES[backbone]()
