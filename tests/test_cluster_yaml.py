"""cluster.yaml against Ray's own schema, offline."""

import re
import shlex
import tomllib

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from sqlalchemy.engine import make_url

from lvlmrec.config import CONF

ROOT = CONF.parent
CLUSTER = ROOT / "cluster.yaml"


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


def node_configs() -> dict[str, dict]:
    types = yaml.safe_load(CLUSTER.read_text())["available_node_types"]
    return {name: each["node_config"] for name, each in types.items()}


def test_ec2_takes_what_the_nodes_are_given() -> None:
    """Ray checks nothing inside node_config: EC2 itself would, when the first node is launched."""
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node_config in node_configs().items():
        report = ParamValidator().validate(node_config | {"MinCount": 1, "MaxCount": 1}, model)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
    misspelt = node_configs()["gpu"] | {"IamInstanceProfil": {}, "MinCount": 1, "MaxCount": 1}
    assert "IamInstanceProfil" in ParamValidator().validate(misspelt, model).generate_report()


def test_every_node_names_its_image_and_its_rights() -> None:
    """Ray's default image is Ubuntu 18.04, and it gives a profile to the head alone."""
    for name, node_config in node_configs().items():
        assert "ubuntu-22.04" in node_config["ImageId"], name
        assert node_config["IamInstanceProfile"]["Name"].startswith("lvlmrec-"), name
    assert "deadsnakes" in yaml.safe_load(CLUSTER.read_text())["setup_commands"][0], "22.04 has no released Python 3.11"


def test_nodes_have_the_driver_that_a_database_is_opened_with() -> None:
    driver = make_url("postgresql://user@host/mlflow").get_dialect().driver
    installed = shlex.split(" ".join(yaml.safe_load(CLUSTER.read_text())["setup_commands"]))
    assert any(re.match(rf"{driver}(\[|>|=|$)", word) for word in installed), driver
    assert "--backend-store-uri postgresql://" in CLUSTER.read_text()


PATHS = re.compile(r"\b(?:conf|rayjobs|benchmarks|lvlmrec|tests|docs)/[\w./*-]*")
DOCUMENTS = [CLUSTER, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *sorted(CONF.rglob("*.yaml"))]


def test_every_file_that_is_named_exists() -> None:
    named = {(document, path.rstrip(".,/")) for document in DOCUMENTS for path in PATHS.findall(document.read_text())}
    assert (CLUSTER, "rayjobs/extract.py") in named and len(named) > 2 * len(DOCUMENTS)
    missing = {f"{document.name}: {path}" for document, path in named if not list(ROOT.glob(path))}
    assert missing == set()


def test_a_misspelt_key_would_be_caught() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    config["max_workerz"] = 3
    with pytest.raises(Exception, match="max_workerz"):
        validated(config)
