"""MicroLens (https://github.com/westlake-repl/MicroLens): `*_pairs.tsv` or `*_pairs.csv`, and titles.

*_pairs.tsv   no header; user, a tab, the user's items separated by spaces, oldest first
*_pairs.csv   header user,item,timestamp (milliseconds)
"""

from __future__ import annotations

from lvlmrec.data import files, sequences, table
from lvlmrec.data.interactions import Dataset

ENDINGS = ("_pairs.tsv", "_pairs.csv")


def load(path: str) -> Dataset:
    """The dataset of a pairs file, or of the folder that holds exactly one, with the titles file beside it.

    Titles: `<prefix>_titles.csv` or `<prefix>_title_en.csv`, where the pairs file is `<prefix>_pairs.*`.
    Raises `InputError`.
    """
    file = files.find(path, ENDINGS)
    is_tsv = file.endswith(".tsv")
    interactions = sequences.read(file, "\t") if is_tsv else table.read(file, ("user", "item", "timestamp"))
    return table.with_titles(interactions, file, "_pairs" + file[-len(".tsv") :])
