"""Drawing tokens from logits with one given uniform number a row.

R  rows    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sample(
    logits_RV: Tensor,
    temperatures: Sequence[float],
    top_ps: Sequence[float],
    uniforms: Sequence[float],
) -> Tensor:
    """[R] sampled ids (int64); temperature 0 takes the most probable one.

    By inversion of the cumulative probabilities in float64, in order of the ids: float noise in
    the logits changes a draw only where the uniform number lies within it of a boundary. An id of
    probability 0 is never drawn.
    """
    device = logits_RV.device
    greedy_R = logits_RV.argmax(-1)
    if not any(temperatures):
        return greedy_R
    temperature_R1 = torch.tensor(temperatures, dtype=torch.float64, device=device)[:, None]
    scaled_RV = logits_RV.double() / temperature_R1.masked_fill(temperature_R1 == 0, 1.0)
    probabilities_RV = scaled_RV.softmax(-1)
    if min(top_ps) < 1:
        top_p_R1 = torch.tensor(top_ps, dtype=torch.float64, device=device)[:, None]
        probabilities_RV = _nucleus(probabilities_RV, top_p_R1)
    cumulative_RV = probabilities_RV.cumsum(-1)
    total_R1 = cumulative_RV[:, -1:].contiguous()
    uniform_R1 = torch.tensor(uniforms, dtype=torch.float64, device=device)[:, None]
    drawn_R1 = torch.searchsorted(cumulative_RV, uniform_R1 * total_R1, right=True)
    last_R1 = torch.searchsorted(cumulative_RV, total_R1)  # the last id of any probability
    # Within the vocabulary even where logits are NaN, which the trace then shows.
    drawn_R = torch.minimum(drawn_R1, last_R1).squeeze(1).clamp(max=logits_RV.shape[1] - 1)
    return torch.where(temperature_R1.squeeze(1) == 0, greedy_R, drawn_R)


def _nucleus(probabilities_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """Zero outside the smallest set of the most probable ids whose mass reaches top_p."""
    sorted_RV, order_RV = probabilities_RV.sort(dim=-1, descending=True, stable=True)
    before_RV = sorted_RV.cumsum(-1) - sorted_RV
    # At 1 nothing is cut, whatever the rounding of the sum.
    cut_RV = (before_RV >= top_p_R1) & (top_p_R1 < 1)
    return torch.zeros_like(probabilities_RV).scatter_(
        -1, order_RV, sorted_RV.masked_fill(cut_RV, 0.0)
    )
