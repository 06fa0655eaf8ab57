"""cluster.yaml against Ray's own schema, offline."""

import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parent.parent / "cluster.yaml"


def validated(config: dict) -> dict:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


def test_ray_accepts_it() -> None:
    config = validated(yaml.safe_load(CLUSTER.read_text()))
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"]["GPU"] >= 1
    assert "GPU" not in types["decode"]["resources"]
    assert all(types[name]["min_workers"] < types[name]["max_workers"] for name in ("decode", "gpu"))


def test_authentication_is_the_same_on_head_and_workers() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=disabled ray start" in commands[-1]


def test_nodes_have_what_the_project_needs() -> None:
    needed = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    commands = yaml.safe_load(CLUSTER.read_text())["setup_commands"]
    assert set(needed) <= {word for command in commands for word in shlex.split(command)}


def test_a_misspelt_key_would_be_caught() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    config["max_workerz"] = 3
    with pytest.raises(Exception, match="max_workerz"):
        validated(config)
