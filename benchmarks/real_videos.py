"""Claim: every real file ends as written or rejected with a reason, none hangs, and a rerun writes nothing.

    python benchmarks/real_videos.py [--workspace ./workspace] [--save]

Extracts two micro-videos (HEVC) and the folder of real clips, many of them broken on purpose, with the sample's tiny
LLaVA-OneVision; then once more. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import json

from jobs import real_data, run
from record import fenced, save

from lvlmrec.features import store
from lvlmrec.report.comparison import table

COUNTS = ("items", "written", "skipped", "rejected")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", default="./workspace")
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    rows, results = [], {}
    for folder in ("microlens_videos", "videos"):
        for turn in ("first run", "rerun"):
            places = [f"workspace={arguments.workspace}", f"store={arguments.workspace}/{folder}"]
            result = run("extract", f"input={real_data() / folder}", *places)
            rows.append([folder, turn, *(str(result[name]) for name in COUNTS), f"{result['seconds']:.1f}"])
            results[f"{folder}, {turn}"] = {name: result[name] for name in COUNTS}
    rejected = store.read_rejected(result["feature_set"]).to_pandas().sort_values(["stage", "error", "item_id"])
    reasons = rejected.groupby(["stage", "error"])["item_id"].agg(["size", ", ".join]).reset_index()
    text = table(["input", "run", *COUNTS, "seconds"], rows) + "\n\nrejected, by reason:\n"
    for stage, error, count, items in reasons.itertuples(index=False):
        text += f"  {stage}/{error}: {count}\n    {items}\n"
    print(text)
    if arguments.save:
        print(save("real_videos", __doc__ or "", fenced(text)))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
