"""Baselines, which every model has to beat. One file and one line each."""

from lvlmrec.baselines.base import Baseline
from lvlmrec.baselines.item_knn import ItemKNN
from lvlmrec.baselines.markov import Markov
from lvlmrec.baselines.popularity import Popularity

BASELINES: dict[str, type[Baseline]] = {
    "popularity": Popularity,
    "item_knn": ItemKNN,
    "markov": Markov,
}
