"""How noisy and how biased is each rule's gradient, next to that of all tokens?

Weights are fixed. Batches of rollouts, each as large as a training step, are drawn from the student
and scored by the teacher, with the actors' own code in this process; selection, weights and loss
are the project's, gradients plain autograd's, all in float32.

    over batches    each batch with one selection: what a training step sees, rollouts included
    over draws      one batch, many draws of the sampling rules: what selection alone adds

Squared norms and products of means are estimated without the bias that noise would add: sums over
pairs of different draws only. So a cosine of 1 may come out a little above it.

    norm                     of the mean gradient, against that of `all`
    variance                 E |g - E g|^2, against that of `all` (over draws: against |g of all|^2)
    variance_at_equal_norm   the same once both means have one length: what AdamW, which does not
                             look at the length, is left with
    bias                     |E g - E g of all| / |E g of all|; what is below `bias_by_noise` (two
                             standard errors of its square, as a root) may be 0
    cosine                   of the mean gradient and that of `all`
    distance                 of the mean over draws from the gradient of `all`, against the latter's
                             length; `distance_by_noise` is what an unbiased rule has

M  batches or draws        P  parameters        N  response tokens of a batch
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.benchmarks.selection_batches import SHUFFLE_SEED, Batch, Sampler, Selection
from tests.benchmarks.selection_runs import Arm, Settings
from tip_ray.compute.loss import kept_loss
from tip_ray.contract.spec import SAMPLING_RULES
from tip_ray.control.preflight import preflight
from tip_ray.stages.fsdp import load_master
from tip_ray.stages.models import load_tokenizer, trunk_and_head


class Gradients:
    """Gradients of one batch for any coefficients; the trunk runs forward once."""

    def __init__(self, model: Any, batch: Batch, vocab_size: int) -> None:
        self._parameters = [one for one in model.parameters() if one.requires_grad]
        self._batch, self._vocab_size = batch, vocab_size
        trunk, self._head_VD = trunk_and_head(model)
        hidden_BTD = trunk(input_ids=batch.input_ids_BT, use_cache=False).last_hidden_state
        self._hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, batch.rows_N)

    def of(self, coefficient_N: Tensor) -> Tensor:
        """float32 [P]."""
        batch, kept = self._batch, coefficient_N.nonzero().squeeze(1)
        loss = kept_loss(
            self._hidden_ND[kept],
            self._head_VD,
            batch.support_ids_NK[kept],
            batch.teacher_logprobs_NK[kept],
            coefficient_N[kept],
            teacher_tail_logprob_N=batch.teacher_tail_N[kept],
            vocab_size=self._vocab_size,
        )
        parts = torch.autograd.grad(loss, self._parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])


class Moments(NamedTuple):
    """Of gradients [M, P] beside reference gradients [M, P] of the same batches."""

    square: float  # |E g|^2
    noise: float  # E |g - E g|^2
    product: float  # <E g, E reference>
    bias_square: float  # |E g - E reference|^2
    bias_error: float  # standard error of `bias_square`, by the jackknife


def moments(gradient_MP: Tensor, reference_MP: Tensor) -> Moments:
    """Estimates whose expectation is right at any M of at least 3."""
    difference_MP = gradient_MP - reference_MP
    bias_square, bias_error = _square_of_mean(difference_MP)
    m = len(gradient_MP)
    sums = gradient_MP.sum(0, dtype=torch.float64) @ reference_MP.sum(0, dtype=torch.float64)
    same = (gradient_MP.double() * reference_MP.double()).sum()
    return Moments(
        square=_square_of_mean(gradient_MP)[0],
        noise=float(gradient_MP.double().var(0).sum()),
        product=float((sums - same) / (m * (m - 1))),
        bias_square=bias_square,
        bias_error=bias_error,
    )


def _square_of_mean(value_MP: Tensor) -> tuple[float, float]:
    """(|E value|^2 from pairs of different rows, its standard error by the jackknife)."""
    value_MP = value_MP.double()
    m, sum_P = len(value_MP), value_MP.sum(0)
    own_M, with_sum_M = value_MP.square().sum(1), value_MP @ sum_P
    pairs = float(sum_P @ sum_P - own_M.sum())
    without_M = (pairs - 2 * (with_sum_M - own_M)) / ((m - 1) * (m - 2))
    error = float(((m - 1) / m * (without_M - without_M.mean()).square().sum()).sqrt())
    return pairs / (m * (m - 1)), error


def gradient_study(
    settings: Settings, arms: Sequence[Arm], *, batches: int, draws: int, updates: int
) -> dict[str, Any]:
    """Both tables, at the initial student and after `updates` of them with all tokens."""
    torch.manual_seed(0)
    spec = settings.spec(Arm("all", 1.0), SHUFFLE_SEED)
    checked = preflight(spec)
    model = load_master(checked.facts.student_path, spec.student, gradient_checkpointing=False)
    found: dict[str, Any] = {"batches": batches, "draws": draws, "updates": updates}
    with tempfile.TemporaryDirectory() as folder:
        path = checked.facts.student_path
        for state in ("start", "later"):
            sampler = Sampler(spec, checked, path)
            scored = [sampler.batch(step) for step in range(1, batches + 1)]
            vocab_size = checked.facts.vocab_size
            found[state] = {
                "over_batches": _over_batches(model, scored, arms, vocab_size),
                "over_draws": _over_draws(model, scored[0], arms, draws, vocab_size),
            }
            if state == "start":
                _train(model, scored[:updates], settings.lr, vocab_size)
                model.save_pretrained(folder)
                load_tokenizer(path, False, "student.model").save_pretrained(folder)
                path = folder
    return found


def _over_batches(
    model: Any, batches: Sequence[Batch], arms: Sequence[Arm], vocab_size: int
) -> list[dict[str, Any]]:
    """Each arm's gradient of each batch, next to that of all tokens of the same batch."""
    selections = [Selection(Arm("all", 1.0)), *_selections(arms)]
    gradients: dict[Selection, list[Tensor]] = {one: [] for one in selections}
    for number, batch in enumerate(batches):
        of_batch = Gradients(model, batch, vocab_size)
        for selection, own in gradients.items():
            own.append(of_batch.of(batch.coefficients(selection, number)))
    reference_MP = torch.stack(gradients[selections[0]])
    everything = moments(reference_MP, reference_MP)
    rows = []
    for selection, own in gradients.items():
        one = moments(torch.stack(own), reference_MP)
        scale = one.square / everything.square
        rows.append(
            {
                **_named(selection),
                "norm": scale**0.5,
                "variance": one.noise / everything.noise,
                "variance_at_equal_norm": one.noise / everything.noise / scale,
                "bias": max(one.bias_square / everything.square, 0.0) ** 0.5,
                "bias_by_noise": (2 * one.bias_error / everything.square) ** 0.5,
                "cosine": one.product / (one.square * everything.square) ** 0.5,
            }
        )
    return rows


