"""Hidden targets through the learner: against dense float64, on one rank and on two, and resumed.

k  kept tokens of a row    V  shared vocabulary    E  width of the teacher's hidden state
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
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
    Played,
    Scenario,
    distance,
    play_on_one,
    play_on_two,
    save_student,
    selected,
)
from tests.stages.teacher_toys import V as TOY_V
from tests.stages.teacher_toys import actor as teacher_actor
from tests.stages.teacher_toys import rollouts
from tests.stages.toys import save_model
from tests.tables_made import keep_of
from tip_ray.contract.spec import LossSpec, StudentSpec, TeacherSpec
from tip_ray.contract.tables import (
    build,
    column,
    concat,
    keys,
    list_array,
    offsets,
    selected_schema,
)
from tip_ray.stages.cut import cut
from tip_ray.stages.fsdp import TeacherModel
from tip_ray.stages.learner import LearnerActor
from tip_ray.stages.state import read_parameters

WIDTH = 48  # the student's is 32
SCHEMA = selected_schema(WIDTH, "hidden")
# Rows of rank 0 and rank 1 by step: unequal both ways round, and a rank without any.
ROWS = ((3, 2), (2, 3), (4, 0))
LOSSES: dict[str, dict[str, Any]] = {
    "reverse_kl": {"kind": "reverse_kl"},
    "forward_kl": {"kind": "forward_kl"},
    "jsd": {"kind": "jsd", "beta": 0.3},
}
ROUNDING = 5e-6  # float32: sums in another order


class Checked(LearnerActor):
    """Looks at what a rank holds of the teacher."""

    def join(self, host: str, port: int, world_size: int) -> None:
        super().join(host, port, world_size)
        root = self._group.root
        own_VE = root._teacher_head_VE.to_local()
        rows = {1: (VOCAB,), 2: (VOCAB - VOCAB // 2, VOCAB // 2)}[world_size][self._rank]
        assert own_VE.shape == (rows, WIDTH)
        assert own_VE.dtype == torch.bfloat16
        assert not own_VE.requires_grad
        assert len(list(root.parameters())) == len(list(root.model.parameters()))
        assert not list(root.buffers(recurse=False))


@dataclass(frozen=True)
class HiddenScenario(Scenario):
    """A scenario whose targets are a teacher's hidden states."""

    teacher: str = ""
    loss: dict[str, Any] = field(default_factory=dict)

    def actor(self, rank: int) -> LearnerActor:
        return Checked(
            StudentSpec(model=self.path, dtype=self.dtype),
            self.spec(),
            LossSpec(**self.loss),
            self.path,
            VOCAB,
            WIDTH,
            RUN_STEPS,
            rank,
            seed=3,
            teacher=TeacherModel(TeacherSpec(model=self.teacher), self.teacher),
        )

    def on_one_rank(self) -> HiddenScenario:
        return replace(self, steps=[[concat(parts, SCHEMA)] for parts in self.steps])


def hidden(table: pa.Table, seed: int) -> pa.Table:
    """`table` with random hidden states, sharp and flat ones, as targets."""
    rng = np.random.default_rng(seed)
    count = len(column(table, "kept_weight"))
    states_kE = rng.normal(0, 1, (count, WIDTH)) * rng.uniform(0.05, 1, (count, 1))
    bits_kE = torch.from_numpy(states_kE).bfloat16().view(torch.uint16).numpy()
    kind = SCHEMA.field("teacher_hidden").type
    columns = {name: table.column(name) for name in SCHEMA.names if name in table.column_names}
    columns["teacher_hidden"] = list_array(bits_kE, offsets(table, "kept_weight"), kind)
    return build(SCHEMA, columns)


def parts(step: int, rows: tuple[int, int]) -> list[pa.Table]:
    return [
        hidden(selected(step, count, seed=10 * step + rank, slot=50 * rank), seed=step)
        for rank, count in enumerate(rows)
    ]


