"""Claim: published features of two modalities go the same way as ours, and what they add is judged beside their twins.

    python benchmarks/tiktok.py [--workspace ./workspace] [--save] [dotted.key=value ...]

TikTok (LVLMREC_DATA) as published, its image and audio features imported in float16, and conf/study/tiktok.yaml
(overrides go to the study). A finished run is not repeated. The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jobs import real_data, run
from record import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--workspace", default="./workspace")
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    folder, place = real_data() / "tiktok", f"workspace={arguments.workspace}"
    sets = [
        run("import_features", place, f"file={folder / f'{name}_feat.npy'}", f"name={name}")["feature_set"]
        for name in ("image", "audio")
    ]
    given = [f"dataset.path={folder}", f"features=[{','.join(sets)}]", place]
    result = run("study", "conf/study/tiktok.yaml", *given, *arguments.overrides)
    text = Path(result["markdown"]).read_text()
    print(text)
    if arguments.save:
        print(save("tiktok", __doc__ or "", text))
    print(json.dumps({name: method["test"] for name, method in result["methods"].items()}))


if __name__ == "__main__":
    main()
