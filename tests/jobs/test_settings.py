"""Settings that say nothing, or what nothing can be made of: one line, exit status 2, before anything starts."""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lvlmrec import config
from lvlmrec.errors import ConfigError
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.jobs import job
from lvlmrec.jobs.tuning import TuneConfig
from lvlmrec.runs.evaluating import EvaluateConfig
from lvlmrec.runs.experiment import TrainConfig
from tests.conftest import never
from tests.test_conf import JOBS

pytestmark = pytest.mark.usefixtures("own_signals")

NOT_FINITE = [
    ("train", "training.lr=nan"),
    ("train", "training.lr=.inf"),
    ("train", "training.weight_decay=inf"),
    ("train", "training.gradient_clip=nan"),
    ("train", "training.alignment=nan"),
    ("train", "model.temperature=-.inf"),
    ("tune", "search.lr_max=inf"),
    ("extract", "decode.timeout_s=inf"),
    ("extract", "pool.cpus_per_decode=nan"),
    ("extract", "recipe.prompts.describe.temperature=nan"),
]
OUT_OF_BOUNDS = [
    ("train", "seed=-1", "seed: -1 is below 0"),
    ("evaluate", "seed=-1", "seed: -1 is below 0"),
    ("extract", "seed=4294967296", "seed: 4294967296 is above 4294967295"),
    ("train", "max_missing_features=5", "max_missing_features: 5.0 is above 1"),
    ("train", "max_missing_features=-0.1", "max_missing_features: -0.1 is below 0"),
    ("train", "training.warmup=1.5", "training.warmup: 1.5 is above 1"),
    ("train", "model.backbone.dropout=1.5", "model.backbone.dropout: 1.5 is not below 1"),
    ("train", "model.backbone={name: gru4rec, dropout: 1}", "model.backbone.dropout: 1.0 is not below 1"),
    ("train", "training.loss={name: gbce, calibration: 1.1}", "training.loss.calibration: 1.1 is above 1"),
    ("tune", "search.lr_min=0", "search.lr_min: 0.0 is not above 0"),
    ("extract", "recipe.video_options={packing: -1}", "recipe.video_options: -1 is below 0"),
    ("extract", "recipe.prompts.p.top_p=0", "recipe.prompts.p.top_p: 0.0 is not above 0"),
    ("extract", "recipe.prompts.p.top_p=1.5", "recipe.prompts.p.top_p: 1.5 is above 1"),
]
NOTHING = [
    ("train", "workspace=", "workspace: '': empty; expected a value: sample, stores, checkpoints and tracking"),
    ("vacuum", "tracking_uri=null", "tracking_uri: '': empty; expected a value"),
    ("extract", "store=", "store: '': empty; expected a value: folder or prefix that holds feature sets"),
    ("train", "dataset.path=", "dataset.path: '': empty"),
    ("evaluate", "checkpoint=", "checkpoint: '': empty"),
    ("evaluate", "ks=[]", "ks: no cut-off given; as in ks=[10,20]"),
    ("extract", "recipe.taps=", "recipe.taps: []: empty; expected at least one entry: hidden states to read"),
    ("extract", "recipe.poolings=[]", "recipe.poolings: []: empty"),
    ("extract", "recipe.prompts={}", "recipe.prompts: {}: empty"),
    ("tune", "search.embedding_dims=[]", "search.embedding_dims: []: empty; expected at least one entry"),
    ("study", "study.seeds=[]", "study.seeds: []: empty"),
    ("extract", "recipe.taps=[llm.0,'']", "recipe.taps: ['llm.0', '']: '' is no entry"),
    ("extract", "recipe.prompts.p.stop=['']", "recipe.prompts.p.stop: ['']: '' is no entry"),
]
TWICE = [
    ("tune", "search.embedding_dims=[32,32]", "search.embedding_dims: [32, 32]: 32 is given twice"),
    ("evaluate", "baselines=[markov,markov]", "baselines: ['markov', 'markov']: 'markov' is given twice"),
    ("tune", "search.taps=[all,all]", "search.taps: ['all', 'all']: 'all' is given twice"),
    ("study", "study.seeds=[1,1]", "study.seeds: [1, 1]: 1 is given twice"),
]
TOGETHER = [
    (
        "train",
        "training.batch_size=1",
        "training.batch_size: 1: in_batch_softmax takes its negatives from the batch's other users, there are none; "
        "choices: 2 or more, or training.loss.name of full_softmax, bpr, sampled_softmax, gbce",
    ),
    ("train", "model.embedding_dim=9", "model.backbone.num_heads: 2 does not divide embedding_dim 9"),
    (
        "train",
        "training={num_workers: 8, min_workers: 9}",
        "training.min_workers: 9 is more than training.num_workers, 8",
    ),
    ("train", "training.min_workers=2", "training.min_workers: 2 is more than training.num_workers, 1"),
    ("train", "training.encoder_lr=0.1", "training.encoder_lr: item encoder 'id' trains no video encoder; leave it 0"),
    ("train", "model.item_encoder.name=video", "item_encoder.name: 'video' reads pixels; set feature_scaling=none"),
    (
        "train",
        "model.item_encoder={name: video, encoder: {name: videomae, num_attention_heads: 5}}",
        "model.item_encoder.encoder.num_attention_heads: 5 does not divide hidden_size 768",
    ),
    (
        "train",
        "model.item_encoder={name: video, encoder: {name: tiny, channels: 6}}",
        "model.item_encoder.encoder.channels: 6 is not a multiple of 4",
    ),
    ("tune", "search.lr_min=0.01", "search.lr_min: 0.01 is above search.lr_max=0.003"),
    ("tune", "search.embedding_dims=[32,9]", "search.embedding_dims: 9: model.backbone.num_heads: 2 does not divide"),
    (
        "tune",
        "search.gpus_per_trial=1.5",
        "search.gpus_per_trial: 1.5: a process uses one GPU at most",
    ),
    ("tune", "training.num_workers=2", "training.num_workers: 2: a trial is one process; leave it 1"),
    ("study", "training.num_workers=3", "training.num_workers: 3: a run of a study is one process; leave it 1"),
    ("tune", "training.use_gpu=true", "training.use_gpu: a trial has the GPU that search.gpus_per_trial says"),
    ("study", "training.use_gpu=true", "training.use_gpu: a run of a study has the GPU that study.gpus_per_run says"),
    ("study", "study.gpus_per_run=2.5", "study.gpus_per_run: 2.5: a process uses one GPU at most"),
    ("study", "study.reference=DFF2", "study.reference: 'DFF2' is not one of ID, fusion llm.0"),
    ("extract", "pool.min_actors=3", "pool.max_actors: 1 is below pool.min_actors=3"),
    ("extract", "pool.gpus_per_actor=1.1", "pool.gpus_per_actor: 1.1: a process uses one GPU at most"),
    ("extract", "pool.gpus_per_actor=2", "pool.gpus_per_actor: 2.0: a process uses one GPU at most"),
    ("extract", "lvlm.device=cuda", "lvlm.device: 'cuda' with pool.gpus_per_actor=0, actors without a GPU"),
    ("extract", "lvlm.device=gpu", "lvlm.device: 'gpu' is not one of auto, cpu, cuda, cuda:1"),
]
MISPLACED = [
    ("train", "trainng.lr=1", "trainng.lr=1: unknown key; did you mean training.lr? choices: cache, cache_gb, dataset"),
    (
        "train",
        "modle.backbone.name=gru4rec",
        "modle.backbone.name='gru4rec': unknown key; did you mean model.backbone.",
    ),
    ("train", "lr=1", "lr=1: unknown key; did you mean training.lr? choices: cache, cache_gb, dataset"),
    ("train", "model.num_heads=1", "model.num_heads=1: unknown key; did you mean model.backbone.num_heads? choices: "),
    ("train", "training.seed=1", "training.seed=1: unknown key; did you mean seed? choices: "),
    ("extract", "frames=4", "frames=4: unknown key; did you mean recipe.frames? choices: "),
    ("extract", "lvlm.recipe.frames=4", "lvlm.recipe.frames=4: unknown key; did you mean recipe.frames? choices: "),
]


