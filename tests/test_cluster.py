"""How the jobs come by a Ray."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import ray

from lvlmrec import cluster


@pytest.fixture(autouse=True)
def ray_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda: nullcontext(dict(os.environ).get("RAY_num_workers_soft_limit")))


def test_a_ray_of_its_own_keeps_workers_between_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_num_workers_soft_limit", "")  # what the test sets is taken back with it
    monkeypatch.delenv("RAY_num_workers_soft_limit")
    with cluster.joined() as kept:
        assert int(str(kept)) >= cluster.MIN_IDLE_WORKERS


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_num_workers_soft_limit", "3")
    with cluster.joined() as kept:
        assert kept == "3"


def test_a_ray_that_is_there_is_joined_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with cluster.joined() as joined:
        assert joined is None
