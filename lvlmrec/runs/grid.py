"""A study as facts: methods, the settings tried of each, seeds, and in which order their runs are done.

    trials   every method x setting at the first seed; the setting that is best on validation is chosen
    finals   the chosen setting of every method at every seed; they alone are evaluated on test

Methods come first, then settings and seeds: whenever a study stops, as many methods as possible can be compared.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lvlmrec import config as configs
from lvlmrec import storage
from lvlmrec.baselines import BASELINES
from lvlmrec.baselines.item_knn import NEIGHBOURS_HELP, NUM_NEIGHBOURS
from lvlmrec.config import MAX_SEED, check_gpus, option
from lvlmrec.errors import ConfigError
from lvlmrec.runs.experiment import NOT_LEARNED, TrainConfig, check_one_process

# One split, one budget: neither a method nor the search may change them.
SAME_FOR_ALL = (
    "workspace",
    "tracking_uri",
    "cache",
    "cache_gb",
    "seed",
    "dataset",
    "training.epochs",
    "training.patience",
    "training.validation_users",
)
NOT_DECIDING = ("study.max_concurrent", "study.cpus_per_run", "study.gpus_per_run", *NOT_LEARNED)
NAME = re.compile(r"[\w .:-]+")  # of a folder
METHOD = re.compile(r"[^,|\x00-\x1f\x7f]+")  # commas and bars separate in messages and tables


@dataclass(frozen=True)
class StudySettings:
    """What is compared, and on what."""

    name: str = option("sample", "name of the folder with the tables")
    methods: dict[str, Any] = option(
        {
            "ID": {"model.item_encoder.name": "id"},
            "fusion llm.0": {
                "model.item_encoder.name": "fusion",
                "feature_columns": ["describe/llm.0/visual_mean"],
            },
            "fusion llm.4": {
                "model.item_encoder.name": "fusion",
                "feature_columns": ["describe/llm.4/visual_mean"],
            },
            "mean": {"model.item_encoder.name": "mean"},
            "DFF": {"model.item_encoder.name": "dff"},
            "DFF shuffled": {"model.item_encoder.name": "dff", "feature_control": "shuffled"},
        },
        "name -> the keys of the train job that it changes",
    )
    search: dict[str, Any] = option(
        {"training.lr": [1e-3, 2e-3]}, "key -> values: every combination is tried of every method, at the first seed"
    )
    seeds: list[int] = option(
        [0, 1],
        "the chosen setting is trained and tested with each",
        minimum=0,
        maximum=MAX_SEED,
        required=True,
        distinct=True,
    )
    reference: str = option("ID", "the method that every other is tested against")
    baselines: list[str] = option(
        ["popularity", "item_knn", "markov"],
        "baselines, fitted and ranked once on the same split",
        choices=BASELINES,
        distinct=True,
    )
    item_knn_neighbours: int = option(NUM_NEIGHBOURS, NEIGHBOURS_HELP, minimum=1)
    max_concurrent: int = option(2, "runs at the same time", minimum=1)
    cpus_per_run: int = option(1, "CPUs that Ray reserves for one run, and its number of threads", minimum=1)
    gpus_per_run: float = option(
        0.0, "GPUs that Ray reserves for one run: 1, or a share of one; 0: it runs on CPU", minimum=0
    )

    def check(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"name: {self.name!r} is not a folder's name of letters, digits, blanks, .:-_")
        if self.reference not in (names := [str(name) for name in self.methods]):
            raise ConfigError(f"reference: {self.reference!r} is not one of {', '.join(names)}")
        check_gpus("gpus_per_run", self.gpus_per_run)


@dataclass(frozen=True)
class StudyConfig(TrainConfig):
    """The study job: everything of the train job as the base of all methods, and what is compared."""

    study: StudySettings = option(StudySettings, "methods, search, seeds")

    def check(self) -> None:
        """What the train job checks is checked of each method: the base alone need not be a run."""
        check_one_process(self.training, "a run of a study", "study.gpus_per_run")


class Trial(NamedTuple):
    """One training run of a study."""

    method: str
    setting: int  # its place among the settings
    seed: int


class Step(NamedTuple):
    """What is done next: a training run, or its evaluation on test."""

    action: str  # train or evaluate
    trial: Trial


@dataclass(frozen=True)
class Plan:
    """Everything a study may do: `configs[method][setting]` is the first seed's run."""

    configs: dict[str, list[TrainConfig]]
    settings: list[dict[str, Any]]
    seeds: list[int]
    reference: str

    @property
    def methods(self) -> list[str]:
        return list(self.configs)

    def trials(self) -> list[Trial]:
        """The search of all methods, setting by setting."""
        return [Trial(name, k, self.seeds[0]) for k in range(len(self.settings)) for name in self.methods]

    def config(self, trial: Trial) -> TrainConfig:
        """What the train job would be given for the same run."""
        given = configs.to_dict(self.configs[trial.method][trial.setting]) | {"seed": trial.seed}
        return configs.load(TrainConfig, [given])


