"""Per-token numbers of a rollout from one dense float32 transformers forward of each model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from tip_ray.demo import checkpoint_path

Floats = npt.NDArray[np.float64]


@dataclass
class Dense:
    """[m] each, nats."""

    entropy: Floats
    reverse_kl: Floats
    forward_kl: Floats
    student_logprob: Floats
    teacher_logprob: Floats
    teacher_entropy: Floats


class Pair:
    """Student and teacher in float32."""

    def __init__(self, student: str, teacher: str) -> None:
        self.student, self.teacher = (
            AutoModelForCausalLM.from_pretrained(checkpoint_path(name), dtype=torch.float32).eval()
            for name in (student, teacher)
        )

    @torch.no_grad()
    def dense(self, prompt_ids: list[int], response_ids: list[int]) -> Dense:
        ids = torch.tensor([prompt_ids + response_ids])
        rows = slice(len(prompt_ids) - 1, len(prompt_ids) + len(response_ids) - 1)
        s, t = (
            torch.log_softmax(model(ids, use_cache=False).logits[0, rows].double(), -1)
            for model in (self.student, self.teacher)
        )
        sampled = torch.tensor(response_ids)[:, None]
        return Dense(
            entropy=-(s.exp() * s).sum(-1).numpy(),
            reverse_kl=(s.exp() * (s - t)).sum(-1).numpy(),
            forward_kl=(t.exp() * (t - s)).sum(-1).numpy(),
            student_logprob=s.gather(1, sampled)[:, 0].numpy(),
            teacher_logprob=t.gather(1, sampled)[:, 0].numpy(),
            teacher_entropy=-(t.exp() * t).sum(-1).numpy(),
        )
