"""Rank every user's test item over the full catalogue, beside the trivial baselines, and keep each user's rank.

    python rayjobs/evaluate.py [layer.yaml ...] [checkpoint=... against=RANKS_OF_ANOTHER_EVALUATION]

The last line of stdout is a JSON object with the test metrics, their warm and cold slices, and the ranks' URI.
"""

import sys
from typing import Any

from lvlmrec import evaluating, job
from lvlmrec.config import flatten
from lvlmrec.evaluating import EvaluateConfig
from lvlmrec.tracking import Run


def evaluate(config: EvaluateConfig, run: Run) -> dict[str, Any]:
    result = evaluating.run(config)
    run.set_tags({"checkpoint": result["checkpoint"], "ranks": result["ranks"]})
    run.log_metrics({f"test/{name}": value for name, value in result["test"].items()})
    run.log_metrics({key: value for key, value in flatten(result["slices"], "slices.") if value is not None})
    run.log_json("evaluation.json", result)
    return result


if __name__ == "__main__":
    sys.exit(job.main("evaluate", EvaluateConfig, evaluate))