def _over_draws(
    model: Any, batch: Batch, arms: Sequence[Arm], draws: int, vocab_size: int
) -> list[dict[str, Any]]:
    """How far the mean over draws is from the gradient of all tokens, and how far noise puts it."""
    of_batch = Gradients(model, batch, vocab_size)
    target_P = of_batch.of(batch.coefficients(Selection(Arm("all", 1.0)), 0))
    square = float(target_P.double().square().sum())
    rows = []
    for selection in _selections([arm for arm in arms if arm.rule in SAMPLING_RULES]):
        drawn_MP = torch.stack(
            [of_batch.of(batch.coefficients(selection, draw)) for draw in range(draws)]
        )
        one = moments(drawn_MP, target_P.expand_as(drawn_MP))
        distance = float((drawn_MP.double().mean(0) - target_P.double()).norm())
        rows.append(
            {
                **_named(selection),
                "variance": one.noise / square,
                "distance": distance / square**0.5,
                "distance_by_noise": (one.noise / draws / square) ** 0.5,
                "bias_square": one.bias_square / square,
                "bias_square_error": one.bias_error / square,
            }
        )
    return rows


def _selections(arms: Sequence[Arm]) -> list[Selection]:
    """Every arm but `all`, and the sampling ones with inclusion weights too."""
    plain = [Selection(arm) for arm in arms if arm.rule != "all"]
    weighted = [Selection(arm, "inclusion") for arm in arms if arm.rule in SAMPLING_RULES]
    return plain + weighted


def _named(selection: Selection) -> dict[str, Any]:
    arm = selection.arm
    return {"rule": arm.rule, "retention": arm.retention, "reweight": selection.reweight}


def _train(model: Any, batches: Sequence[Batch], lr: float, vocab_size: int) -> None:
    """One AdamW update a batch with all tokens."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    everything = Selection(Arm("all", 1.0))
    for batch in batches:
        gradient_P = Gradients(model, batch, vocab_size).of(batch.coefficients(everything, 0))
        parts = gradient_P.split([one.numel() for one in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
