"""The learning rate by its values."""

import math

import pytest

from tip_ray.contract.spec import LearnerSpec
from tip_ray.stages.schedule import learning_rate


def rates(steps: int, **learner: object) -> list[float]:
    spec = LearnerSpec(lr=1.0, **learner)
    return [learning_rate(spec, step, steps) for step in range(1, steps + 1)]


def test_cosine_starts_at_lr_and_would_reach_min_lr_one_step_after_the_last() -> None:
    assert rates(4) == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert learning_rate(LearnerSpec(lr=1.0, min_lr=0.2), 5, 4) == pytest.approx(0.2)


def test_cosine_ends_near_min_lr_and_never_below() -> None:
    found = rates(100, min_lr=0.1)
    assert found == sorted(found, reverse=True)
    assert 0.1 < found[-1] < 0.1003


def test_warm_up_is_linear_and_reaches_lr() -> None:
    assert rates(6, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.5])


def test_warm_up_goes_before_constant_too() -> None:
    assert rates(4, schedule="constant", warmup_steps=2, min_lr=0.5) == [0.5, 1.0, 1.0, 1.0]


def test_a_warm_up_longer_than_the_run_never_reaches_lr() -> None:
    assert rates(2, warmup_steps=4) == [0.25, 0.5]


def test_one_step_trains_at_lr() -> None:
    assert rates(1) == [1.0]
