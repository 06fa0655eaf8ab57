"""How the jobs come by a Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import ray
from ray._private import services

from lvlmrec import cluster

LIMITS = ("RAY_num_workers_soft_limit", "RAY_task_events_max_num_task_in_gcs")


@pytest.fixture(autouse=True)
def ray_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda: nullcontext([os.environ.get(name) for name in LIMITS]))


def test_a_ray_of_its_own_keeps_workers_between_tasks_and_no_more_than_the_dashboard_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in LIMITS:
        monkeypatch.setenv(name, "")  # what the test sets is taken back with it
        monkeypatch.delenv(name)
    with cluster.joined() as limits:
        workers, records = map(int, limits)  # type: ignore[call-overload]
    assert workers >= cluster.MIN_IDLE_WORKERS
    assert records == cluster.MAX_TASK_RECORDS


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIMITS:
        monkeypatch.setenv(name, "3")
    with cluster.joined() as limits:
        assert limits == ["3", "3"]


def test_what_is_said_on_stderr_while_ray_starts_is_kept_but_for_its_level(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ray's C++ code reads the level from the process's environment, which Python's mapping does not show."""
    command = "echo seen >&2; echo I logging.cc: Set ray log level from RAY_BACKEND_LOG_LEVEL to 3 >&2; exit"

    def start() -> None:
        assert "RAY_BACKEND_LOG_LEVEL" not in os.environ, "processes that Ray starts would be silent too"
        assert os.system(f'test "$RAY_BACKEND_LOG_LEVEL" = fatal || {{ echo loud >&2; }}; {command}') == 0
        raise ConnectionError("no Ray")

    monkeypatch.delenv("RAY_BACKEND_LOG_LEVEL", raising=False)
    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(ConnectionError):
        cluster.join()
    assert capfd.readouterr().err == "seen\n"
    assert os.system('test -z "$RAY_BACKEND_LOG_LEVEL"') == 0


def test_a_ray_that_is_there_is_joined_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with cluster.joined() as joined:
        assert joined is None


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_broken_off_job_holds_ends_before_ray_is_left(monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    order: list[str] = []

    class Pipeline:
        def __del__(self) -> None:
            order.append("pipeline")

    @contextmanager
    def ray_context() -> Iterator[None]:
        try:
            yield
        finally:
            order.append("ray")

    def work() -> None:
        pipeline = Pipeline()
        raise KeyboardInterrupt(str(type(pipeline)))

    def job() -> None:
        try:
            work()
        except KeyboardInterrupt as error:
            if wrapped:
                raise RuntimeError("interrupted") from error
            raise

    monkeypatch.setattr(ray, "init", ray_context)
    with pytest.raises((KeyboardInterrupt, RuntimeError)) as caught, cluster.joined():
        job()
    assert caught and order == ["pipeline", "ray"]


def test_rays_signal_handlers_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> nullcontext[None]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return nullcontext()

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", init)
    with cluster.joined():
        assert signal.getsignal(signal.SIGTERM) == before


def test_rays_processes_are_not_in_the_group_that_a_signal_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []

    def init() -> nullcontext[None]:
        process = services.start_ray_process(["sleep", "60"], "test", fate_share=False).process
        groups.append(os.getpgid(process.pid))
        process.kill()
        process.wait()
        return nullcontext()

    original = services.ConsolePopen
    monkeypatch.setattr(ray, "init", init)
    with cluster.joined():
        assert groups and os.getpgrp() not in groups
    assert services.ConsolePopen is original