def dense_loss(model: torch.nn.Module, scenario: HiddenScenario, table: pa.Table) -> torch.Tensor:
    """Weighted sum over kept tokens, each on the whole vocabulary in float64."""
    teacher = AutoModelForCausalLM.from_pretrained(scenario.teacher, dtype=torch.bfloat16)
    head_VE = teacher.get_output_embeddings().weight.detach()[:VOCAB].double()
    states_kE = torch.tensor(column(table, "teacher_hidden")).view(torch.bfloat16).double()
    teacher_kV = (states_kE @ head_VE.T).log_softmax(-1).tolist()
    total, kept = torch.zeros((), dtype=torch.float64), iter(teacher_kV)
    for row in table.to_pylist():
        logits_TV = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        for position, weight in zip(row["kept_positions"], row["kept_weight"], strict=True):
            own_V = logits_TV[position, :VOCAB]
            every = list(range(VOCAB))
            value = support_loss(own_V, every, next(kept), -np.inf, TAIL_FLOOR, **scenario.loss)
            total = total + weight * value
    return total


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HiddenScenario]:
    folder = tmp_path_factory.mktemp("hidden")
    student = save_student(folder / "student", "qwen3", tied=True)
    sizes = {"kind": "llama", "hidden_size": WIDTH, "vocab_size": 45}
    untied = save_model(folder / "untied", 4, **sizes)
    tied = save_model(folder / "tied", 5, **sizes, tie_word_embeddings=True)
    steps = [parts(step, rows) for step, rows in enumerate(ROWS, start=1)]
    made = [
        HiddenScenario(name, student, steps[:1], teacher=untied, loss=loss)
        for name, loss in LOSSES.items()
    ]
    whole = HiddenScenario("whole", student, steps, teacher=tied, loss=LOSSES["reverse_kl"])
    saved = str(folder / "saved")
    made += [
        whole,
        replace(whole, name="before", steps=steps[:2], save=saved),
        replace(whole, name="after", steps=steps[2:], load=saved),
    ]
    return {one.name: one for one in made}


@pytest.fixture(scope="module")
def on_two(
    scenarios: dict[str, HiddenScenario], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Played]]:
    return play_on_two(list(scenarios.values()), tmp_path_factory.mktemp("played"))


@pytest.mark.parametrize("name", [*LOSSES, "whole"])
def test_two_ranks_equal_one_and_the_dense_reference(
    name: str, scenarios: dict[str, HiddenScenario], on_two: dict[str, list[Played]]
) -> None:
    scenario, (first, second) = scenarios[name], on_two[name]
    one = play_on_one(scenario)
    model = AutoModelForCausalLM.from_pretrained(scenario.path).double()
    dense = dense_loss(model, scenario, concat(scenario.steps[0], SCHEMA))
    own = torch.autograd.grad(dense, list(model.parameters()))
    named = dict(zip(dict(model.named_parameters()), own, strict=True))
    for played in (first, one):
        assert distance(played.gradients[1], named) < ROUNDING
        assert played.reports[0].loss == pytest.approx(dense.item(), rel=1e-5)
    for step, (own_rows, other_rows) in enumerate(ROWS[: len(scenario.steps)], start=1):
        assert distance(first.weights[step], one.weights[step]) < ROUNDING
        assert distance(first.weights[step], first.weights[step - 1]) > 1e-4
        own_report, other = first.reports[step - 1], second.reports[step - 1]
        assert (own_report.micro_batches, other.micro_batches) == (own_rows, other_rows)
        assert own_report.loss == other.loss
        assert own_report.kept + other.kept == one.reports[step - 1].kept > 0


def test_a_checkpoint_knows_nothing_of_the_teacher_and_goes_on_bit_for_bit(
    scenarios: dict[str, HiddenScenario], on_two: dict[str, list[Played]]
) -> None:
    whole, after = on_two["whole"][0], on_two["after"][0]
    assert after.reports[0].loss == whole.reports[2].loss
    assert after.weights[3].keys() == whole.weights[3].keys()
    assert all(torch.equal(after.weights[3][name], own) for name, own in whole.weights[3].items())
    model = AutoModelForCausalLM.from_pretrained(scenarios["whole"].path)
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in read_parameters(scenarios["before"].save)} == names
    assert whole.weights[3].keys() == names


def test_a_teacher_equal_to_the_student_gives_no_loss_through_all_stages(tmp_path: Path) -> None:
    """Teacher actor, cut and learner; rows alone, so that both trunks compute the same."""
    path = save_model(tmp_path / "model", 1, vocab_size=TOY_V)
    other = save_model(tmp_path / "other", 2, vocab_size=TOY_V)
    table = rollouts(path, 4)
    responses = table.column("response_ids").to_pylist()
    kept = {key: list(range(len(row))) for key, row in zip(keys(table), responses, strict=True)}
    reports = []
    for teacher in (path, other):
        scoring = teacher_actor(teacher, targets="hidden", dtype="bfloat16", max_batch_tokens=1)
        _, scores, targets = scoring.score(table)
        _, _, chosen = cut([0], keep_of(table, kept), scores, targets, table)
        chosen = chosen.set_column(0, chosen.schema.field("step"), [np.ones(len(chosen), np.int64)])
        learner = LearnerActor(
            StudentSpec(model=path),
            Scenario("", path, ()).spec().model_copy(update={"micro_batch_tokens": TOKENS}),
            LossSpec(),
            path,
            TOY_V,
            32,
            RUN_STEPS,
            0,
            seed=0,
            teacher=TeacherModel(TeacherSpec(model=teacher), teacher),
        )
        learner.join("localhost", learner.open_port(), 1)
        reports.append(learner.train_step(1, chosen))
        learner.close()
    same, usual = reports
    assert usual.loss > 0.1
    assert abs(same.loss) < 1e-5 * usual.loss
    assert same.grad_norm < 1e-4 * usual.grad_norm
