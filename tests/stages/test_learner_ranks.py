"""Two FSDP2 ranks against one, and both against plain transformers with dense divergences."""

from __future__ import annotations

import hashlib
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.stages.learner_toys import (
    Played,
    Scenario,
    dense_gradients,
    distance,
    play_densely,
    play_on_one,
    play_on_two,
    save_student,
    selected,
    whole_distance,
)
from tip_ray.contract.errors import RunDirectoryError
from tip_ray.contract.tables import FLOAT32, column, list_array, list_of, offsets

# Rows, which are micro-batches here, of rank 0 and rank 1 by step: unequal both ways round, a rank
# without any, no rows at all, and one each.
ROWS = ((3, 2), (2, 3), (4, 0), (0, 0), (1, 1))
STUDENTS = [("qwen3", True), ("qwen3", False), ("llama", True), ("llama", False)]
NAMES = [f"{kind}-{'tied' if tied else 'untied'}" for kind, tied in STUDENTS]

# Float32: sums in another order. Gradients compare at equal weights only in the first step.
ROUNDING = 5e-6


def parts(step: int, rows: tuple[int, int]) -> list:
    return [
        selected(step, count, seed=100 * step + rank, slot=50 * rank)
        for rank, count in enumerate(rows)
    ]


def poisoned(table):
    """The table with one infinite weight."""
    weights = np.array(column(table, "kept_weight"))
    weights[0] = math.inf
    spoilt = list_array(weights, offsets(table, "kept_weight"), list_of(FLOAT32))
    place = table.column_names.index("kept_weight")
    return table.set_column(place, table.schema.field("kept_weight"), spoilt)


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    folder = tmp_path_factory.mktemp("students")
    paths = {
        name: save_student(folder / name, kind, tied=tied)
        for name, (kind, tied) in zip(NAMES, STUDENTS, strict=True)
    }
    steps = [parts(step, rows) for step, rows in enumerate(ROWS, start=1)]
    first, second, third = steps[:3]
    made = [Scenario(name, path, steps) for name, path in paths.items()]
    tied = paths["qwen3-tied"]
    made += [
        Scenario("clipped", tied, [first], {"grad_clip": 0.01}),
        Scenario("bfloat16", tied, [first], dtype="bfloat16", export=str(folder / "exported")),
        Scenario("float16", tied, [first], dtype="float16"),
        Scenario("checkpointed", tied, [first], {"gradient_checkpointing": True}),
        Scenario("poisoned", tied, [first, [second[0], poisoned(second[1])], third]),
    ]
    # A checkpoint by two ranks, taken up by two; one by one rank, taken up by two.
    by_two, by_one = str(folder / "by-two"), str(folder / "by-one")
    play_on_one(Scenario("by-one", tied, [first, second], save=by_one))
    made += [
        Scenario("by-two", tied, [first, second], save=by_two),
        Scenario("two-by-two", tied, [third], load=by_two),
        Scenario("two-by-one", tied, [third], load=by_one),
    ]
    return {one.name: one for one in made}


@pytest.fixture(scope="module")
def on_two(
    scenarios: dict[str, Scenario], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Played]]:
    return play_on_two(list(scenarios.values()), tmp_path_factory.mktemp("played"))


@pytest.mark.parametrize("name", NAMES)
def test_first_gradients_equal_one_rank_and_the_dense_reference(name, scenarios, on_two) -> None:
    two, one, dense = on_two[name][0], play_on_one(scenarios[name]), play_densely(scenarios[name])
    assert distance(one.gradients[1], dense.gradients[1]) < ROUNDING
    assert distance(two.gradients[1], dense.gradients[1]) < ROUNDING
    assert distance(two.gradients[1], one.gradients[1]) < ROUNDING


@pytest.mark.parametrize("name", NAMES)
def test_weights_follow_the_dense_reference_through_uneven_steps(name, scenarios, on_two) -> None:
    two, dense = on_two[name][0], play_densely(scenarios[name])
    for step in range(1, len(ROWS) + 1):
        assert distance(two.weights[step], dense.weights[step]) < ROUNDING
        moved = distance(two.weights[step], two.weights[step - 1])
        assert (moved == 0) == (ROWS[step - 1] == (0, 0))


@pytest.mark.parametrize("name", NAMES)
def test_reports_sum_up_to_the_dense_reference(name, scenarios, on_two) -> None:
    ranks, dense = on_two[name], play_densely(scenarios[name])
    for own, other, whole in zip(ranks[0].reports, ranks[1].reports, dense.reports, strict=True):
        for report in (own, other):
            assert report.loss == pytest.approx(whole.loss, rel=1e-4)
            assert report.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
            assert report.learning_rate == whole.learning_rate
            assert not report.skipped
            assert report.peak_bytes > 1e6
        assert own.tokens + other.tokens == whole.tokens
        assert own.kept + other.kept == whole.kept
        gap_sum = own.logprob_gap_sum + other.logprob_gap_sum
        assert gap_sum == pytest.approx(whole.logprob_gap_sum, rel=1e-4)
        gap_max = max(own.logprob_gap_max, other.logprob_gap_max)
        assert gap_max == pytest.approx(whole.logprob_gap_max, rel=1e-4)
    assert [report.micro_batches for report in ranks[0].reports] == [own for own, _ in ROWS]
    assert [report.micro_batches for report in ranks[1].reports] == [own for _, own in ROWS]


