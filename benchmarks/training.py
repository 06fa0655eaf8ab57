"""Claim: an epoch and an evaluation cost a fraction of what others take; and what DFF's layers add to an epoch of ids.

    python benchmarks/training.py [--folder DIR] [--rounds 7] [--cases NAME ...] [--recbole PYTHON] [--save]
    python benchmarks/training.py --device cuda [--save]

MicroLens-50K (LVLMREC_DATA), 10 items of history, 512 users a step; SASRec of 2 blocks, 2 heads, FFN 4d; one thread.
Every case's epoch is cut into `--rounds` parts and the cases take turns, a part each, after one batch that does not
count; the figure is the user + system time of a whole epoch, on a GPU what the clock on the wall says. Evaluations,
all 50,000 users over the whole catalogue, take turns as well; their figure is the median of three. It needs neither
Ray nor MLflow.

inbatch_64, inbatch_512            in-batch softmax with log-popularity correction, float32; _bf16: in bfloat16
full_64, bce_64                    softmax over the catalogue; binary cross-entropy with one negative
dff_raw_512                        DFF over 28 layers of 3584 dims, float16, standardised: random numbers, 3.8 GB;
                                   _bf16: in bfloat16; _sent: a GPU is sent each step's features, it holds none
dff_pca_512                        DFF over 28 layers of 512 dims, float32, the form that feature_pca leaves: random

A DFF case's `floor` is the epoch of ids and the matrix products alone that DFF adds to it: projection and gate of each
step's items, forward and both gradients. Reading the layers and all else comes on top of it.

Beside them, after the last round: RecBole's SASRec (training_recbole.py) with the Python of its environment.
Memory: each of the 512-wide cases alone in a process, ten batches; the peak of what is not a page of a mapped file.
The last line of stdout is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import real_data
from record import fenced, save

from lvlmrec import config
from lvlmrec.features.array import Column, FeatureArray
from lvlmrec.features.cache import Cache, NewArray
from lvlmrec.report.comparison import table
from lvlmrec.runs import batches, loop
from lvlmrec.runs.batches import MAX_FEATURE_SHARE, Batch, batches_of_epoch
from lvlmrec.runs.experiment import Experiment, TrainConfig, prepare

CASES: dict[str, list[str]] = {
    "inbatch_64": ["model.embedding_dim=64"],
    "inbatch_64_bf16": ["model.embedding_dim=64", "training.precision=bfloat16"],
    "full_64": ["model.embedding_dim=64", "training.loss.name=full_softmax"],
    "bce_64": [
        "model.embedding_dim=64",
        "training.loss.name=gbce",
        "training.loss.negatives=1",
        "training.loss.calibration=0",
    ],
    "inbatch_512": ["model.embedding_dim=512"],
    "inbatch_512_bf16": ["model.embedding_dim=512", "training.precision=bfloat16"],
    "dff_raw_512": ["model.embedding_dim=512", "model.item_encoder.name=dff"],
    "dff_pca_512": ["model.embedding_dim=512", "model.item_encoder.name=dff"],
    "dff_raw_512_bf16": ["model.embedding_dim=512", "model.item_encoder.name=dff", "training.precision=bfloat16"],
    "dff_raw_512_sent": ["model.embedding_dim=512", "model.item_encoder.name=dff"],
}
DEFAULT_CASES = {
    "cpu": [name for name in CASES if name not in ("dff_raw_512_bf16", "dff_raw_512_sent")],
    "cuda": ["inbatch_512", "inbatch_512_bf16", *(name for name in CASES if name.startswith("dff"))],
}
LAYERS = 28
RAW, PCA = ("raw", 3584, np.float16), ("pca", 512, np.float32)
FEATURES = {name: PCA if "pca" in name else RAW for name in CASES if name.startswith("dff")}
EVALUATED = {"64": "inbatch_64", "512": "inbatch_512"}
WITH_MEMORY = ("inbatch_512", "dff_raw_512", "dff_pca_512")
MEMORY_BATCHES = 10


class Case:
    """One configuration, its model and what is left of its epoch."""

    def __init__(self, name: str, folder: Path, device: torch.device) -> None:
        self.name, self.device = name, device
        places = [f"dataset.path={real_data() / 'microlens_50k'}", f"workspace={folder}"]
        layers = ["conf/train.yaml", "conf/dataset/microlens_50k.yaml"]
        plain = [value for value in CASES[name] if "item_encoder" not in value]
        self.config = config.load(TrainConfig, layers, [*CASES[name], *places])
        self.experiment: Experiment = prepare(config.load(TrainConfig, layers, [*plain, *places]))
        data = self.experiment.data
        self.features = None
        if name in FEATURES:
            drawn = random_features(folder, len(data.item_ids), *FEATURES[name])
            self.features = drawn.standardized(np.flatnonzero(data.train_counts))
        self.state = loop.new_state(self.config, data, self.features, device)
        self.loss = loop.Loss(self.state.model, self.config.training, data.train_counts).to(device)
        self.steps = -(-len(data.sequences) // self.config.training.batch_size)
        self.seconds = self.products = 0.0
        self.counts: list[int] = []  # items that each step encodes
        self.steps_left = self.epoch(1)
        self.train(islice(self.epoch(0), 1))

    def epoch(self, number: int) -> Iterator[Batch]:
        return batches_of_epoch(self.config, self.experiment.data, self.features, number, self.device)

    def train_part(self, number: int, rounds: int) -> None:
        """One of the `rounds` parts of the epoch, and the products that DFF adds to it."""
        self.counts.clear()
        self.seconds += self.train(
            islice(self.steps_left, self.steps * (number + 1) // rounds - self.steps * number // rounds)
        )
        if self.name in FEATURES:
            _, dim, _ = FEATURES[self.name]
            half = self.config.training.precision == "bfloat16"
            self.products += products_of(self.counts, dim, self.config.model.embedding_dim, self.device, half)

    def counted(self, steps: Iterator[Batch]) -> Iterator[Batch]:
        for batch in steps:
            self.counts.append(len(batch.items.item_index))
            yield batch

    def train(self, steps: Iterator[Batch]) -> float:
        self.load()
        steps = self.counted(steps)
        if self.device.type != "cpu":  # as in training: the next step's features are sent meanwhile
            steps = batches.prefetch(steps)
        started = seconds(self.device)
        loop.train_epoch(self.config.training, steps, self.loss, self.state.optimizer, self.device)
        return seconds(self.device) - started

    def load(self) -> None:
        """Features go to a GPU once for all epochs, so that does not count."""
        batches.columns_on_device.cache_clear()
        batches.MAX_FEATURE_SHARE = 0.0 if self.name.endswith("_sent") else MAX_FEATURE_SHARE
        batches.item_features(self.features, np.array([1]), self.device)

    def evaluate(self) -> float:
        started = seconds(self.device)
        data = self.experiment.data
        catalogue = loop.encode_catalogue(self.state.model.eval(), len(data.item_ids), self.features, self.device)
        loop.rank_holdout(self.state.model, catalogue, data.validation)
        return seconds(self.device) - started


def seconds(device: torch.device) -> float:
    """User + system time of this process; on a GPU the clock, when it has done all that it was given."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="", help="where random features are kept; a temporary folder otherwise")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[])
    parser.add_argument("--device", choices=DEFAULT_CASES, default="cpu")
    parser.add_argument("--recbole", default="", help="the Python of an environment that has RecBole")
    parser.add_argument("--measure-memory", default="", help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="write a dated result under benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    if arguments.measure_memory:
        print(peak_memory(arguments.measure_memory, Path(arguments.folder), device))
        return
    names = arguments.cases or DEFAULT_CASES[arguments.device]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary).resolve()
        result = measure(names, folder, arguments.rounds, device)
        result["peak_mb"] = {name: memory_of(name, folder, device) for name in names if name in WITH_MEMORY}
        if arguments.recbole:
            result["recbole_cpu_s"] = recbole(arguments.recbole)
    text = report(result)
    print(text)
    if arguments.save:
        print(save("training", __doc__ or "", fenced(text)))
    print(json.dumps(result))


