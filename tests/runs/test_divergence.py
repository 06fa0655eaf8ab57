"""A run with a loss, gradient or score that is not finite ends with epoch, step and advice, and can be resumed."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lvlmrec.errors import JobFailed
from lvlmrec.jobs import study
from lvlmrec.models.losses import InBatchSoftmaxConfig
from lvlmrec.runs import experiment, loop
from lvlmrec.runs.divergence import Diverged, check_steps, check_weights, largest_norm
from lvlmrec.tracking import Run
from tests.toy import ITEM_IDS, Fitting, fitted, train_config


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], same: bool = True) -> None:
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items()) == same


def test_a_clip_of_0_clips_nothing(world: Path, tmp_path: Path) -> None:
    prepared, unclipped = fitted(train_config(world, tmp_path, training__gradient_clip=0))
    _, loose = fitted(train_config(world, tmp_path, training__gradient_clip=1e9))
    before = Fitting(prepared).new_state().model.state_dict()
    assert_same_weights(unclipped.model.state_dict(), loose.model.state_dict())
    assert_same_weights(unclipped.model.state_dict(), before, same=False)


def test_a_learning_rate_that_is_too_high_ends_the_run(world: Path, tmp_path: Path) -> None:
    loop = Fitting(experiment.prepare(train_config(world, tmp_path, training__lr=1e30)))
    with pytest.raises(Diverged, match=r"^epoch 1, step 2: the loss is nan; lower training\.lr \(1e\+30\)$") as caught:
        loop.run()
    assert isinstance(caught.value, JobFailed)
    assert loop.history == [], "an epoch that diverged was reported"


def test_features_that_are_not_finite_and_a_low_precision_are_named(world: Path, tmp_path: Path) -> None:
    values = {"model__item_encoder__name": "dff", "training__precision": "bfloat16"}
    prepared = experiment.prepare(train_config(world, tmp_path, **values))
    assert prepared.features is not None and prepared.features.mean is not None
    spoilt = dataclasses.replace(prepared.features, mean=prepared.features.mean * np.nan)
    with pytest.raises(Diverged, match=r"epoch 1, step 1: the loss is nan; .*precision=float32, or look for features"):
        Fitting(dataclasses.replace(prepared, features=spoilt)).run()


class NoGradient(torch.autograd.Function):
    """Leaves the loss unchanged and makes its gradient NaN."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("nan")


@pytest.mark.parametrize("clip", [0, 5])
def test_a_gradient_that_is_not_finite_is_noticed_at_its_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: int
) -> None:
    plain, calls = InBatchSoftmaxConfig.sum, []

    def spoilt(self: InBatchSoftmaxConfig, inputs: Any) -> torch.Tensor:
        calls.append(1)
        loss = plain(self, inputs)
        return NoGradient.apply(loss) if len(calls) == 6 else loss

    monkeypatch.setattr(InBatchSoftmaxConfig, "sum", spoilt)
    prepared = experiment.prepare(train_config(world, tmp_path, training__gradient_clip=clip))
    with pytest.raises(Diverged, match=r"^epoch 2, step 3: the gradient is nan"):  # three steps an epoch
        Fitting(prepared).run()


def test_weights_that_are_not_finite_are_named(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = experiment.prepare(train_config(world, tmp_path, training__epochs=1))
    state = Fitting(prepared).new_state()
    steps = []

    def step() -> None:
        steps.append(1)
        if len(steps) == 3:
            state.model.backbone.positions.weight.data[0] = torch.inf

    monkeypatch.setattr(state.optimizer, "step", step)
    with pytest.raises(Diverged, match=r"epoch 1, last step: the weights of backbone\.positions\.weight are not"):
        Fitting(prepared).run(state)


def test_scores_that_are_not_finite_are_noticed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = loop.encode_users

    def of_one_user(*arguments: Any) -> torch.Tensor:
        queries = plain(*arguments).clone()
        queries[7, 0] = torch.nan
        return queries

    monkeypatch.setattr(loop, "encode_users", of_one_user)
    with pytest.raises(Diverged, match="epoch 1, validation: the scores are not finite"):
        fitted(train_config(world, tmp_path))


def test_an_overflow_of_scores_is_noticed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = loop.encode_users
    monkeypatch.setattr(loop, "encode_users", lambda *arguments: plain(*arguments).sign() * 1e38)
    with pytest.raises(Diverged, match="validation: the scores are not finite"):
        fitted(train_config(world, tmp_path))


def test_the_first_bad_step_is_named_and_its_loss_before_its_gradient() -> None:
    good, bad = (torch.tensor(1.0), torch.tensor(2.0)), (torch.tensor(1.0), torch.tensor(torch.inf))
    check_steps(0, [], 1)
    check_steps(0, [good, good], 1)
    with pytest.raises(Diverged, match=r"^step 102: the gradient is inf$"):
        check_steps(100, [good, bad, bad], 1)
    with pytest.raises(Diverged, match=r"^step 3: the loss is nan$"):
        check_steps(2, [(torch.tensor(torch.nan), torch.tensor(torch.nan))], 1)


def test_what_is_finite_passes() -> None:
    model = torch.nn.Linear(3, 2)
    check_weights(model)
    assert largest_norm(torch.zeros(0, 3)) == 0 and largest_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]])) == 5
    assert largest_norm(torch.tensor([[torch.nan, 1.0], [1.0, 1.0]])).isnan()


def test_a_run_of_a_study_that_diverges_keeps_its_last_good_state_and_publishes_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracking_uri: str
) -> None:
    monkeypatch.setattr(study, "STATE_SECONDS", 0.0)
    monkeypatch.setattr(Run, "log_metrics", lambda *arguments, **keys: None)
    monkeypatch.setattr(Run, "set_tags", lambda *arguments: None)
    config = train_config(world, tmp_path, training__epochs=4)
    prepared = experiment.prepare(config)
    plain, epochs = loop.train_epoch, []

    def spoilt(*arguments: Any) -> float:
        epochs.append(1)
        if len(epochs) == 3:
            raise Diverged("step 1: the loss is nan")
        return plain(*arguments)

    monkeypatch.setattr(loop, "train_epoch", spoilt)
    with pytest.raises(Diverged, match="epoch 3, step 1: the loss is nan; lower"):
        study.train(config, Run(tracking_uri, "none", str(tmp_path)), 1, "a run")
    assert not (tmp_path / "checkpoints").exists()
    done = study.train(config, Run(tracking_uri, "none", str(tmp_path)), 1, "a run")
    assert len(epochs) == 5, "it did not go on after its second epoch"
    _, alone = fitted(config)
    assert done["validation"] == alone.progress.best and len(prepared.data.item_ids) == len(ITEM_IDS)
