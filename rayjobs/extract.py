"""Extract features of many layers of a frozen LVLM from a catalogue of videos.

    python rayjobs/extract.py [layer.yaml ...] [input=... store=... lvlm.model=... recipe.taps=[llm.0,llm.-1] ...]

The last line of stdout is a JSON object with the feature set's URI and what was written, skipped and rejected.
"""

import sys
from typing import Any

from lvlmrec.extraction import pipeline
from lvlmrec.extraction.settings import ExtractConfig
from lvlmrec.jobs import job, sample
from lvlmrec.tracking import Run


def extract(config: ExtractConfig, run: Run) -> dict[str, Any]:
    sample.ensure(config.workspace, config.input, config.lvlm.model)
    plan = pipeline.plan(config)
    run.set_tags({"feature_set": plan.feature_set, "fingerprint": plan.recipe.fingerprint})
    run.log_json("recipe.json", plan.recipe.to_json())
    result = pipeline.run(plan, run.log_metrics)
    run.log_metrics({key: value for key, value in result.items() if isinstance(value, int | float)})
    if not config.estimate.only:
        run.log_json("rejected.json", result["rejected_by_reason"])
    return result


if __name__ == "__main__":
    sys.exit(job.main("extract", ExtractConfig, extract))