def measure(names: list[str], folder: Path, rounds: int, device: torch.device) -> dict[str, Any]:
    """Epochs, a part of each case in turn; then evaluations in turn."""
    cases = {name: Case(name, folder, device) for name in names}
    for number in range(rounds):
        for name, case in cases.items():
            case.train_part(number, rounds)
            print(f"training: round {number + 1}/{rounds}, {name} {case.seconds:.1f} s", file=sys.stderr)
    evaluated: dict[str, list[float]] = {width: [] for width, name in EVALUATED.items() if name in cases}
    for _ in range(3):
        for width, times in evaluated.items():
            times.append(cases[EVALUATED[width]].evaluate())
    epochs = {name: round(case.seconds, 2) for name, case in cases.items()}
    over: dict[str, tuple[Case, float]] = {}
    for name, case in cases.items():
        base = "inbatch_512_bf16" if name.endswith("bf16") else "inbatch_512"
        if name in FEATURES and base in epochs:
            over[name.removeprefix("dff_").replace("_512", "")] = case, epochs[base]
    unit = "cpu_s" if device.type == "cpu" else "s"
    return {
        f"epoch_{unit}": epochs,
        f"evaluate_{unit}": {width: round(statistics.median(times), 2) for width, times in evaluated.items()},
        "dff_over_id": {name: round(case.seconds / base, 3) for name, (case, base) in over.items()},
        "dff_floor": {name: round(1 + case.products / base, 3) for name, (case, base) in over.items()},
    }


