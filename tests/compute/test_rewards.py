"""Weights of rollouts by their rewards, against plain sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tip_ray.compute.rewards import rollout_weights
from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import LossSpec

groups = st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5)), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(groups, st.floats(0.01, 20))
def test_reward_weight_is_a_softmax_in_each_prompt(rollouts, inverse_t):
    group, reward = zip(*rollouts, strict=True)
    found = rollout_weights(LossSpec(reward_weight=inverse_t), reward, group)
    for g, r, weight in zip(group, reward, found, strict=True):
        own = [other for prompt, other in rollouts if prompt == g]
        total = sum(math.exp(inverse_t * (other - r)) for other in own)
        assert weight == pytest.approx(len(own) / total, rel=1e-9)
        if len(own) == 1:
            assert weight == 1.0


@settings(max_examples=100, deadline=None)
@given(groups)
def test_pass_rate_weight_is_the_variance_of_passing(rollouts):
    group, reward = zip(*rollouts, strict=True)
    found = rollout_weights(LossSpec(sample_weight="pass_rate"), reward, group)
    for g, weight in zip(group, found, strict=True):
        passed = [other > 0 for prompt, other in rollouts if prompt == g]
        rate = sum(passed) / len(passed)
        assert weight == pytest.approx(rate * (1 - rate))


def test_both_multiply_and_neither_is_one():
    reward, group = [1.0, 0.0, 0.0, 1.0], [0, 0, 1, 1]
    both = LossSpec(reward_weight=1.0, sample_weight="pass_rate")
    share = math.e / (1 + math.e) * 2
    assert rollout_weights(both, reward, group) == pytest.approx(
        [share / 4, (2 - share) / 4, (2 - share) / 4, share / 4]
    )
    assert rollout_weights(LossSpec(), reward, group).tolist() == [1.0] * 4
    assert rollout_weights(both, [], []).shape == (0,)


def test_extreme_rewards_stay_finite():
    found = rollout_weights(LossSpec(reward_weight=1e3), [1e6, -1e6, 1e6], [0, 0, 0])
    assert found.tolist() == [1.5, 0.0, 1.5]


def test_rewards_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match="nan of rollout 1"):
        rollout_weights(LossSpec(), [0.0, math.nan], [0, 0])
    with pytest.raises(SpecError, match="one a rollout"):
        rollout_weights(LossSpec(), np.zeros(2), [0])
