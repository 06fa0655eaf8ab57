"""Queries, loss and gradients of RecBole's SASRec under random weights: what tests/models/test_sasrec.py compares with.

    RECBOLE_PYTHON benchmarks/sasrec_recbole.py tests/models/sasrec_recbole.npz

Run in RecBole's own environment (see training_recbole.py); needed again only when the comparison is to hold more. The
file holds RecBole's parameters by their names, histories of every length, and for each the query, the cross-entropy
over all items of its label, and the gradient of their mean for every parameter.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from training_recbole import SETTINGS, write_atomic

NUM_ITEMS, LENGTH = 9, 5
SIZES = {
    "hidden_size": 8,
    "inner_size": 32,
    "initializer_range": 0.4,
    "layer_norm_eps": 1e-6,
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "MAX_ITEM_LIST_LENGTH": LENGTH,
}


def main() -> None:
    target = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            f"{user}\t" + " ".join(str((user + step) % NUM_ITEMS) for step in range(6)) for user in range(NUM_ITEMS)
        ]
        Path(folder, "pairs.tsv").write_text("\n".join(lines))
        write_atomic(Path(folder, "pairs.tsv"), Path(folder, "pairs"))
        os.chdir(folder)
        np.savez_compressed(target, **made(folder))


def made(folder: str) -> dict:
    from recbole.config import Config
    from recbole.data import create_dataset
    from recbole.model.sequential_recommender import SASRec

    config = Config(model="SASRec", dataset="pairs", config_dict={**SETTINGS, **SIZES, "data_path": folder})
    torch.manual_seed(0)
    model = SASRec(config, create_dataset(config)).double()
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    lengths = torch.tensor([1, 2, 3, 4, 5, 5])
    histories = torch.zeros(len(lengths), LENGTH, dtype=torch.int64)
    for row, length in enumerate(lengths.tolist()):
        histories[row, :length] = torch.randint(1, NUM_ITEMS + 1, (length,))
    labels = torch.randint(1, NUM_ITEMS + 1, (len(lengths),))
    queries = model(histories, lengths)
    scores = queries @ model.item_embedding.weight[1:].T
    loss = torch.nn.functional.cross_entropy(scores, labels - 1)
    loss.backward()
    arrays = {"histories": histories, "lengths": lengths, "labels": labels, "queries": queries, "loss": loss}
    for name, parameter in model.named_parameters():
        arrays |= {f"weights/{name}": parameter, f"gradients/{name}": parameter.grad}
    return {name: value.detach().numpy() for name, value in arrays.items()}


if __name__ == "__main__":
    main()