def products_of(counts: list[int], dim: int, width: int, device: torch.device, half: bool) -> float:
    """Seconds of DFF's matrix products over steps of so many items: each with its input's and weight's gradient."""
    given: Any = {"device": device, "dtype": torch.bfloat16 if half else torch.float32}
    operands = [
        (torch.randn(max(counts), inner, **given), torch.randn(width, inner, **given))
        for inner in (dim, 2 * width)  # projection, gate
    ]
    gradient = torch.randn(max(counts), width, **given)
    started = seconds(device)
    for count in counts:
        for inputs, weight in operands:
            torch.mm(inputs[:count], weight.T)
            torch.mm(gradient[:count], weight)
            torch.mm(gradient[:count].T, inputs[:count])
    return seconds(device) - started


def random_features(folder: Path, num_items: int, name: str, dim: int, dtype: type[np.floating]) -> FeatureArray:
    """Standard normal features of every item, kept in `folder`."""
    cache, rng = Cache(folder / "cache"), np.random.default_rng(0)

    def fill(arrays: Sequence[np.ndarray], numbers: Sequence[int]) -> None:
        for array in arrays:
            for start in range(1, num_items + 1, 1024):
                array[start : start + 1024] = rng.standard_normal(
                    (len(array[start : start + 1024]), dim), dtype=np.float32
                )

    keys = [f"{name}-{layer}" for layer in range(LAYERS)]
    in_use = cache.hold([NewArray(key, np.dtype(dtype), (num_items + 1, dim)) for key in keys], {}, fill)
    columns = [
        Column(f"random/llm.{layer}/visual_mean", 0, key, key, dim, np.dtype(dtype).name, in_use=(held,))
        for layer, (key, held) in enumerate(zip(keys, in_use, strict=True))
    ]
    return FeatureArray(cache, tuple(columns), name, name, np.zeros((num_items + 1, LAYERS), dtype=bool))


def recbole(python: str) -> dict[str, float]:
    """Epoch and evaluation of RecBole, in a process of its own environment."""
    pairs = real_data() / "microlens_50k" / "MicroLens-50k_pairs.tsv"
    command = [python, str(Path(__file__).with_name("training_recbole.py")), str(pairs)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def memory_of(name: str, folder: Path, device: torch.device) -> int:
    command = [sys.executable, __file__, "--measure-memory", name, "--folder", str(folder), "--device", device.type]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def peak_memory(name: str, folder: Path, device: torch.device) -> int:
    """MB of anonymous memory at most while a few batches are trained, looked at every 5 ms; on a GPU of its own."""
    case, peak, done = Case(name, folder, device), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            (line,) = (line for line in Path("/proc/self/status").read_text().split("\n") if line.startswith("RssAnon"))
            peak = max(peak, int(line.split()[1]) // 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    case.train(islice(case.epoch(1), MEMORY_BATCHES))
    done.set()
    watcher.join()
    return peak if device.type == "cpu" else torch.cuda.max_memory_allocated(device) >> 20


def report(result: dict[str, Any]) -> str:
    peaks, on_cpu = result["peak_mb"], "epoch_cpu_s" in result
    epoch, evaluate, unit = ("epoch_cpu_s", "evaluate_cpu_s", "CPU s") if on_cpu else ("epoch_s", "evaluate_s", "s")
    rows = [[name, f"{taken:.1f}", str(peaks.get(name, ""))] for name, taken in result[epoch].items()]
    text = table(["epoch", unit, "peak MB"], rows)
    text += "\n\n" + table(["evaluation, d", unit], [[d, f"{taken:.1f}"] for d, taken in result[evaluate].items()])
    for name, theirs in result.get("recbole_cpu_s", {}).items():
        ours = result[evaluate].get("64") if name == "evaluate_64" else result[epoch].get(name)
        text += f"\n\nRecBole, {name}: {theirs:.1f} s; ours takes {ours / theirs:.3f} of it" if ours else ""
    floors = result["dff_floor"]
    over = result["dff_over_id"].items()
    return text + "".join(f"\n\nDFF over ids, {name}: {ratio:.3f}, floor {floors[name]:.3f}" for name, ratio in over)


if __name__ == "__main__":
    main()
