"""What a rollout weighs by its reward, beside what its tokens weigh.

R  rollouts of the step        a group: the rollouts of one prompt
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tip_ray.compute.columns import Floats
from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import LossSpec


def rollout_weights(loss: LossSpec, reward_R: npt.ArrayLike, group_R: npt.ArrayLike) -> Floats:
    """[R] the product of the weights that `loss` asks for; all 1 where it asks for none.

    Args:
        reward_R: of each rollout.
        group_R: which prompt each rollout answers; equal numbers, one prompt.

    Raises:
        SpecError: a reward is not finite, or there is not one a rollout.
    """
    rewards, group = np.asarray(reward_R, np.float64), np.asarray(group_R)
    if rewards.shape != group.shape or rewards.ndim != 1:
        raise SpecError("reward", f"shape {rewards.shape}", f"{group.shape}, one a rollout")
    if not np.isfinite(rewards).all():
        place = int(np.argmin(np.isfinite(rewards)))
        raise SpecError("reward", f"{rewards[place]} of rollout {place}", "a finite number")
    weight_R = np.ones(len(rewards))
    if loss.reward_weight > 0:
        weight_R = weight_R * softmax_weights(rewards, group, loss.reward_weight)
    if loss.sample_weight == "pass_rate":
        weight_R = weight_R * pass_rate_weights(rewards, group)
    return weight_R


def softmax_weights(reward_R: Floats, group_R: npt.NDArray[np.int64], inverse_t: float) -> Floats:
    """[R] each prompt's softmax over inverse_t * reward, times its rollouts: their mean is 1."""
    _, place_R, count_G = np.unique(group_R, return_inverse=True, return_counts=True)
    logit_R = inverse_t * reward_R
    top_G = np.full(len(count_G), -np.inf)
    np.maximum.at(top_G, place_R, logit_R)
    share_R = np.exp(logit_R - top_G[place_R])
    total_G = np.bincount(place_R, share_R, len(count_G))
    return np.asarray(share_R * count_G[place_R] / total_G[place_R])


def pass_rate_weights(reward_R: Floats, group_R: npt.NDArray[np.int64]) -> Floats:
    """[R] p (1 - p), p the share of the prompt's rollouts with a reward above 0.

    0 where all or none of them passed: such a prompt teaches nothing new.
    """
    _, place_R, count_G = np.unique(group_R, return_inverse=True, return_counts=True)
    passed_G = np.bincount(place_R, reward_R > 0, len(count_G))
    rate_G = passed_G / count_G
    return np.asarray((rate_G * (1 - rate_G))[place_R])
