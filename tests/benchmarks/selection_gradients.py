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
B  rows                    T  padded inputs of a row               K  ids of a support
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from tests.benchmarks.selection_runs import Arm, Settings
from tip_ray.compute.loss import kept_loss
from tip_ray.compute.packing import pad_right, to_tensor
from tip_ray.compute.selection import loss_weights, normalised_entropy, select_weighted
from tip_ray.contract import tables
from tip_ray.contract.spec import SAMPLING_RULES, RunSpec, SelectionSpec
from tip_ray.control.preflight import Preflight, preflight
from tip_ray.stages.fsdp import load_master
from tip_ray.stages.models import load_tokenizer, trunk_and_head
from tip_ray.stages.rollout import RolloutActor
from tip_ray.stages.teacher import TeacherActor

SHUFFLE_SEED = 77  # prompts and rollouts that no training run of the study has seen


@dataclass(frozen=True)
class Selection:
    """An arm, with or without inverse inclusion weights."""

    arm: Arm
    reweight: str = "none"

    @property
    def spec(self) -> SelectionSpec:
        if self.arm.rule == "all":
            return SelectionSpec(rule="all")
        return SelectionSpec.model_validate(
            {
                "rule": self.arm.rule,
                "retention": self.arm.retention,
                "reweight": self.reweight,
            }
        )


@dataclass(frozen=True)
class Batch:
    """Scored rollouts of one step."""

    entropy_N: npt.NDArray[np.float64]  # normalised
    reverse_kl_N: npt.NDArray[np.float32]
    forward_kl_N: npt.NDArray[np.float32]
    row_offsets: npt.NDArray[np.int64]
    row_keys: Sequence[tables.Key]
    input_ids_BT: Tensor
    rows_N: Tensor  # into the flattened [B * T]: the inputs that predict the response tokens
    support_ids_NK: Tensor
    teacher_logprobs_NK: Tensor
    teacher_tail_N: Tensor

    def coefficients(self, selection: Selection, seed: int) -> Tensor:
        """float32 [N]: what each token's divergence weighs in the loss, 0 where dropped."""
        keep_N, weight_N = select_weighted(
            selection.spec,
            self.entropy_N,
            self.reverse_kl_N,
            self.forward_kl_N,
            self.row_offsets,
            seed,
            row_keys=self.row_keys,
        )
        return torch.from_numpy(
            loss_weights(
                keep_N,
                weight_N,
                self.row_offsets,
                "token",
                divide_by="all" if selection.reweight == "inclusion" else "kept",
            )
        )


class Sampler:
    """Rollout and teacher actor in this process, for a student's weights at `path`."""

    def __init__(self, spec: RunSpec, checked: Preflight, path: str) -> None:
        facts = checked.facts
        longest = spec.rollout.max_prompt_tokens + spec.rollout.max_response_tokens
        self._spec, self._checked = spec, checked
        self._rollout = RolloutActor(
            spec.student,
            spec.rollout,
            model_path=path,
            vocab_size=facts.vocab_size,
            k=facts.support_k,
            eos_ids=facts.eos_ids,
            max_model_tokens=longest,
            seed=SHUFFLE_SEED,
        )
        self._teacher = TeacherActor(
            spec.teacher,
            facts.teacher_path,
            facts.vocab_size,
            facts.support_k,
            spec.support_source,
            spec.loss.tail_floor_nats,
            longest,
        )

    def batch(self, step: int) -> Batch:
        """The rollouts of the next prompts, scored."""
        prompts = self._checked.source.take(step, self._spec.prompts.prompts_per_step)
        parts = list(self._rollout.generate(prompts))[1::2]
        rollouts = tables.concat(parts, tables.rollouts_schema(self._checked.facts.support_k))
        _, scores, targets = self._teacher.score(rollouts)
        return _batch(rollouts, scores, targets, self._checked.facts.vocab_size)


def _batch(rollouts: pa.Table, scores: pa.Table, targets: pa.Table, vocab_size: int) -> Batch:
    ends = tables.offsets(rollouts, "response_ids")
    prompts = rollouts.column("prompt_ids").to_pylist()
    responses = rollouts.column("response_ids").to_pylist()
    rows = [
        np.asarray([*prompt, *response[:-1]])
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    input_ids_BT = pad_right(rows)
    width = input_ids_BT.shape[1]
    places = [
        row * width + len(prompt) - 1 + np.arange(b - a)
        for row, (prompt, (a, b)) in enumerate(zip(prompts, pairwise(ends), strict=True))
    ]
    return Batch(
        normalised_entropy(tables.column(scores, "student_entropy"), vocab_size),
        tables.column(scores, "reverse_kl"),
        tables.column(scores, "forward_kl"),
        ends,
        tables.keys(scores),
        input_ids_BT,
        torch.from_numpy(np.concatenate(places)),
        to_tensor(tables.column(targets, "support_ids"), torch.int64),
        to_tensor(tables.column(targets, "teacher_logprobs")),
        to_tensor(tables.column(targets, "teacher_tail_logprob")),
    )


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
