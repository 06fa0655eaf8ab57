"""Claim: other families of models are one word of configuration, and the features of each are plain Parquet and a run.

    python benchmarks/six_families.py [FAMILY ...] [--workspace FOLDER] [--save]

For each family the command of a user, on the embedded sample and its tiny untrained models, no other key given:

    python rayjobs/extract.py workspace=FOLDER lvlm.name=FAMILY

Then each feature set is read with `pandas.read_parquet` alone and each run with MLflow's client alone, and the two must
agree with what the job said. `seconds` is the whole command, with the start of Python and Ray. Without a workspace a
temporary one is used. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from jobs import run
from record import fenced, save

from lvlmrec.lvlms import LVLMS
from lvlmrec.report.comparison import table

FAMILIES = (
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "minicpm_v_4_5",
    "phi_3_5_vision",
    "smolvlm",
    "gemma3",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES, metavar="FAMILY", help=f"of {', '.join(LVLMS)}")
    parser.add_argument("--workspace", default="", help="keep the sample, the feature sets and the runs here")
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workspace = arguments.workspace or temporary
        run("extract", f"workspace={workspace}", "estimate.only=true")  # renders the sample's videos
        rows = {family: extract(family, workspace) for family in arguments.families}
    head = ["lvlm.name", "items", "features", "width", "seconds", "in pandas", "in MLflow"]
    text = table(head, [[family, *(str(value) for value in row.values())] for family, row in rows.items()])
    print(text)
    if arguments.save:
        print(save("six_families", __doc__ or "", fenced(text)), file=sys.stderr)
    print(json.dumps(rows))


def extract(family: str, workspace: str) -> dict[str, Any]:
    """Run the job; what pandas and MLflow see of it. Raises `RuntimeError` when they do not agree with it."""
    started = time.perf_counter()
    result = run("extract", f"workspace={workspace}", f"lvlm.name={family}")
    seconds = time.perf_counter() - started
    frame = read(result["feature_set"])
    columns = [str(name) for name in frame if "/" in str(name)]
    widths = sorted({len(value) for name in columns for value in frame[name]})
    finite = all(np.isfinite(np.stack([*frame[name]]).astype(np.float32)).all() for name in columns)
    _agree("items", len(frame), result["written"])
    _agree("distinct items", frame["item_id"].nunique(), result["items"])
    _agree("features", len(columns), result["features"])
    _agree("finite", finite, True)

    logged = mlflow.MlflowClient(f"sqlite:///{workspace}/mlflow.db").get_run(result["run_id"])
    _agree("status", logged.info.status, "FINISHED")
    _agree("lvlm.name", logged.data.params["lvlm.name"], family)
    _agree("feature_set", logged.data.tags["feature_set"], result["feature_set"])
    _agree("features in MLflow", logged.data.metrics["features"], result["features"])
    _agree("written in MLflow", logged.data.metrics["written"], result["written"])
    return {
        "items": len(frame),
        "features": len(columns),
        "width": "/".join(map(str, widths)),
        "seconds": round(seconds, 1),
        "pandas": f"{len(frame)} x {len(columns)}",
        "mlflow": result["run_id"],
    }


def read(feature_set: str) -> pd.DataFrame:
    """Every committed row of a feature set, with nothing but pandas."""
    index = pd.read_parquet(f"{feature_set}/index.parquet")
    parts = [
        pd.read_parquet(f"{feature_set}/parts/{part}").iloc[rows["row"].to_numpy()]
        for part, rows in index.groupby("part")
    ]
    return pd.concat(parts, ignore_index=True)


def _agree(what: str, seen: object, said: object) -> None:
    if seen != said:
        raise RuntimeError(f"{what}: {seen!r}, expected {said!r}")


if __name__ == "__main__":
    main()
