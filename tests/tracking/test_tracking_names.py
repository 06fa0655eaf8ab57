"""Names that MLflow takes: from any name one, from two names two."""

import itertools

import mlflow
import pytest
from mlflow.utils.validation import _validate_metric_name, _validate_param_name

from lvlmrec import tracking
from lvlmrec.tracking.names import MAX_LENGTH, decoded, encoded

ODD = [
    "SASRec+ID",
    "what? (en)",
    "100 %",
    "a//b",
    "/a",
    "a/",
    "../a",
    "a/./b",
    ".",
    "..",
    "",
    "a\nb",
    "q\t1",
    "名+前",
    "hr@k",
]
LOOK_ALIKE = [
    "a+",
    "a_x2b_",
    "_x2b+",
    "a_x5f_x2b_",
    "hr@10",
    "hr_at_10",
    "a_at_5@5",
    "_x_",
    "_x0_",
    "\0",
    "_at_5",
    "@5",
]


@pytest.mark.parametrize("name", [*ODD, *LOOK_ALIKE], ids=repr)
def test_a_name_is_taken_and_can_be_read_again(name: str) -> None:
    made = encoded(name)
    _validate_metric_name(made)
    _validate_param_name(made)
    assert decoded(made) == name
    assert encoded(name) == made


def test_no_two_names_become_one() -> None:
    names = {"".join(letters) for length in range(5) for letters in itertools.product("_@+x2b5/. ", repeat=length)}
    assert len({encoded(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "name",
    ["train_loss", "validation/hr@10", "model.item_encoder.items_at_once", "slices.cold.users", "llm.-1", "9:16"],
)
def test_names_of_earlier_runs_are_as_they_were(name: str) -> None:
    assert encoded(name) == name.replace("@", "_at_")


def test_a_name_that_is_too_long_keeps_its_beginning_and_what_tells_it_from_others() -> None:
    one, other = encoded("n" * 300 + "1"), encoded("n" * 300 + "2")
    assert one != other and len(one) == len(other) == MAX_LENGTH and one.startswith("n" * 200)
    assert encoded("+" * 90) != encoded("+" * 91)


def test_odd_names_come_to_mlflow(tracking_uri: str, tmp_path: object) -> None:
    run = tracking.start(tracking_uri, str(tmp_path), "test", {})
    run.log_config({"recipe": {"prompts": dict.fromkeys(ODD, 1)}})
    run.log_metrics({f"test/{name}": 0.5 for name in ODD})
    found = mlflow.MlflowClient(tracking_uri).get_run(run.id).data
    assert {decoded(name) for name in found.params} == {f"recipe.prompts.{name}" for name in ODD}
    assert {decoded(name) for name in found.metrics} == {f"test/{name}" for name in ODD}
