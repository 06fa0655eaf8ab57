"""The main job on the embedded sample: extract, train with ids alone and with DFF, evaluate both, compare.

    python rayjobs/demo.py [workspace=./workspace]

Every step is a job that you can run by itself; its command is shown. A second run does only what changed.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lvlmrec.report.comparison import comparison, verdict
from lvlmrec.tracking.database import uri_of

JOBS = Path(__file__).parent
NAMES = {"id": "SASRec, ids alone", "dff": "SASRec, DFF"}


def run(job: str, *arguments: str) -> dict[str, Any]:
    """Run a job as a process of its own and return the JSON of its last line. Ends the demo if the job fails."""
    print(f"\n$ python rayjobs/{job}.py {' '.join(arguments)}", file=sys.stderr, flush=True)
    command = [sys.executable, str(JOBS / f"{job}.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for number in (signal.SIGINT, signal.SIGTERM):  # the job closes its run, and the demo ends with its status
            signal.signal(number, lambda number, frame: process.send_signal(number))
        out, _ = process.communicate()
    if process.returncode != 0:
        sys.exit(process.returncode)
    return json.loads(out.splitlines()[-1])


def main() -> int:
    started = time.perf_counter()
    if unknown := [a for a in sys.argv[1:] if not a.startswith("workspace=")]:
        is_help = {*unknown} <= {"-h", "--help"}
        usage = "usage: python rayjobs/demo.py [workspace=./workspace]"
        print(usage if is_help else f"demo: {unknown[0]!r}: it takes nothing else; {usage}", file=sys.stderr)
        return 0 if is_help else 2
    workspace = next((a.partition("=")[2] for a in sys.argv[1:]), "./workspace")
    place = f"workspace={workspace}"
    extracted = run("extract", place)
    trained, evaluated = {}, {}
    for encoder in NAMES:
        trained[encoder] = run(
            "train", place, f"model.item_encoder.name={encoder}", f"features={extracted['feature_set']}"
        )
    evaluated["id"] = run("evaluate", place, f"checkpoint={trained['id']['checkpoint']}")
    other = f"against={evaluated['id']['ranks']}"
    evaluated["dff"] = run("evaluate", place, f"checkpoint={trained['dff']['checkpoint']}", other)

    rows = {name: result["slices"] for name, result in evaluated["id"]["baselines"].items()}
    rows |= {NAMES[encoder]: result["slices"] for encoder, result in evaluated.items()}
    print(f"\n{extracted['items']} videos, {extracted['features']} features of each, in {extracted['feature_set']}\n")
    print(comparison(rows))
    print("\nDFF against ids alone, the same users (one seed of each: rayjobs/study.py compares over seeds):")
    (compared,) = evaluated["dff"]["against"].values()
    for name, test in compared.items():
        print(f"  {verdict(name, test)}")
    print("\nlearned layer weights of DFF:")
    for column, weight in evaluated["dff"]["layer_weights"].items():
        print(f"  {column:32s} {weight:.3f} {'#' * round(60 * weight)}")
    seconds = time.perf_counter() - started
    print(f"\nThe sample's LVLM is untrained: this shows the road, not its quality. {seconds:.0f} s.")
    print("All runs, in a browser:")
    print(f"  .venv/bin/mlflow ui --backend-store-uri {uri_of(Path(workspace, 'mlflow.db'))}\n")
    test = {encoder: result["test"] for encoder, result in evaluated.items()}
    print(json.dumps({"job": "demo", "feature_set": extracted["feature_set"], "test": test}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
