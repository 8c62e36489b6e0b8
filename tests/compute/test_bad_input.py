"""What does not make sense is refused in one line at the public functions, or ends in the open."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.compute.loss_made import NEG_INF, Problem
from tests.compute.selection_made import big_step, spec
from tip_ray.compute.divergence import row_statistics, token_divergence
from tip_ray.compute.loss import kept_loss, kept_loss_with_stats
from tip_ray.compute.rules import RULES
from tip_ray.compute.selection import select
from tip_ray.contract.errors import DataError, SpecError
from tip_ray.contract.spec import SelectionSpec

torch.set_num_threads(1)
KINDS = ("reverse_kl", "forward_kl", "jsd", "policy_gradient")


def one_line(caught: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(caught.value)


# --- kept_loss


def named(kind):
    """(everything that the loss reads, by name): three rows."""
    problem = Problem(0, n=3, k=1 if kind == "policy_gradient" else 2)
    hidden, head, ids, logprobs, weight = problem.arguments()
    return {
        "hidden_ND": hidden,
        "lm_head_VD": head,
        "support_ids_NK": ids,
        "teacher_logprobs_NK": logprobs,
        "weight_N": weight,
        "teacher_tail_logprob_N": problem.tail,
        "student_logprob_N": torch.full((3,), -1.5, dtype=torch.float64),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, NEG_INF])
@pytest.mark.parametrize(
    "name", ["teacher_logprobs_NK", "teacher_tail_logprob_N", "weight_N", "student_logprob_N"]
)
def test_numbers_that_are_none_are_refused_and_placed(kind, bad, name):
    values = named(kind)
    values[name] = values[name].clone()
    values[name][1] = bad
    if bad == NEG_INF and name.startswith("teacher"):  # what a sure teacher says
        assert kept_loss(**values, kind=kind).isfinite()
        return
    with pytest.raises(DataError, match=rf"{name}.*row 1") as caught:
        kept_loss(**values, kind=kind)
    assert one_line(caught)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_in_training_such_numbers_end_in_the_loss(kind, bad):
    """Ranks must stay in step: a loss that is not finite skips the update on all of them."""
    for name in ("hidden_ND", "lm_head_VD", "teacher_logprobs_NK", "weight_N"):
        values = named(kind)
        values[name] = values[name].detach().clone()
        values[name][1] = bad
        values["support_ids_NK"] = torch.tensor([[0, 1], [1, 2], [2, 3]])
        if kind == "policy_gradient":
            values["support_ids_NK"] = values["support_ids_NK"][:, :1]
        loss, _ = kept_loss_with_stats(**values, kind=kind, sampled_ids_N=torch.zeros(3).long())
        assert not loss.isfinite(), name


@pytest.mark.parametrize("id_", [12, 99, -2, -100])
def test_ids_outside_of_the_vocabulary_are_refused(id_):
    values = named("reverse_kl")
    values["support_ids_NK"] = values["support_ids_NK"].clone()
    values["support_ids_NK"][2, 1] = id_
    with pytest.raises(SpecError, match=rf"support_ids_NK: found id {id_}.*below 12.*-1") as caught:
        kept_loss(**values)
    assert one_line(caught)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"support_ids_NK": torch.rand(3, 2)}, "support_ids_NK: found torch.float32"),
        ({"support_ids_NK": torch.ones(3, 2).bool()}, "support_ids_NK: found torch.bool"),
        ({"vocab_size": 0}, "vocab_size: found 0"),
        ({"vocab_size": -1}, "vocab_size: found -1"),
        ({"tail_floor_nats": 0.0}, "tail_floor_nats: found 0.0"),
        ({"tail_floor_nats": NEG_INF}, "tail_floor_nats: found -inf"),
        ({"tail_floor_nats": math.nan}, "tail_floor_nats: found nan"),
        ({"clip": 0.0}, "loss.clip: found 0.0"),
        ({"clip": 1.0}, "loss.clip: found 1.0"),
        ({"beta": math.nan}, "loss.beta: found nan"),
        ({"teacher_tail_logprob_N": torch.zeros(2)}, "teacher_tail_logprob_N: found shape"),
        ({"student_logprob_N": torch.zeros(3, 1)}, "student_logprob_N: found shape"),
        ({"weight_N": torch.ones(4)}, "weight_N: found shape"),
        ({"lm_head_VD": torch.zeros(5)}, "lm_head_VD: found shape"),
    ],
)
def test_what_does_not_fit_says_which(change, says):
    with pytest.raises(SpecError, match=says) as caught:
        kept_loss(**(named("reverse_kl") | change))
    assert one_line(caught)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_flows_through_a_score(kind):
    values = named(kind)
    scores = {name: one.detach().clone() for name, one in values.items() if "logprob" in name}
    scores["weight_N"] = values["weight_N"].detach().clone()
    for one in scores.values():
        one.requires_grad_()
    kept_loss(**(values | scores), kind=kind).backward()
    assert all(one.grad is None for one in scores.values())
    assert values["hidden_ND"].grad.any()


def test_any_whole_numbers_do_as_ids():
    values = named("jsd")
    plain = kept_loss(**values, kind="jsd")
    for dtype in (torch.int32, torch.int16, torch.uint8):
        values["support_ids_NK"] = values["support_ids_NK"].to(dtype)
        assert kept_loss(**values, kind="jsd").item() == plain.item()


def test_a_row_of_one_token_and_none_at_all():
    values = named("forward_kl")
    rows = ("hidden_ND", "support_ids_NK", "teacher_logprobs_NK", "weight_N")
    rows += ("teacher_tail_logprob_N", "student_logprob_N")
    parts = [
        kept_loss(
            **(values | {name: values[name][start:end] for name in rows}), kind="forward_kl"
        ).item()
        for start, end in ((0, 1), (1, 3), (3, 3))
    ]
    assert sum(parts) == pytest.approx(kept_loss(**values, kind="forward_kl").item())
    assert parts[2] == 0.0


# --- token_divergence


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_broken_row_of_logits_is_nan_and_no_other(bad, side):
    both = torch.randn(2, 4, 6)
    expected = token_divergence(*both, chunk_rows=3)
    both[side, 2, 1] = bad
    found = token_divergence(*both, chunk_rows=3)
    for name in ("reverse_kl", "forward_kl", "jsd"):
        assert getattr(found, name).isnan().tolist() == [False, False, True, False]
        rows = [0, 1, 3]
        assert torch.equal(getattr(found, name)[rows], getattr(expected, name)[rows])
    assert row_statistics(both[side], 2, 6).entropy_N.isnan().tolist() == [
        False,
        False,
        True,
        False,
    ]


def test_a_row_that_rules_out_everything_is_nan():
    nothing, some = torch.full((1, 5), NEG_INF), torch.zeros(1, 5)
    assert token_divergence(nothing, some).reverse_kl.isnan().all()
    assert token_divergence(some, nothing).jsd.isnan().all()


# --- select


@pytest.mark.parametrize("retention", [0, 0.0, -0.1, 1.0000001, 2, math.nan, math.inf])
def test_a_retention_outside_of_its_range_is_no_spec(retention):
    with pytest.raises(ValidationError, match="retention"):
        SelectionSpec(rule="random", retention=retention)


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"all"}))
def test_equal_scores_empty_rows_and_single_tokens(rule):
    same, offsets = np.full(7, 0.4), [0, 0, 1, 1, 7, 7]
    keep = select(spec(rule, 0.5), same, same, same, offsets)
    assert keep[0]
    assert keep[1:].sum() == 3
    whole = select(spec(rule, 0.5, scope="batch", keep_at_least=0), same, same, same, offsets)
    assert whole.sum() == 3
    if rule not in ("random", "entropy_sample"):  # ties go to the earlier token
        assert keep.tolist() == [1, 1, 1, 1, 0, 0, 0]
        assert whole.tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_an_entropy_axis_in_denormals_still_ranks():
    h = np.array([0.0, 5e-324, 1e-320, 1e-310, 2e-310, 0.0])
    keep = select(spec("soft_or", 0.34), h, np.zeros(6), np.zeros(6), [0, 6])
    assert keep.tolist() == [0, 0, 0, 1, 1, 0]


def test_a_step_seen_through_torch_is_the_same():
    h, d, f, offsets = big_step(2)
    tensors = [torch.from_numpy(one) for one in (h, d, f)]
    assert np.array_equal(
        select(spec(), *tensors, torch.from_numpy(offsets)), select(spec(), h, d, f, offsets)
    )
