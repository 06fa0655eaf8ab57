"""What a study found: its methods, their numbers over the seeds, and their tests against the reference.

A method against the reference, over the seeds that both have: the p value is that of Student's paired t-test over the
seeds, with Holm's correction over all methods that have one. Beside it stands `p_users`, of the sign-flip permutation
test over users of each user's mean over the seeds, which takes these runs as given and leaves the seeds out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lvlmrec.columns import ITEM_ID, ITEM_RANK, USER_ID
from lvlmrec.errors import InputError
from lvlmrec.evaluation.metrics import per_user
from lvlmrec.evaluation.shown import (
    DIFFERENCE,
    P_HOLM,
    P_SEEDS,
    P_USERS,
    SEEDS_COMPARED,
    Shown,
    shown_for,
)
from lvlmrec.evaluation.significance import holm, paired_t_test, permutation_test
from lvlmrec.runs.evaluating import read_ranks
from lvlmrec.runs.experiment import TrainConfig
from lvlmrec.runs.grid import Outcomes, Plan, Step, Trial, choose, num_tried

TESTS = {"difference": DIFFERENCE, "p_seeds": P_SEEDS, "p_seeds_holm": P_HOLM, "p_users": P_USERS}  # JSON key -> column
NUM_RESAMPLES = 10_000  # means over seeds have many distinct differences, and each costs that many draws


@dataclass(frozen=True)
class Method:
    """What is known of a method by now; `results` and `evaluations` are those of the chosen setting, by seed."""

    name: str
    config: TrainConfig
    setting: dict[str, Any] | None
    status: str
    trials: int
    results: dict[int, dict[str, Any]]
    evaluations: dict[int, dict[str, Any]]

    @property
    def backbone(self) -> str:
        return self.config.model.backbone.name

    @property
    def item_encoder(self) -> str:
        return self.config.model.item_encoder.name

    @property
    def feature_control(self) -> str:
        return self.config.feature_control

    @property
    def names_columns(self) -> bool:
        """Whether its configuration says which feature columns it reads."""
        return bool(self.config.feature_columns)

    @property
    def columns(self) -> list[str]:
        """The feature columns that it read; none before its first run has ended."""
        return next((result["feature_columns"] for result in self.results.values()), [])

    @property
    def shown(self) -> Shown:
        return shown_for(self.config.dataset.several_targets)

    def test(self, metric: str) -> list[float]:
        """The metric of each seed that is evaluated, in the seeds' order."""
        return [evaluation["test"][metric] for evaluation in self.evaluations.values()]


def collect(plan: Plan, outcomes: Outcomes) -> list[Method]:
    """Every method of the study, in its order."""
    chosen = choose(plan, outcomes)
    methods = []
    for name in plan.methods:
        tried = [trial for trial in plan.trials() if trial.method == name]
        finals = [Trial(name, chosen[name], seed) for seed in plan.seeds] if name in chosen else []
        methods.append(
            Method(
                name=name,
                config=plan.configs[name][chosen.get(name, 0)],
                setting=plan.settings[chosen[name]] if name in chosen else None,
                status=_status(plan, outcomes, tried, finals),
                trials=num_tried(plan, outcomes, name),
                results={trial.seed: outcomes.trained[trial] for trial in finals if trial in outcomes.trained},
                evaluations={trial.seed: outcomes.evaluated[trial] for trial in finals if trial in outcomes.evaluated},
            )
        )
    return methods


def _status(plan: Plan, outcomes: Outcomes, tried: list[Trial], finals: list[Trial]) -> str:
    steps = [Step("train", trial) for trial in dict.fromkeys([*tried, *finals])]
    steps += [Step("evaluate", trial) for trial in finals if Step("train", trial) not in outcomes.failed]
    failed = sum(step in outcomes.failed for step in steps)
    expected = 0 if finals or failed == len(tried) else 2 * len(plan.seeds) - 1  # not known by name yet
    pending = sum(step not in outcomes.ended for step in steps) + expected
    parts = [f"{failed} failed"] * bool(failed) + [f"{pending} pending"] * bool(pending)
    return ", ".join(parts) or "complete"


def rows(methods: Sequence[Method], baselines: Mapping[str, Any], reference: str) -> list[dict[str, Any]]:
    """One row for each baseline and method: numbers, None where there is none yet."""
    shown = methods[0].shown
    made = [_baseline_row(name, result, shown) for name, result in baselines.items()]
    against = tests(methods, reference)
    for method in methods:
        results = list(method.results.values())
        row: dict[str, Any] = {
            "method": method.name,
            "status": method.status,
            "setting": None if method.setting is None else describe(method.setting),
            "trials": method.trials,
            "seeds": len(method.evaluations),
            "parameters": results[0]["parameters"] if results else None,
            "seconds_per_epoch": float(np.mean([r["seconds_per_epoch"] for r in results])) if results else None,
        }
        for metric in shown.validation:
            row |= _mean_and_sd(f"validation {metric}", [result["validation"][metric] for result in results])
        for metric in shown.test:
            row |= _mean_and_sd(f"test {metric}", method.test(metric))
        row |= _by_slice([result.get("validation_slices", {}) for result in results], shown.sliced, "validation ")
        row |= _by_slice([evaluation["slices"] for evaluation in method.evaluations.values()], shown.sliced)
        made.append(row | against.get(method.name, {}))
    return made