@pytest.mark.parametrize(
    ("name", "argument", "line"),
    [
        *((name, argument, f"{argument.partition('=')[0]}: ") for name, argument in NOT_FINITE),
        *OUT_OF_BOUNDS,
        *NOTHING,
        *TWICE,
        *TOGETHER,
        *MISPLACED,
    ],
)
def test_a_senseless_setting_is_refused_before_anything_starts(
    name: str, argument: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, argument])
    assert job.main(name, JOBS[name], never) == 2
    captured = capsys.readouterr()
    (said,) = captured.err.splitlines()
    assert said.startswith(f"{name}: {line}")
    assert captured.out == "" and not list(tmp_path.iterdir())
    if (name, argument) in NOT_FINITE:
        assert said.endswith("is not a finite number")


def test_a_misspelt_section_of_a_layer_is_named(tmp_path: Path) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text("traning:\n  lr: 0.1\n  epochs: 3\n")
    with pytest.raises(ConfigError, match=r"^traning\.lr=0\.1: unknown key; did you mean training\.lr\? "):
        config.load(TrainConfig, [layer])


@pytest.mark.parametrize("text", ["", "null"])
@pytest.mark.parametrize(
    ("schema", "layer", "key", "unset"),
    [
        (TrainConfig, {"features": "s3://b/features"}, "features", ""),
        (TrainConfig, {"features": ["a", "b"]}, "features", ""),
        (TrainConfig, {"feature_columns": ["a/llm.*/b"]}, "feature_columns", []),
        (EvaluateConfig, {"against": ["a", "b"]}, "against", ""),
        (EvaluateConfig, {"baselines": ["markov"]}, "baselines", []),
        (TuneConfig, {"search": {"taps": ["all"]}}, "search.taps", []),
        (ExtractConfig, {"lvlm": {"revision": "main"}}, "lvlm.revision", ""),
        (ExtractConfig, {"lvlm": {"environment": {"pip": ["a"]}}}, "lvlm.environment", {}),
        (ExtractConfig, {"recipe": {"video_options": {"packing": 3}}}, "recipe.video_options", {}),
    ],
    ids=str,
)
def test_what_a_layer_set_is_unset_by_an_empty_value(
    schema: type, layer: dict[str, Any], key: str, unset: Any, text: str
) -> None:
    value: Any = config.load(schema, [layer], [f"{key}={text}"])
    for part in key.split("."):
        value = getattr(value, part)
    assert value == unset and type(value) is type(unset)


