"""The Ray that tests share comes up although a node fails to start, and says why when it never does."""

import os
import subprocess
import sys
from typing import Any

import psutil
import pytest
import ray.cluster_utils

from tests import chaos

Begun = list[tuple["subprocess.Popen[bytes]", bool]]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Begun:
    """A stand-in for Ray's cluster whose first `request.param` nodes die on the way; the processes of all nodes."""
    nodes: Begun = []

    class Cluster:
        def __init__(self) -> None:
            self.nodes: list[subprocess.Popen[bytes]] = []

        def add_node(self, **settings: Any) -> None:
            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            fails = len(nodes) < request.param
            nodes.append((process, fails))
            if fails:
                raise RuntimeError(f"node {len(nodes)} did not register")
            self.nodes.append(process)

        def wait_for_nodes(self) -> None:
            pass

        def shutdown(self) -> None:
            chaos._end({psutil.Process(node.pid) for node in self.nodes})

    monkeypatch.setattr(ray.cluster_utils, "Cluster", Cluster)
    return nodes


def running(begun: Begun) -> list[bool]:
    return [process.poll() is None for process, _ in begun]


@pytest.mark.parametrize("begun", [1, 2], indirect=True)
def test_a_start_that_fails_is_tried_again_and_leaves_no_process(begun: Begun) -> None:
    path = os.environ.get("PYTHONPATH", "")
    with chaos.raylets(num_workers=1):
        assert running(begun)[-2:] == [True, True]
        assert not any(alive for alive, (_, fails) in zip(running(begun), begun, strict=True) if fails)
    assert not any(running(begun))
    assert os.environ.get("PYTHONPATH", "") == path


@pytest.mark.parametrize("begun", [3, 9], indirect=True)
def test_the_third_failure_raises_its_reason(begun: Begun) -> None:
    with pytest.raises(RuntimeError, match="node 3 did not register"), chaos.raylets():
        pass
    assert len(begun) == 3 and not any(running(begun))
