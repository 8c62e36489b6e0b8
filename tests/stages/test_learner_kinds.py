"""Every kind of loss through the learner, on one rank and on two, against dense float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.compute.dense_reference import support_loss
from tests.stages.learner_toys import (
    RUN_STEPS,
    TAIL_FLOOR,
    TOKENS,
    VOCAB,
    K,
    Played,
    Scenario,
    distance,
    play_on_one,
    play_on_two,
    save_student,
    selected,
)
from tip_ray.compute.packing import micro_batches
from tip_ray.contract.spec import LossSpec, StudentSpec
from tip_ray.contract.tables import build, concat, selected_schema
from tip_ray.stages.fsdp import KeptStudent
from tip_ray.stages.learner import LearnerActor

torch.set_num_threads(1)

KINDS: list[dict[str, Any]] = [
    {"kind": "reverse_kl"},
    {"kind": "forward_kl"},
    {"kind": "jsd", "beta": 0.3},
    {"kind": "policy_gradient", "clip": 0.1},
]


KIND_NAMES = [options["kind"] for options in KINDS]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_student(tmp_path_factory.mktemp("student"), "qwen3", tied=True)


@pytest.fixture(scope="module")
def model(path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path).double()


def logits_of(model: torch.nn.Module, row: dict[str, Any]) -> torch.Tensor:
    logits_TV = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
    return logits_TV[row["kept_positions"], :VOCAB]


def with_sampled_support(model: torch.nn.Module, table: pa.Table) -> pa.Table:
    """The sampled tokens as the support, drawn by weights that have moved a little since."""
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    random = torch.Generator().manual_seed(0)
    recorded, teacher = [], []
    for row in table.to_pylist():
        ids = torch.tensor(row["sampled_ids"])[:, None]
        with torch.no_grad():
            now = logits_of(model, row).log_softmax(-1).gather(1, ids).squeeze(1)
        moved = now + 0.15 * torch.randn(len(now), generator=random).double()
        recorded.append(moved.tolist())
        teacher.append([[one] for one in (now - torch.rand(len(now), generator=random)).tolist()])
    columns["support_ids"] = [[[one] for one in row] for row in columns["sampled_ids"]]
    columns |= {"student_logprob": recorded, "teacher_logprobs": teacher}
    return build(selected_schema(1), columns)


def with_tails_lowered(table: pa.Table) -> pa.Table:
    """Tails that the support does not tell: what travels counts, not 1 - sum(exp)."""
    columns = {name: table.column(name) for name in table.column_names}
    tails = table.column("teacher_tail_logprob").to_pylist()
    columns["teacher_tail_logprob"] = [[one - 2 for one in row] for row in tails]
    return build(table.schema, columns)


def surrogate(logits_V: torch.Tensor, row: dict[str, Any], token: int, clip: float) -> torch.Tensor:
    recorded = row["student_logprob"][token]
    ratio = (logits_V.log_softmax(-1)[row["sampled_ids"][token]] - recorded).exp()
    advantage = row["teacher_logprobs"][token][0] - recorded
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def dense_loss(model: torch.nn.Module, table: pa.Table, options: dict[str, Any]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in table.to_pylist():
        for token, logits_V in enumerate(logits_of(model, row)):
            if options["kind"] == "policy_gradient":
                value = surrogate(logits_V, row, token, options["clip"])
            else:
                names = ("support_ids", "teacher_logprobs", "teacher_tail_logprob")
                value = support_loss(
                    logits_V, *(row[name][token] for name in names), TAIL_FLOOR, **options
                )
            total = total + row["kept_weight"][token] * value
    return total


@pytest.mark.parametrize("options", KINDS, ids=KIND_NAMES)
def test_loss_and_gradients_equal_a_dense_reference(
    model: torch.nn.Module, options: dict[str, Any]
) -> None:
    table = with_tails_lowered(selected(1, 6, seed=7))
    if options["kind"] == "policy_gradient":
        table = with_sampled_support(model, table)
    root = KeptStudent(model, LossSpec(**options), VOCAB)
    parameters = list(model.parameters())
    found = sum(root(batch)[0] for batch in micro_batches(table, 32))
    gradients = torch.autograd.grad(found, parameters)
    expected = dense_loss(model, table, options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    for ours, own in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-6, atol=1e-8)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-3


# Two ranks


@dataclass(frozen=True)
class KindScenario(Scenario):
    """A scenario of another loss than the default's."""

    loss: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return 1 if self.loss["kind"] == "policy_gradient" else K

    def actor(self, rank: int) -> LearnerActor:
        student, loss = StudentSpec(model=self.path, dtype=self.dtype), LossSpec(**self.loss)
        sizes = (VOCAB, self.width, RUN_STEPS)
        return LearnerActor(student, self.spec(), loss, self.path, *sizes, rank, seed=3)

    def whole(self, step: int) -> pa.Table:
        return concat(self.steps[step - 1], selected_schema(self.width))

    def on_one_rank(self) -> KindScenario:
        steps = [[self.whole(step)] for step in range(1, len(self.steps) + 1)]
        return KindScenario(self.name, self.path, steps, self.learner, loss=self.loss)


@pytest.fixture(scope="module")
def scenarios(path: str, model: torch.nn.Module) -> dict[str, KindScenario]:
    """Two uneven steps of each kind; the second rank of the second has nothing."""
    made = {}
    for options in KINDS:
        steps = [[selected(1, 3, seed=1), selected(1, 2, seed=2, slot=50)]]
        steps += [[selected(2, 2, seed=3), selected(2, 0, seed=4)]]
        if options["kind"] == "policy_gradient":
            steps = [[with_sampled_support(model, one) for one in parts] for parts in steps]
        made[options["kind"]] = KindScenario(options["kind"], path, steps, loss=options)
    return made


@pytest.fixture(scope="module")
def on_two(
    scenarios: dict[str, KindScenario], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Played]]:
    return play_on_two(list(scenarios.values()), tmp_path_factory.mktemp("played"))


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_two_ranks_equal_one_and_the_dense_reference(
    kind: str,
    model: torch.nn.Module,
    scenarios: dict[str, KindScenario],
    on_two: dict[str, list[Played]],
) -> None:
    scenario, (first, second) = scenarios[kind], on_two[kind]
    one = play_on_one(scenario)
    dense = dense_loss(model, scenario.whole(1), scenario.loss)
    own = torch.autograd.grad(dense, list(model.parameters()))
    named = dict(zip(dict(model.named_parameters()), own, strict=True))
    for played in (first, one):
        assert distance(played.gradients[1], named) < 5e-6
        assert played.reports[0].loss == pytest.approx(dense.item(), rel=1e-4, abs=1e-6)
    for step in (1, 2):
        assert distance(first.weights[step], one.weights[step]) < 5e-6
        assert distance(first.weights[step], first.weights[step - 1]) > 1e-4
        assert first.reports[step - 1].loss == second.reports[step - 1].loss
        assert first.reports[step - 1].grad_norm == second.reports[step - 1].grad_norm
    assert [report.micro_batches for report in second.reports] == [2, 0]
    assert first.reports[0].tokens + second.reports[0].tokens == one.reports[0].tokens <= 5 * TOKENS
