"""Every kind of loss through the learner's root module, against dense float64 row by row."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.compute.dense_reference import support_loss
from tests.stages.learner_toys import TAIL_FLOOR, VOCAB, save_student, selected
from tip_ray.compute.packing import micro_batches
from tip_ray.contract.spec import LossSpec
from tip_ray.contract.tables import build, selected_schema
from tip_ray.stages.fsdp import KeptStudent

KINDS: list[dict[str, Any]] = [
    {"kind": "reverse_kl"},
    {"kind": "forward_kl"},
    {"kind": "jsd", "beta": 0.3},
    {"kind": "policy_gradient", "clip": 0.1},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    path = save_student(tmp_path_factory.mktemp("student"), "qwen3", tied=True)
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


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_loss_and_gradients_equal_a_dense_reference(
    model: torch.nn.Module, options: dict[str, Any]
) -> None:
    table = selected(1, 6, seed=7)
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
