"""What a workspace remembers of a model: the same answer, and none once anything has changed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lvlmrec
from lvlmrec.extraction import inspection
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.lvlms import LVLMS, LVLMConfig

FAMILIES = ("llava_onevision", "smolvlm", "text_encoder", "video_encoder")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        LVLMS[family].write_tiny(root / family, seed=0)
    return root


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[LVLMConfig]:
    """The models whose files were read."""
    configs: list[LVLMConfig] = []
    inspect = inspection.inspect_here

    def noting(lvlm: LVLMConfig) -> LVLMInfo:
        configs.append(lvlm)
        return inspect(lvlm)

    monkeypatch.setattr(inspection, "inspect_here", noting)
    return configs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_read_once(models: Path, tmp_path: Path, asked: list[LVLMConfig], family: str) -> None:
    lvlm = LVLMConfig(name=family, model=str(models / family))
    infos = [inspection.inspect(lvlm, {}, str(tmp_path), {}) for _ in range(3)]
    assert infos == [LVLMS[family].inspect(lvlm)] * 3 and len(asked) == 1


def test_it_is_read_again_when_anything_changes(
    tmp_path: Path, asked: list[LVLMConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "model"
    LVLMS["text_encoder"].write_tiny(directory, seed=0)
    lvlm = LVLMConfig(name="text_encoder", model=str(directory))

    def inspect(lvlm: LVLMConfig, code: dict[str, bytes] | None = None) -> LVLMInfo:
        return inspection.inspect(lvlm, code or {}, str(tmp_path), {})

    before = inspect(lvlm)
    assert inspect(dataclasses.replace(lvlm, dtype="bfloat16")).compute_dtype == "bfloat16"
    inspect(lvlm, {"models/a.py": b"1"})
    inspect(lvlm, {"models/a.py": b"2"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    after = inspect(lvlm)
    assert (before.num_layers, after.num_layers) == ({"text": 3}, {"text": 2})
    assert before.identity != after.identity
    assert len(asked) == 5
    assert inspect(lvlm) == after and len(asked) == 5

    monkeypatch.setattr(inspection, "version", lambda package: f"another {package}")
    assert inspect(lvlm) == after and len(asked) == 6
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(lvlmrec, "__file__", str(package / "__init__.py"))
    for number, text in enumerate(("SEED = 0\n", "SEED = 1\n"), start=7):
        (package / "code.py").write_text(text)
        assert inspect(lvlm) == after and len(asked) == number


def test_a_model_with_code_of_its_own_is_asked_each_time(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infos = ["first", "second"]
    monkeypatch.setattr(inspection, "_inspect_there", lambda lvlm, resources: infos.pop(0))
    lvlm = LVLMConfig(name="auto", model=str(models / "smolvlm"), trust_remote_code=True)
    assert [inspection.inspect(lvlm, {}, str(tmp_path), {}) for _ in range(2)] == ["first", "second"]
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_no_directory_is_asked_each_time(tmp_path: Path, asked: list[LVLMConfig]) -> None:
    for _ in range(2):
        inspection.inspect(LVLMConfig(name="frames", model=""), {}, str(tmp_path), {})
    assert len(asked) == 2 and not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_planning_with_a_model_that_is_known_imports_no_torch(models: Path, tmp_path: Path) -> None:
    """Its import takes seconds; a run that finds nothing to do has no other use for it."""
    (tmp_path / "items.csv").write_text("item_id,title\na,A cat plays the piano\n")
    program = (
        "import sys\n"
        "from lvlmrec import config\nfrom lvlmrec.jobs import job, sample\n"
        "from lvlmrec.extraction import pipeline, settings\n"
        "pipeline.plan(config.load(settings.ExtractConfig, [], sys.argv[1:]))\n"
        "print([name for name in ('torch', 'transformers', 'torchvision', 'ray.data') if name in sys.modules])\n"
    )
    prompts = "recipe.prompts={title: {input: text, text: '{title}'}}"
    overrides = [f"workspace={tmp_path}", f"input={tmp_path}/items.csv", "recipe.taps=[text.*]", prompts]
    model = ["lvlm.name=text_encoder", f"lvlm.model={models / 'text_encoder'}", "recipe.poolings=[all_mean]"]
    command = [sys.executable, "-c", program, *overrides, *model]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert said == ["['torch', 'transformers']\n", "[]\n"]
