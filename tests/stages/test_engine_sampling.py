"""Draws against the distribution that they are meant to follow."""

from __future__ import annotations

import numpy as np
import torch

from tip_ray.stages.engines.sampling import sample

DRAWS = 4000
GRID = [(i + 0.5) / DRAWS for i in range(DRAWS)]  # evenly spread: frequencies are exact to 1/DRAWS


def frequencies(logits_V: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0) -> np.ndarray:
    drawn_R = sample(logits_V.expand(DRAWS, -1), [temperature] * DRAWS, [top_p] * DRAWS, list(GRID))
    return np.bincount(drawn_R.numpy(), minlength=len(logits_V)) / DRAWS


def logits(seed: int = 0, size: int = 12) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def test_frequencies_are_the_softmax_at_the_temperature() -> None:
    for temperature in (0.5, 1.0, 3.0):
        expected = (logits().double() / temperature).softmax(0).numpy()
        np.testing.assert_allclose(frequencies(logits(), temperature), expected, atol=2 / DRAWS)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probabilities = logits().double().softmax(0).numpy()
    order = np.argsort(-probabilities)
    count = int(np.searchsorted(np.cumsum(probabilities[order]), 0.7)) + 1
    expected = np.zeros_like(probabilities)
    kept = order[:count]
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    assert 1 < count < len(probabilities)
    np.testing.assert_allclose(frequencies(logits(), top_p=0.7), expected, atol=2 / DRAWS)


def test_tiny_top_p_is_greedy() -> None:
    assert frequencies(logits(), top_p=1e-9)[logits().argmax()] == 1


def test_greedy_and_drawn_rows_in_one_batch() -> None:
    logits_RV = torch.stack([logits(0), logits(1), logits(2)])
    drawn_R = sample(logits_RV, [0.0, 1.0, 0.0], [0.5, 1.0, 1.0], [0.999, 0.0, 0.999])
    assert drawn_R[0] == logits(0).argmax()
    assert drawn_R[1] == 0, "the uniform number 0 takes the first id of any probability"
    assert drawn_R[2] == logits(2).argmax()


def test_impossible_ids_are_never_drawn() -> None:
    masked_V = logits()
    masked_V[[0, 5, 11]] = float("-inf")
    for uniform, first_or_last in ((0.0, 1), (float(np.nextafter(1.0, 0.0)), 10)):
        assert int(sample(masked_V[None], [1.0], [1.0], [uniform])) == first_or_last
    assert frequencies(masked_V)[[0, 5, 11]].sum() == 0


def test_not_a_number_stays_within_the_vocabulary() -> None:
    broken_V = torch.full((12,), float("nan"))
    for temperature in (0.0, 1.0):
        assert 0 <= int(sample(broken_V[None], [temperature], [0.9], [0.5])) < 12
