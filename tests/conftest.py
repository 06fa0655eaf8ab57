"""Shared by all tests: a Ray, one torch thread, real and toy data, an S3 server, a tracking database."""

import os

# before anything imports ray
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ADDRESS"] = "local"  # else `ray.init()` joins whatever Ray was started last on this machine
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process for every group of workers
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"  # how soon Ray Train notices that a worker is done or dead
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # tests report to nobody; and Ray Data has an actor for it
os.environ.setdefault("RAY_num_workers_soft_limit", "8")  # as lvlmrec.cluster does
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import gc
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from lvlmrec.tracking import database
from tests.chaos import raylets
from tests.toy import write_world

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


def pytest_collection_finish() -> None:
    """Leave imported modules out of garbage collections: walking them takes a third of a second, each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets and videos; tests that need it skip, saying so, where it is not."""
    folder = Path(os.environ.get("LVLMREC_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data: {folder} is not there; set LVLMREC_DATA")
    return folder


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a Ray with 4 CPUs that tests share where its start is not their subject."""
    with raylets(num_workers=0, head_cpus=4) as cluster:
        yield cluster.address


@pytest.fixture(scope="module")
def local_ray(ray_address: str) -> Iterator[str]:
    """The module's tests are drivers of the shared Ray; gives its address."""
    import ray

    ray.init(ray_address, log_to_driver=False)
    yield ray_address
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[str]:
    """A real S3 protocol server in a process of its own; gives its endpoint.

    moto, or with the parameter "s3rver" (npm) that one, which shares no code with moto and ignores `If-None-Match`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    if getattr(request, "param", "moto") == "s3rver":
        folder = str(tmp_path_factory.mktemp("s3rver"))
        command = [_s3rver(), "--directory", folder, "--address", "127.0.0.1", "--port", str(port), "--silent"]
    environment = os.environ | {"NODE_OPTIONS": "--openssl-legacy-provider"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the S3 server ended"
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)


def _s3rver() -> str:
    program = os.environ.get("LVLMREC_S3RVER") or shutil.which("s3rver")
    if not program:
        pytest.skip("no s3rver: npm install s3rver, then set LVLMREC_S3RVER to node_modules/.bin/s3rver")
    return program


def credentials(s3_server: str) -> dict[str, str]:
    """What the environment must hold for the S3 server to be used."""
    return {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "S3RVER",  # what s3rver takes; moto takes any
        "AWS_SECRET_ACCESS_KEY": "S3RVER",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh bucket on the S3 server, as `s3://name`; the environment points to the server."""
    import boto3

    for name, value in credentials(s3_server).items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{time.monotonic_ns()}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy world's interactions and features; nothing may write there."""
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow database for all tests: making its tables takes seconds.

    It exists from the start, so that a test may look into it while a job has hardly begun.
    """
    file = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    with database.prepared(file):
        return database.uri_of(file)


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Handlers of signals that a job sets in this process are taken back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def never(resolved: Any, run: Any) -> NoReturn:
    """The body of a job that must not start."""
    raise AssertionError("the job started")
