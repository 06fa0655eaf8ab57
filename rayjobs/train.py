"""Train a recommender, data-parallel, with early stopping on validation; the test interactions stay closed.

    python rayjobs/train.py [layer.yaml ...] [model.item_encoder.name=dff features=... training.epochs=...]

The last line of stdout is a JSON object with the checkpoint's URI and its validation metrics.
"""

import sys
from typing import Any

from lvlmrec.jobs import job, sample, training
from lvlmrec.runs import experiment
from lvlmrec.runs.experiment import TrainConfig
from lvlmrec.tracking import Run


def train(config: TrainConfig, run: Run) -> dict[str, Any]:
    sample.ensure(config.workspace, config.dataset.path)
    sample.ensure_features(config)
    prepared = experiment.prepare(config)
    run.set_tags(prepared.tags)
    result = training.run(prepared, run)
    run.log_json("result.json", result)
    return result


if __name__ == "__main__":
    sys.exit(job.main("train", TrainConfig, train))
