"""Search learning rate, embedding size and layer taps; trials are chosen on validation and are child runs in MLflow.

    python rayjobs/tune.py [layer.yaml ...] [search.trials=16 search.taps=[all,llm.0+llm.4] ...]

The last line of stdout is a JSON object with the best configuration and its validation metrics.
"""

import sys
from typing import Any

from lvlmrec.jobs import job, sample, tuning
from lvlmrec.jobs.tuning import TuneConfig
from lvlmrec.runs import experiment
from lvlmrec.runs.loop import of_slices
from lvlmrec.tracking import Run


def tune(config: TuneConfig, run: Run) -> dict[str, Any]:
    sample.ensure(config.workspace, config.dataset.path)
    sample.ensure_features(config)
    prepared = experiment.prepare(config, every_layer=True)
    run.set_tags(prepared.tags)
    result = tuning.run(config, prepared, run)
    best = result["best"]
    slices = of_slices(best, config.dataset.selected_by)
    run.log_best_epoch(best["validation"], best["epoch"], slices=slices)
    run.log_json("best.json", best)
    return result


if __name__ == "__main__":
    sys.exit(job.main("tune", TuneConfig, tune))
