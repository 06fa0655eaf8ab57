"""RecBole's atomic files (https://recbole.io/docs/user_guide/data/atomic_files.html), such as `ml-100k.inter`.

*.inter   tab-separated; header user_id:token, item_id:token and, if there is one, timestamp:float among others

Fields are not quoted. Every row is an interaction, whatever its rating.
"""

from __future__ import annotations

from lvlmrec.data import files, table
from lvlmrec.data.interactions import Dataset

NAMES = ("user_id:token", "item_id:token", "timestamp:float")


def load(path: str) -> Dataset:
    """The dataset of an `.inter` file, or of the folder that holds exactly one. Raises `InputError`."""
    interactions = table.read(files.find(path, (".inter",)), NAMES, quoted=False)
    return Dataset(interactions, report=interactions.report)
