"""SCORES -> kept tokens -> loss and gradients of the student: what changes nothing, and what is 0.

One step of made-up rollouts with real distributions goes through the selector, the cut, the packing
and the learner's root module, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.stages.learner_toys import VOCAB, save_student, support
from tests.tables_made import MadeStep, made_step, row_tokens
from tip_ray.compute.packing import micro_batches
from tip_ray.contract import tables
from tip_ray.contract.spec import BUILTIN_RULES, SAMPLING_RULES, LossSpec, SelectionSpec
from tip_ray.stages import fsdp
from tip_ray.stages.cut import cut
from tip_ray.stages.fsdp import KeptStudent
from tip_ray.stages.selector import SelectorActor

torch.set_num_threads(1)
K, ROWS = 5, 8
KINDS = ("reverse_kl", "forward_kl", "jsd", "policy_gradient")
RULES = [rule for rule in BUILTIN_RULES if rule != "all"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    path = save_student(tmp_path_factory.mktemp("student"), "llama", tied=False)
    return AutoModelForCausalLM.from_pretrained(path).double()


@pytest.fixture(scope="module")
def made(model: torch.nn.Module) -> MadeStep:
    step = made_step(np.random.default_rng(3), rows=ROWS, k=K, vocab_size=VOCAB)
    tokens = int(tables.offsets(step.rollouts, "response_ids")[-1])
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(tokens, VOCAB, generator=random).double()
    ids = torch.rand(tokens, VOCAB, generator=random).argsort(-1)[:, :K]
    logprobs, tail = support(logits, ids)
    sampled = torch.tensor(tables.column(step.rollouts, "response_ids").astype(np.int64))
    targets = step.targets
    for name, values in (
        ("support_ids", ids),
        ("teacher_logprobs", logprobs),
        ("teacher_tail_logprob", tail),
        ("teacher_sampled_logprob", logits.log_softmax(-1).gather(1, sampled[:, None])[:, 0]),
    ):
        targets = replaced(targets, name, values.numpy())
    now = torch.cat([sampled_logprobs(model, row) for row in step.rollouts.to_pylist()])
    recorded = now + 0.2 * torch.randn(tokens, generator=random)  # some ratios are clipped
    rollouts = replaced(step.rollouts, "student_logprob", recorded.numpy())
    return MadeStep(rollouts, step.scores, targets)


@torch.no_grad()
def sampled_logprobs(model: torch.nn.Module, row: dict[str, Any]) -> torch.Tensor:
    prompt, response = row["prompt_ids"], torch.tensor(row["response_ids"])
    logits = model(torch.tensor([[*prompt, *row["response_ids"]]]), use_cache=False).logits[0]
    predicting = logits[len(prompt) - 1 : -1, :VOCAB]
    return predicting.log_softmax(-1).gather(1, response[:, None])[:, 0]


def replaced(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    place, kind = table.column_names.index(name), table.schema.field(name)
    item = kind.type.value_type
    item = item.value_type if pa.types.is_fixed_size_list(item) else item
    flat = values.astype(item.to_pandas_dtype())
    ends = tables.offsets(table, name)
    return table.set_column(place, kind, tables.list_array(flat, ends, kind.type))


@dataclass(frozen=True)
class How:
    """What must not matter."""

    ranks: int = 1
    micro_batch_tokens: int = 1  # each row alone: no padding
    chunk_rows: int = 512
    order: int | None = None  # a seed; None: as made
    batches: int = 1  # of the teacher


@dataclass(frozen=True)
class Outcome:
    kept: dict[tables.Key, Any]
    loss: torch.Tensor
    gradients: tuple[torch.Tensor, ...]


def outcome(
    model: torch.nn.Module,
    made: MadeStep,
    selection: SelectionSpec,
    loss: LossSpec,
    how: How,
) -> Outcome:
    actor = SelectorActor(selection, loss, vocab_size=VOCAB, ranks=how.ranks, samples=2, seed=3)
    order = np.arange(ROWS)
    if how.order is not None:
        order = np.random.default_rng(how.order).permutation(ROWS)
    parts = [
        MadeStep(*(one.take(own) for one in (made.rollouts, made.scores, made.targets)))
        for own in np.array_split(order, how.batches)
    ]
    scores = [part.scores for part in parts]
    _, keep = actor.select(row_tokens(made.rollouts), {}, None, *scores)
    sampled_only = loss.kind == "policy_gradient"
    cuts = [
        cut(
            range(how.ranks),
            keep,
            part.scores,
            part.targets,
            part.rollouts,
            sampled_only=sampled_only,
        )
        for part in parts
    ]
    root, total = KeptStudent(model, loss, VOCAB), torch.zeros((), dtype=torch.float64)
    with mock.patch.object(fsdp, "LOSS_CHUNK_ROWS", how.chunk_rows):
        for rank in range(how.ranks):
            selected = pa.concat_tables([one[2 + rank] for one in cuts])
            for batch in micro_batches(selected, how.micro_batch_tokens):
                total = total + root(batch)[0]
    rows = zip(tables.keys(keep), keep.to_pylist(), strict=True)
    kept = {key: (row["kept"], row["weight"], row["quadrant"]) for key, row in rows}
    weights = list(model.parameters())
    if not total.requires_grad:  # nothing was kept
        return Outcome(kept, total, tuple(torch.zeros_like(one) for one in weights))
    return Outcome(kept, total.detach(), torch.autograd.grad(total, weights))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(RULES),
    st.sampled_from(["rollout", "batch"]),
    st.sampled_from(KINDS),
    st.sampled_from(["token", "rollout"]),
    st.floats(0.1, 1.0),
    st.booleans(),
    st.builds(
        How,
        ranks=st.integers(1, 4),
        micro_batch_tokens=st.integers(1, 60),
        chunk_rows=st.integers(1, 6),
        order=st.integers(0, 99),
        batches=st.integers(1, 3),
    ),
)
def test_ranks_micro_batches_chunks_padding_and_order_change_nothing(
    model, made, rule, scope, kind, normalize, retention, reweight, how
) -> None:
    options = {"reweight": "inclusion"} if reweight and rule in SAMPLING_RULES else {}
    selection = SelectionSpec(rule=rule, scope=scope, retention=retention, **options)
    loss = LossSpec(kind=kind, normalize=normalize)
    plain, other = (outcome(model, made, selection, loss, one) for one in (How(), how))
    assert other.kept == plain.kept
    torch.testing.assert_close(other.loss, plain.loss, rtol=1e-12, atol=1e-14)
    largest = max(one.abs().max() for one in plain.gradients)
    # draws of their own may keep nothing, and all that is kept of policy_gradient be clipped
    assert largest > 1e-3 or options or kind == "policy_gradient"
    for a, b in zip(other.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(largest))


@pytest.mark.parametrize(
    ("rule", "kind"), zip(("soft_or", "entropy_sample", "prefix", "q3"), KINDS, strict=True)
)
def test_full_retention_is_the_rule_all_bit_for_bit(model, made, rule, kind) -> None:
    loss, how = LossSpec(kind=kind), How(micro_batch_tokens=40, chunk_rows=3)
    everything = outcome(model, made, SelectionSpec(rule="all"), loss, how)
    found = outcome(model, made, SelectionSpec(rule=rule, retention=1.0), loss, how)
    assert found.kept == everything.kept
    assert torch.equal(found.loss, everything.loss)
    for a, b in zip(found.gradients, everything.gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_head_inputs_get_exactly_no_gradient_where_tokens_are_dropped(model, made, kind) -> None:
    selection, loss = SelectionSpec(rule="soft_or", retention=0.4), LossSpec(kind=kind)
    actor = SelectorActor(selection, loss, vocab_size=VOCAB, ranks=1, samples=0, seed=3)
    _, keep = actor.select(row_tokens(made.rollouts), {}, None, made.scores)
    sampled_only = kind == "policy_gradient"
    tables_of_batch = (keep, made.scores, made.targets, made.rollouts)
    _, _, selected = cut([0], *tables_of_batch, sampled_only=sampled_only)
    root = KeptStudent(model, loss, VOCAB)
    (batch,) = micro_batches(selected, 1000)
    seen: list[torch.Tensor] = []

    def keep_hidden(_module: Any, _inputs: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    handle = model.base_model.register_forward_hook(keep_hidden)
    try:
        root(batch)[0].backward()
    finally:
        handle.remove()
        model.zero_grad()
    gradient_ND = seen[0].grad.flatten(0, 1)
    dropped = torch.ones(len(gradient_ND), dtype=torch.bool)
    dropped[batch.kept_rows_N] = False
    assert dropped.any()
    assert not gradient_ND[dropped].any()
    pushed = gradient_ND[~dropped].any(1).sum().item()
    # clipped tokens of policy_gradient push nothing
    assert pushed == len(batch.kept_rows_N) if kind != "policy_gradient" else pushed > 2