def test_clipping_scales_by_the_norm_over_all_ranks(scenarios, on_two) -> None:
    two, dense = on_two["clipped"][0], play_densely(scenarios["clipped"])
    assert two.reports[0].grad_norm == pytest.approx(dense.reports[0].grad_norm, rel=1e-5)
    assert distance(two.weights[1], dense.weights[1]) < ROUNDING
    squares = sum(float(gradient.double().square().sum()) for gradient in two.gradients[1].values())
    assert math.sqrt(squares) == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_within_its_noise(dtype, scenarios, on_two) -> None:
    scenario, two = scenarios[dtype], on_two[dtype][0]
    exact = play_densely(scenario).gradients[1]
    noise = whole_distance(dense_gradients(scenario, getattr(torch, dtype)), exact)
    assert 0.2 * noise < whole_distance(two.gradients[1], exact) < 2 * noise < 0.1
    assert {gradient.dtype for gradient in two.gradients[1].values()} == {torch.float32}
    assert {str(tensor.dtype) for tensor in two.weights[1].values()} == {f"torch.{dtype}"}


def test_gradient_checkpointing_changes_nothing(scenarios, on_two) -> None:
    plain, checkpointed = on_two["qwen3-tied"][0], on_two["checkpointed"][0]
    assert distance(checkpointed.gradients[1], plain.gradients[1]) < 1e-6


def test_one_ranks_poison_skips_the_update_on_all(on_two) -> None:
    for played in on_two["poisoned"]:
        assert [report.skipped for report in played.reports] == [False, True, False]
        assert not math.isfinite(played.reports[1].loss)
        assert math.isfinite(played.reports[2].grad_norm)
    weights = on_two["poisoned"][0].weights
    assert all(torch.equal(weights[2][name], own) for name, own in weights[1].items())
    assert distance(weights[3], weights[2]) > 1e-4


def test_two_ranks_export_what_they_publish(scenarios, on_two) -> None:
    scenario, (first, second) = scenarios["bfloat16"], on_two["bfloat16"]
    assert "model.safetensors" in first.files
    assert second.files == []
    assert second.weights[1] == {}
    exported = AutoModelForCausalLM.from_pretrained(scenario.export)
    assert sorted(path.name for path in Path(scenario.export).iterdir()) == first.files
    for name, tensor in exported.named_parameters():
        assert torch.equal(tensor, first.weights[1][name])


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], own) for name, own in expected.items())


def test_two_ranks_go_on_from_their_checkpoint_bit_for_bit(on_two) -> None:
    whole, resumed = on_two["qwen3-tied"][0], on_two["two-by-two"][0]
    assert same(resumed.weights[2], whole.weights[2])
    assert same(resumed.weights[3], whole.weights[3])
    assert resumed.reports[0].loss == whole.reports[2].loss


def test_one_rank_takes_up_what_two_saved(scenarios, on_two) -> None:
    by_two = scenarios["by-two"]
    one = play_on_one(replace(by_two, steps=[], load=by_two.save, save=""))
    assert same(one.weights[2], on_two["by-two"][0].weights[2])
    assert same(one.moments, on_two["by-two"][0].moments)
    assert {int(own) for name, own in one.moments.items() if name.startswith("step/")} == {2}


def test_two_ranks_take_up_what_one_saved(scenarios, on_two) -> None:
    by_one, two = scenarios["two-by-one"], on_two["two-by-one"][0]
    one = play_on_one(by_one)
    assert same(two.weights[2], one.weights[2])
    assert distance(two.weights[3], one.weights[3]) < ROUNDING
    assert distance(two.moments, one.moments) < 1e-4


def test_saved_files_are_named_and_summed(scenarios, on_two) -> None:
    for rank, played in enumerate(on_two["by-two"]):
        content = (Path(scenarios["by-two"].save) / played.saved.name).read_bytes()
        assert played.saved.name == f"learner-0000{rank}-of-00002.safetensors"
        assert played.saved.nbytes == len(content)
        assert played.saved.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_ranks_file_is_refused(missing, scenarios, on_two, tmp_path) -> None:
    by_two = scenarios["by-two"]
    there = on_two["by-two"][1 - missing].saved.name
    shutil.copy(Path(by_two.save) / there, tmp_path)
    with pytest.raises(RunDirectoryError, match=f"the file of rank {missing} is missing"):
        play_on_one(replace(by_two, steps=[], load=str(tmp_path), save=""))
