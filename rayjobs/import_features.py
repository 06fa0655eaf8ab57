"""Make a feature set of a published array of features, [items, dim] or [items, layers, dim].

    python rayjobs/import_features.py [layer.yaml ...] file=ARRAY.npy item_ids=IDS.csv name=image

The last line of stdout is a JSON object with the feature set's URI and what was written, skipped and rejected.
"""

import sys
from typing import Any

from lvlmrec.features import imported
from lvlmrec.features.imported import ImportConfig
from lvlmrec.jobs import job
from lvlmrec.tracking import Run


def import_features(config: ImportConfig, run: Run) -> dict[str, Any]:
    result = imported.run(config)
    run.set_tags({"feature_set": result["feature_set"]})
    run.log_metrics({key: value for key, value in result.items() if isinstance(value, int)})
    return result


if __name__ == "__main__":
    sys.exit(job.main("import_features", ImportConfig, import_features))