def test_a_number_is_not_unset() -> None:
    with pytest.raises(ConfigError, match=r"training\.lr"):
        config.load(TrainConfig, [], ["training.lr="])


@pytest.mark.parametrize(
    "argument",
    [
        "training.gradient_clip=0",
        "training.warmup=1",
        "training.loss={name: full_softmax}",
        "model.temperature=0",
        "dataset.core=0",
        "feature_pca=0",
        "model.backbone.dropout=0",
        "seed=4294967295",
    ],
)
def test_the_ends_of_a_range_are_in_it(argument: str) -> None:
    config.load(TrainConfig, [], [argument, "training.batch_size=2"])


def test_a_batch_of_one_user_has_negatives_where_they_are_drawn_or_the_catalogue_is_read() -> None:
    for loss in ("full_softmax", "bpr", "sampled_softmax", "gbce"):
        config.load(TrainConfig, [], ["training.batch_size=1", f"training.loss.name={loss}"])


def fields_of(schema: type, prefix: str) -> Iterator[tuple[str, dataclasses.Field]]:
    """The keys of a schema, of every variant of its parts too."""
    instance: Any = schema()
    for field in dataclasses.fields(instance):
        value, key = getattr(instance, field.name), f"{prefix}{field.name}"
        named = list(value.values())[:1] if isinstance(value, dict) else [value]
        for part in [*field.metadata.get("variants", {}).values()] or [type(v) for v in named]:
            if dataclasses.is_dataclass(part):
                yield from fields_of(part, f"{key}.")
            else:
                yield key, field


@pytest.mark.parametrize("name", JOBS)
def test_every_number_has_a_bound(name: str) -> None:
    numbers = {key: field for key, field in fields_of(JOBS[name], "") if re.search("int|float", str(field.type))}
    assert [key for key, field in numbers.items() if not field.metadata.get("bounds")] == []
