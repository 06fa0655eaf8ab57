"""TikTok as multimodal recommenders use it (DiffMM, https://arxiv.org/abs/2406.11781): its own split, no timestamps.

train.tsv, validation.tsv, test.tsv   header user_id, item_id

Ids count from 0, and row k of the feature arrays that come with these files is item k. The files are sorted by user and
item, and a user's held-out item is always the one with the largest id. A model that reads histories in the order of the
file would learn the split from it (a Markov chain hits nearly twice as many targets), so the rows are shuffled, with a
fixed seed.
"""

from __future__ import annotations

import numpy as np

from lvlmrec.data import table
from lvlmrec.data.interactions import TEST, TRAINING, VALIDATION, Dataset, from_columns
from lvlmrec.errors import InputError

FILES = {"train.tsv": TRAINING, "validation.tsv": VALIDATION, "test.tsv": TEST}


def load(path: str) -> Dataset:
    """The dataset of the folder that holds the three files. Raises `InputError`."""
    if path.endswith(tuple(FILES)):
        raise InputError(f"dataset.path={path!r}: expected the folder that holds {', '.join(FILES)}")
    tables = [table.read_columns(f"{path.rstrip('/')}/{name}", quoted=False) for name in FILES]
    users, items = (np.concatenate(columns) for columns in zip(*((t.users, t.items) for t in tables), strict=True))
    parts = np.repeat(np.array([*FILES.values()], dtype=np.int8), [len(t.users) for t in tables])
    drawn = np.random.default_rng(0).permutation(len(parts))
    report = {"malformed_lines": sum(t.malformed for t in tables)}
    interactions = from_columns(users[drawn], items[drawn], report=report, parts=parts[drawn])
    return Dataset(interactions, report=interactions.report)
