"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from tip_ray.contract.spec import LearnerSpec


def learning_rate(learner: LearnerSpec, step: int, steps: int) -> float:
    """AdamW's learning rate for update `step` (the first is 1) of `steps`.

    Linear warm-up that reaches `lr` at step `warmup_steps`; then `lr`, or a cosine that starts at
    `lr` and reaches `min_lr` when the run ends, so that no step trains at `min_lr = 0`.
    """
    warmup = learner.warmup_steps
    if step <= warmup:
        return learner.lr * step / warmup
    if learner.schedule == "constant":
        return learner.lr
    progress = min(1.0, (step - 1 - warmup) / max(1, steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return learner.min_lr + (learner.lr - learner.min_lr) * cosine