@dataclass
class Outcomes:
    """What is known by now: results of training and evaluation, and why steps failed."""

    trained: dict[Trial, dict[str, Any]]
    evaluated: dict[Trial, dict[str, Any]]
    failed: dict[Step, str]

    @property
    def ended(self) -> set[Step]:
        done = {Step("train", trial) for trial in self.trained} | {Step("evaluate", trial) for trial in self.evaluated}
        return done | set(self.failed)


def make_plan(config: StudyConfig) -> Plan:
    """The study that `config` describes. Raises `ConfigError` naming the method and the key."""
    study = config.study
    search = _search(study.search)
    settings = [dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())]
    methods = {str(name): _overrides(str(name), keys, search) for name, keys in study.methods.items()}
    made = {
        name: [_configured(config, name, keys | setting, study.seeds[0]) for setting in settings]
        for name, keys in methods.items()
    }
    for one, other in itertools.combinations(made, 2):
        if made[one] == made[other]:
            raise ConfigError(f"study.methods.{other}: the same as {one}, under another name")
    return Plan(made, settings, list(study.seeds), study.reference)


def choose(plan: Plan, outcomes: Outcomes) -> dict[str, int]:
    """The setting of each method whose trials have all ended: best on validation, the first of equals.

    A method without a trial that succeeded has none.
    """
    chosen = {}
    for name in plan.methods:
        selected_by = plan.configs[name][0].dataset.selected_by
        trials = [trial for trial in plan.trials() if trial.method == name]
        if all(Step("train", trial) in outcomes.ended for trial in trials):
            succeeded = [trial for trial in trials if trial in outcomes.trained]
            if succeeded:
                best = max(succeeded, key=lambda trial: outcomes.trained[trial]["validation"][selected_by])
                chosen[name] = best.setting
    return chosen


def num_tried(plan: Plan, outcomes: Outcomes, method: str) -> int:
    """Among how many settings of a method the best is chosen: those whose run succeeded."""
    return sum(trial in outcomes.trained for trial in plan.trials() if trial.method == method)


def next_steps(plan: Plan, outcomes: Outcomes) -> list[Step]:
    """All that can be done now and has not ended, the most urgent first."""
    chosen = choose(plan, outcomes)
    finals = [Trial(name, chosen[name], seed) for seed in plan.seeds for name in plan.methods if name in chosen]
    steps = [Step("evaluate", trial) for trial in finals if trial in outcomes.trained]
    steps += [Step("train", trial) for trial in dict.fromkeys([*plan.trials(), *finals])]
    ended = outcomes.ended
    return [step for step in steps if step not in ended]


def folder(config: StudyConfig) -> str:
    """Where the tables go; named by the hash of everything that decides them."""
    flat = dict(configs.flatten(configs.to_dict(config)))
    deciding = {key: value for key, value in flat.items() if key not in NOT_DECIDING}
    key = hashlib.blake2b(json.dumps(deciding).encode(), digest_size=6).hexdigest()
    return storage.join(config.workspace, "studies", f"{config.study.name}-{key}")


def _search(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    search = dict(configs.flatten(given))
    for key, values in search.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"study.search.{key}: {values!r} is not a list of values")
        if len({json.dumps(value) for value in values}) < len(values):
            raise ConfigError(f"study.search.{key}: {values!r}: a value is given twice")
        _refuse_shared(f"study.search.{key}", key)
    return search


def _overrides(name: str, given: Any, searched: Collection[str]) -> dict[str, Any]:
    """The dotted keys that a method changes."""
    if not METHOD.fullmatch(name):
        raise ConfigError(f"study.methods.{name}: a name is made of printable characters, without commas and bars")
    if not isinstance(given, dict):
        raise ConfigError(f"study.methods.{name}: {given!r} is not a group of keys")
    overrides = dict(configs.flatten(given))
    for key in overrides:
        _refuse_shared(f"study.methods.{name}.{key}", key)
        if key in searched:
            raise ConfigError(f"study.methods.{name}.{key}: it is searched, in study.search, of every method")
    return overrides


def _refuse_shared(place: str, key: str) -> None:
    for same in (*SAME_FOR_ALL, *NOT_LEARNED, "study"):
        if key == same or key.startswith(f"{same}."):
            raise ConfigError(f"{place}: {same} is the same for every method of a study")


def _configured(config: StudyConfig, name: str, overrides: Mapping[str, Any], seed: int) -> TrainConfig:
    """The base with a method's keys; a part that it chooses by another name starts from that part's defaults."""
    tree = configs.to_dict(config)
    del tree["study"]
    tree["seed"] = seed
    # Names first: they decide which other keys there are.
    for key in sorted(overrides, key=lambda key: not key.endswith(".name")):
        *path, last = key.split(".")
        parents, node = {}, tree
        for part in path:
            parents, node = node, node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"study.methods.{name}.{key}: {part} is not a group of keys")
        if last == "name" and node.get("name") != overrides[key] and path:
            parents[path[-1]] = {"name": overrides[key]}
        else:
            node[last] = overrides[key]
    try:
        return configs.with_uris(configs.load(TrainConfig, [tree]), storage.absolute)  # a method may name features
    except ConfigError as error:
        raise ConfigError(f"study.methods.{name}: {error}") from error
