"""Remove the parts of a feature set that its index does not list: left by killed, repeated or superseded work.

    python rayjobs/vacuum.py features=FEATURE_SET

Nothing that a reader sees changes. The last line of stdout is a JSON object with what was removed.
"""

import sys
from typing import Any

from lvlmrec.features import vacuum
from lvlmrec.features.vacuum import VacuumConfig
from lvlmrec.jobs import job
from lvlmrec.tracking import Run


def clean(config: VacuumConfig, run: Run) -> dict[str, Any]:
    result = vacuum.run(config)
    run.set_tags({"feature_set": result["feature_set"]})
    run.log_metrics({key: value for key, value in result.items() if isinstance(value, int)})
    return result


if __name__ == "__main__":
    sys.exit(job.main("vacuum", VacuumConfig, clean))
