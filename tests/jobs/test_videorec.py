"""VideoRec from end to end: the sample's videos, frames through the extraction, training on Ray, evaluation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from lvlmrec import tracking
from lvlmrec.baselines import BASELINES
from lvlmrec.config import CONF, load
from lvlmrec.data import micro_world
from lvlmrec.data.micro_world import MicroWorldConfig
from lvlmrec.evaluation.metrics import metrics
from lvlmrec.evaluation.ranking import rank_from_scores
from lvlmrec.extraction import pipeline
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.features import store
from lvlmrec.features.recipe_config import resolve, resolve_source
from lvlmrec.jobs import training
from lvlmrec.lvlms import LVLMS
from lvlmrec.lvlms.protocol import Item
from lvlmrec.media.sampling import sample_clip
from lvlmrec.runs import evaluating, experiment
from lvlmrec.runs.evaluating import EvaluateConfig
from lvlmrec.runs.experiment import Experiment, TrainConfig
from tests.toy import Fitting

SMALL = MicroWorldConfig(num_items=60, num_users=300, frame_side=32, clip_seconds=1.0)


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("micro")
    micro_world.make(folder, SMALL)
    return folder


def extract_config(small_world: Path, workspace: Path) -> ExtractConfig:
    return load(ExtractConfig, [CONF / "lvlm/frames.yaml"], [f"workspace={workspace}", f"input={small_world}/videos"])


def train_config(small_world: Path, workspace: Path, *overrides: str) -> TrainConfig:
    own = [f"workspace={workspace}", f"dataset.path={small_world}/interactions", *overrides]
    return load(TrainConfig, [CONF / "model/videorec_tiny.yaml"], own)


def frames_of(small_world: Path, config: ExtractConfig) -> tuple[list[str], dict[str, Any]]:
    """Items and their columns, made in this process."""
    recipe = resolve_source(config.recipe, LVLMS["frames"].inspect(config.lvlm))
    videos = sorted((small_world / "videos").glob("*.mp4"))
    items = [Item(video.stem, sample_clip(video, recipe.frames, recipe.frame_max_side)) for video in videos]
    model = LVLMS["frames"].load(config.lvlm, recipe)
    return [item.item_id for item in items], model.extract(model.prepare(items))


def popularity_hr(prepared: Experiment) -> float:
    validation, num_items = prepared.data.validation, len(prepared.data.item_ids)
    scores = BASELINES["popularity"]().fit(prepared.data.sequences, num_items).score(validation.inputs)
    return metrics(rank_from_scores(scores, validation.targets, validation.histories))["hr@10"]


@pytest.mark.thorough
def test_it_learns_from_pixels_what_popularity_does_not_know(small_world: Path, tmp_path: Path) -> None:
    """The stages of the extraction in this process, then training: real videos, no ids."""
    config = extract_config(small_world, tmp_path)
    recipe = resolve(config.recipe, LVLMS["frames"].inspect(config.lvlm))
    uri = store.locate(config.store, "frames", recipe)
    store.create(uri, recipe)
    names, columns = frames_of(small_world, config)
    store.write_part(uri, recipe, store.feature_table(recipe, names, [4] * len(names), columns))
    store.commit(uri)
    values = ["training.epochs=25", "training.batch_size=64", "model.item_encoder.encoder.channels=8"]
    prepared = experiment.prepare(train_config(small_world, tmp_path, *values))
    state = Fitting(prepared).run()
    assert prepared.features is not None and not prepared.features.missing[1:].any()
    assert state.progress.best["hr@10"] > 1.2 * popularity_hr(prepared)


@pytest.mark.slow
def test_frames_are_extracted_once_and_train_on_two_workers(
    small_world: Path, tmp_path: Path, tracking_uri: str
) -> None:
    config = extract_config(small_world, tmp_path)
    names, columns = frames_of(small_world, config)
    manifest = ["item_id,uri", *(f"{name},{small_world}/videos/{name}.mp4" for name in names)]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "items.csv").write_text("\n".join([*manifest, f"broken,{tmp_path}/broken.mp4"]))
    config = replace(config, input=str(tmp_path / "items.csv"))
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        first = pipeline.run(pipeline.plan(config), lambda values, step: None)
        assert (first["written"], first["rejected"]) == (len(names), 1)
        again = pipeline.run(pipeline.plan(config), lambda values, step: None)
        assert (again["written"], again["skipped"], again["rejected"]) == (0, len(names) + 1, 1)

        values = ["training.epochs=2", "model.item_encoder.encoder.channels=8", "model.backbone.dropout=0"]
        prepared = experiment.prepare(train_config(small_world, tmp_path, *values, "training.num_workers=2"))
        features, expected = prepared.features, dict(zip(names, *columns.values(), strict=True))
        assert features is not None
        (frames,) = features.stored()
        assert frames.dtype == torch.uint8
        for index, item_id in enumerate(prepared.data.item_ids, 1):
            assert torch.equal(frames[index, 0].flatten(), expected[item_id])
        result = training.run(prepared, tracking.start(tracking_uri, str(tmp_path), "train", {}))
    finally:
        ray.shutdown()
    alone = Fitting(prepared).run()
    assert result["validation"]["hr@20"] == pytest.approx(alone.progress.best["hr@20"], abs=0.01)  # three users of 300
    found = evaluating.run(load(EvaluateConfig, [], [f"workspace={tmp_path}", f"checkpoint={result['checkpoint']}"]))
    assert found["users"] == len(prepared.data.sequences) and found["test"]["hr@20"] > 0
