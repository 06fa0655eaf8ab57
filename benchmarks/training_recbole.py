"""RecBole's SASRec on the data of benchmarks/training.py; run by it with the Python of RecBole's own environment.

    RECBOLE_PYTHON benchmarks/training_recbole.py PAIRS.tsv

RecBole 1.2.1 wants numpy < 2: `pip install torch==2.3.1 'numpy<2' 'pandas<2.3' 'scipy<1.14'`, then
`pip install --no-deps recbole==1.2.1` and what its imports name. The users and their last 13 items are those that
MicroLens' protocol keeps; two blocks, two heads, FFN 4d, dropout 0.1; its own way of training: every position a sample,
softmax over the catalogue, 2048 samples a step, about as many as 512 users have here. One thread; user + system seconds
of an epoch, and of ranking the validation targets of all users over the whole catalogue. The last line is JSON.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch

for old in ("bool8", "float_", "complex_", "unicode_", "object0", "int0"):  # names that RecBole 1.2.1 still asks for
    if not hasattr(numpy, old):
        setattr(numpy, old, {"float_": numpy.float64, "complex_": numpy.complex128}.get(old, numpy.bool_))

SETTINGS = {
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "TIME_FIELD": "timestamp",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": 10,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "train_neg_sample_args": None,
    "loss_type": "CE",
    "n_layers": 2,
    "n_heads": 2,
    "hidden_size": 64,
    "inner_size": 256,
    "hidden_dropout_prob": 0.1,
    "attn_dropout_prob": 0.1,
    "hidden_act": "relu",
    "train_batch_size": 2048,
    "eval_batch_size": 2048,
    "metrics": ["Hit", "NDCG"],
    "topk": [10, 20],
    "valid_metric": "Hit@10",
    "use_gpu": False,
    "show_progress": False,
    "state": "ERROR",
    "seed": 0,
}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_atomic(Path(sys.argv[1]), Path(folder, "pairs"))
        os.chdir(folder)
        print(json.dumps(measure(folder)))


def write_atomic(pairs: Path, folder: Path) -> None:
    """The last 13 items of every user with at least 5, as RecBole reads them."""
    folder.mkdir()
    with Path(folder, "pairs.inter").open("w") as out:
        out.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for line in pairs.read_text().splitlines():
            user, items = line.split("\t")
            kept = items.split()
            if len(kept) >= 5:
                out.writelines(f"{user}\t{item}\t{place}\n" for place, item in enumerate(kept[-13:]))


def measure(folder: str) -> dict:
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer

    config = Config(model="SASRec", dataset="pairs", config_dict={**SETTINGS, "data_path": folder})
    dataset = create_dataset(config)
    train, valid, _ = data_preparation(config, dataset)
    model = SASRec(config, train.dataset)
    trainer = Trainer(config, model)
    started = time.process_time()
    trainer._train_epoch(train, 0)
    trained = time.process_time()
    trainer.evaluate(valid, load_best_model=False)
    return {"full_64": round(trained - started, 2), "evaluate_64": round(time.process_time() - trained, 2)}


if __name__ == "__main__":
    main()
