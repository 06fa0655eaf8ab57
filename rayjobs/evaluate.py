"""Rank every user's test item over the full catalogue, beside the trivial baselines, and keep each user's rank.

    python rayjobs/evaluate.py [layer.yaml ...] [checkpoint=... against=RANKS_OF_ANOTHER_EVALUATION]

`against` may be a list. Tables of the run beside the baselines go to stderr. The last line of stdout is a JSON object
with the test metrics, the same by slice, what the lists show beyond accuracy, and the ranks' URI.
"""

import sys
from typing import Any

from lvlmrec.config import flatten
from lvlmrec.jobs import job
from lvlmrec.report.evaluation import evaluation
from lvlmrec.runs import evaluating
from lvlmrec.runs.evaluating import EvaluateConfig
from lvlmrec.tracking import Run


def evaluate(config: EvaluateConfig, run: Run) -> dict[str, Any]:
    result = evaluating.run(config)
    print(evaluation(result), file=sys.stderr)
    run.set_tags({"checkpoint": result["checkpoint"], "ranks": result["ranks"]})
    run.log_metrics({f"test/{name}": value for name, value in result["test"].items()})
    run.log_metrics({key: value for key, value in flatten(result["slices"], "slices.") if value is not None})
    run.log_metrics({f"beyond_accuracy/{name}": value for name, value in result["beyond_accuracy"].items()})
    run.log_json("evaluation.json", result)
    return result


if __name__ == "__main__":
    sys.exit(job.main("evaluate", EvaluateConfig, evaluate))