def tests(methods: Sequence[Method], reference: str) -> dict[str, dict[str, Any]]:
    """For each other method that shares a tested seed with the reference: differences and p values, by metric.

    The p values over seeds are None with fewer than two seeds, or where all of them differ alike.
    """
    base = next(method for method in methods if method.name == reference)
    found: dict[str, dict[str, Any]] = {}
    for metric in base.shown.tested:
        over_seeds = {}
        for method in methods:
            seeds = [seed for seed in method.evaluations if seed in base.evaluations]
            if method.name == reference or not seeds:
                continue
            ours, theirs = ([m.evaluations[seed] for seed in seeds] for m in (method, base))
            compared = compare(*(tuple(e["ranks"] for e in evaluations) for evaluations in (ours, theirs)), metric)
            values = [[e["test"][metric] for e in evaluations] for evaluations in (ours, theirs)]
            p_value = paired_t_test(*values)["p_value"] if len(seeds) > 1 else None
            if p_value is not None:
                over_seeds[method.name] = p_value
            found.setdefault(method.name, {SEEDS_COMPARED: len(seeds)}).update(
                {
                    f"{DIFFERENCE} {metric}": compared["difference"],
                    f"{P_SEEDS} {metric}": p_value,
                    f"{P_HOLM} {metric}": None,
                    f"{P_USERS} {metric}": compared["p_users"],
                }
            )
        for name, p_value in holm(over_seeds).items():
            found[name][f"{P_HOLM} {metric}"] = p_value
    return found


@cache
def compare(ours: tuple[str, ...], theirs: tuple[str, ...], metric: str) -> Mapping[str, float | int]:
    """The permutation test of users' means over seeds; ranks by URI, seed by seed. Raises `InputError`."""
    if _targets(ours[0]) != _targets(theirs[0]):
        raise InputError(f"ranks {ours[0]!r}: its users and targets are not those of {theirs[0]!r}")
    mean, other = (np.mean([_user_metric(uri, metric) for uri in uris], axis=0) for uris in (ours, theirs))
    return permutation_test(mean, other, NUM_RESAMPLES)


@cache
def _user_metric(uri: str, metric: str) -> np.ndarray:
    ranks = read_ranks(uri)
    return per_user(ranks[ITEM_RANK].to_numpy(), metric, ranks[USER_ID].to_numpy())


@cache
def _targets(uri: str) -> int:
    ranks = read_ranks(uri).sort_values([USER_ID, ITEM_ID])
    return hash((*ranks[USER_ID], *ranks[ITEM_ID]))


def summary(methods: Sequence[Method], reference: str) -> dict[str, dict[str, Any]]:
    """The numbers of `rows` for the JSON result, by method: by metric the mean, the standard deviation and the tests.

    `against` names the reference; of the reference itself, and of a method that shares no seed with it, there is none.
    """
    found, compared = {}, tests(methods, reference)
    for method in methods:
        results = list(method.results.values())
        measured = {
            "validation": {metric: [r["validation"][metric] for r in results] for metric in method.shown.validation},
            "test": {metric: method.test(metric) for metric in method.shown.test},
        }
        made: dict[str, Any] = {"setting": method.setting, "seeds": list(method.evaluations)}
        for part, metrics in measured.items():
            spread = {metric: _mean_and_sd("mean", values) for metric, values in metrics.items() if values}
            made[part] = {metric: each["mean"] for metric, each in spread.items()}
            made[f"{part}_sd"] = {metric: each["mean sd"] for metric, each in spread.items()}
        if row := compared.get(method.name):
            tested = {m: {name: row[f"{kind} {m}"] for name, kind in TESTS.items()} for m in method.shown.tested}
            made["against"] = {"reference": reference, "seeds": row[SEEDS_COMPARED], **tested}
        found[method.name] = made
    return found


def _baseline_row(name: str, result: Mapping[str, Any], shown: Shown) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "status": "complete"}
    for part, names in (("validation", shown.validation), ("test", shown.test)):
        for metric in names:
            row |= _mean_and_sd(f"{part} {metric}", [result[part][metric]])
    row |= _by_slice([result.get("validation_slices", {})], shown.sliced, "validation ")
    return row | _by_slice([result["slices"]], shown.sliced)


def _by_slice(slices: Sequence[Mapping[str, Any]], metric: str, prefix: str = "") -> dict[str, float]:
    """Mean over runs of the metric of each part of the users, named with their number.

    Empty where a run has none: those of earlier versions have none of validation.
    """
    if not all(slices) or not slices:
        return {}
    return {
        f"{prefix}{metric} of {name} ({part['users']:,})": float(np.mean([each[name][metric] for each in slices]))
        for name, part in slices[0].items()
        if name != "overall" and part["users"]
    }


def _mean_and_sd(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {
        name: float(np.mean(values)) if values else None,
        f"{name} sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }


def describe(setting: Mapping[str, Any]) -> str:
    """A setting as text: `lr 0.001, embedding_dim 128`."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in setting.items()) or "as given"
