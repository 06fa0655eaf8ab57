"""Compare methods under one split and one budget: search on validation, several seeds, tests against a reference.

    python rayjobs/study.py [layer.yaml ...] [study.seeds=[0,1,2] study.max_concurrent=4 ...]

The last line of stdout is a JSON object with the methods' test metrics and the tables' URIs.
"""

import sys
from typing import Any

from lvlmrec.jobs import job, sample, study
from lvlmrec.runs import grid
from lvlmrec.runs.grid import StudyConfig
from lvlmrec.tracking import Run


def compare(config: StudyConfig, run: Run) -> dict[str, Any]:
    plan = grid.make_plan(config)
    sample.ensure(config.workspace, config.dataset.path)
    for first, *_ in plan.configs.values():
        sample.ensure_features(first)
    study.check(config, plan)
    run.set_tags({"study": grid.folder(config)})
    result = study.run(config, plan, run)
    run.log_json("result.json", result)
    return result


if __name__ == "__main__":
    sys.exit(job.main("study", StudyConfig, compare))
