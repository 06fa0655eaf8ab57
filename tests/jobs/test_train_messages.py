"""What a training says when it ends, or is interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest

from lvlmrec.jobs import training
from lvlmrec.runs import experiment
from tests.toy import train_config

RECORD = {"latest_checkpoint_result": {"checkpoint_dir_name": "x", "metrics": {"epoch": 7, "train_loss": 1.0}}}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (RECORD, "after epoch 7 of 40, the last that was saved"),
        (None, "from the start: no epoch was saved yet"),
        ({"latest_checkpoint_result": None}, "from the start: no epoch was saved yet"),
        ({"of another Ray": 1}, "from the start: no epoch was saved yet"),
    ],
    ids=["saved", "no record", "none saved", "another record"],
)
def test_an_interrupted_training_says_after_which_epoch_it_goes_on(
    world: Path, tmp_path: Path, record: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = experiment.prepare(train_config(world, tmp_path, training__epochs=40))
    if record:
        folder = tmp_path / "runs" / prepared.key
        folder.mkdir(parents=True)
        (folder / training.RECORD).write_text(json.dumps(record))

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.cluster, "joined", interrupted)
    with pytest.raises(KeyboardInterrupt, match=said):
        training.run(prepared, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("epochs", "values", "said"),
    [
        (12, {}, "stopped early after epoch 12 of 40: 5 without a better one (training.patience); best: epoch 7, "),
        (40, {}, "all 40 epochs; best: epoch 7, validation HR@10 0.2500"),
        (12, {"dataset__split": "random"}, "best: epoch 7, validation RECALL@20 0.5000"),
    ],
)
def test_a_training_says_why_it_ended(world: Path, tmp_path: Path, epochs: int, values: dict, said: str) -> None:
    config = train_config(world, tmp_path, training__epochs=40, **values)
    result = {"epochs": epochs, "best_epoch": 7, "validation": {"hr@10": 0.25, "recall@20": 0.5}}
    assert said in training._ending(config, result)
