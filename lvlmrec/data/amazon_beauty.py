"""Amazon Beauty, 5-core, as sequential recommenders use it (S3-Rec, https://arxiv.org/abs/2008.07873).

*.txt   no header; user item item ..., oldest first, ids renumbered, separated by spaces; neither times nor titles
"""

from __future__ import annotations

from lvlmrec.data import files, sequences
from lvlmrec.data.interactions import Dataset


def load(path: str) -> Dataset:
    """The dataset of the text file, or of the folder that holds exactly one. Raises `InputError`."""
    interactions = sequences.read(files.find(path, (".txt",)), " ")
    return Dataset(interactions, report=interactions.report)
