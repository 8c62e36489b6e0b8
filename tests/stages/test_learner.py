"""One learner rank: what changes nothing, what is refused, what it publishes and exports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.stages.learner_toys import (
    HEAD_ROWS,
    TOKENS,
    VOCAB,
    K,
    Played,
    Scenario,
    dense_loss,
    distance,
    play_densely,
    play_on_one,
    published,
    save_student,
    selected,
    support,
    whole_distance,
)
from tip_ray.compute.packing import micro_batches
from tip_ray.contract.errors import ReplicaError, SpecError, TableError
from tip_ray.contract.tables import (
    FLOAT32,
    column,
    concat,
    list_array,
    list_of,
    offsets,
    rows_of,
    selected_schema,
)
from tip_ray.stages import export


@pytest.fixture(scope="module", params=[("qwen3", True), ("llama", False)], ids=["tied", "untied"])
def path(request, tmp_path_factory: pytest.TempPathFactory) -> str:
    kind, tied = request.param
    return save_student(tmp_path_factory.mktemp("student"), kind, tied=tied)


@pytest.fixture
def scenario(path: str) -> Scenario:
    return Scenario("one", path, [[selected(1, 6, seed=7)]])


@pytest.fixture
def once(scenario: Scenario) -> Played:
    """The scenario's only step; ask for it before `actor`: a process has one group at a time."""
    return play_on_one(scenario)


@pytest.fixture
def actor(scenario: Scenario):
    made = scenario.actor(0)
    made.join("localhost", made.open_port(), 1)
    yield made
    made.close()


def with_column(table, name: str, values: np.ndarray, kind):
    made = list_array(values, offsets(table, name), kind)
    return table.set_column(table.column_names.index(name), table.schema.field(name), made)


# What changes nothing


@pytest.mark.parametrize("tokens", [1, 2 * TOKENS, 100 * TOKENS])
def test_the_size_of_micro_batches_changes_nothing(scenario, tokens) -> None:
    plain = play_on_one(scenario)
    other = play_on_one(replace(scenario, learner={"micro_batch_tokens": tokens}))
    counts = {1: 6, 2 * TOKENS: 3, 100 * TOKENS: 1}
    assert other.reports[0].micro_batches == counts[tokens]
    assert distance(other.gradients[1], plain.gradients[1]) < 5e-6


def test_gradient_checkpointing_changes_nothing(scenario) -> None:
    plain = play_on_one(scenario)
    other = play_on_one(replace(scenario, learner={"gradient_checkpointing": True}))
    assert distance(other.gradients[1], plain.gradients[1]) < 1e-6


def test_parts_and_repeats_equal_one_table_bit_for_bit(scenario, once, actor) -> None:
    table = scenario.steps[0][0]
    attempt = table.column_names.index("attempt")
    late = table.slice(2, 2)
    stale = with_column(late, "kept_weight", column(late, "kept_weight") * 7, list_of(FLOAT32))
    newer = table.slice(2, 4).set_column(
        attempt, table.schema.field("attempt"), [np.full(4, 2, np.int32)]
    )
    report = actor.train_step(1, newer, table.slice(0, 2), stale)
    assert report.kept == once.reports[0].kept
    assert report.loss == once.reports[0].loss
    weights = published(actor, 1)
    assert all(torch.equal(weights[name], own) for name, own in once.weights[1].items())


def test_tiny_weights_do_not_underflow_in_float16(scenario) -> None:
    table = scenario.steps[0][0]
    tiny = with_column(table, "kept_weight", column(table, "kept_weight") * 1e-4, list_of(FLOAT32))
    half = replace(scenario, steps=[[tiny]], dtype="float16")
    found, exact = play_on_one(half), play_densely(half)
    assert whole_distance(found.gradients[1], exact.gradients[1]) < 0.01
    assert found.reports[0].loss == pytest.approx(exact.reports[0].loss, rel=0.01)


# Teacher = student


def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(scenario, path) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double()
    table, logprobs, tails = scenario.steps[0][0], [], []
    for row in table.to_pylist():
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0].detach()
        ids_kK = torch.tensor(row["support_ids"]).long().view(-1, K)
        own_kK, tail_k = support(logits[row["kept_positions"], :VOCAB], ids_kK)
        logprobs.append(own_kK.float().numpy())
        tails.append(tail_k.float().numpy())
    table = with_column(table, "teacher_logprobs", np.concatenate(logprobs), rows_of(FLOAT32, K))
    table = with_column(table, "teacher_tail_logprob", np.concatenate(tails), list_of(FLOAT32))
    report = play_on_one(replace(scenario, steps=[[table]])).reports[0]
    usual = play_on_one(scenario).reports[0]
    assert abs(report.loss) < 1e-6
    assert 0 < report.grad_norm < 1e-5 * usual.grad_norm


# Steps happen once, in order


def test_a_repeated_step_answers_as_before_and_trains_nothing(scenario, actor) -> None:
    table = scenario.steps[0][0]
    first = actor.train_step(1, table)
    before = published(actor, 1)
    assert actor.train_step(1, table) == first
    after = published(actor, 1)
    assert all(torch.equal(after[name], own) for name, own in before.items())


def test_only_the_last_report_is_kept(actor) -> None:
    """Each names every row of its step: kept, they would grow with the run."""
    last = [actor.train_step(step) for step in (1, 2)][-1]
    assert actor.train_step(2) == last
    with pytest.raises(ReplicaError, match="asked for step 1 after step 2"):
        actor.train_step(1)


def test_a_step_without_any_table_trains_nothing(actor) -> None:
    before = published(actor, 0)
    report = actor.train_step(1)
    assert (report.loss, report.grad_norm, report.kept, report.skipped) == (0.0, 0.0, 0, False)
    after = published(actor, 1)
    assert all(torch.equal(after[name], own) for name, own in before.items())


def test_what_does_not_follow_is_refused(scenario, actor) -> None:
    with pytest.raises(ReplicaError, match="asked for step 2 after step 0"):
        actor.train_step(2, scenario.steps[0][0])
    with pytest.raises(ReplicaError, match="asked for version 1 after step 0"):
        list(actor.publish(1))
    with pytest.raises(TableError, match="rows of step 4, expected step 1"):
        actor.train_step(1, selected(4, 1, seed=0))
    with pytest.raises(TableError, match="reward"):
        actor.train_step(1, scenario.steps[0][0].append_column("reward", [[0.0] * 6]))


def test_work_before_join_is_refused(scenario) -> None:
    with pytest.raises(ReplicaError, match="call join first"):
        scenario.actor(0).train_step(1, scenario.steps[0][0])


def test_a_closed_rank_can_join_again_from_the_start(scenario, actor) -> None:
    first = actor.train_step(1, scenario.steps[0][0])
    actor.close()
    actor.join("localhost", actor.open_port(), 1)
    assert actor.train_step(1, scenario.steps[0][0]).loss == first.loss


def test_a_head_that_bends_its_logits_is_refused(path, scenario, tmp_path: Path) -> None:
    for file in Path(path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"final_logit_softcapping": 30.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    actor = replace(scenario, path=str(tmp_path)).actor(0)
    try:
        with pytest.raises(SpecError, match="final_logit_softcapping"):
            actor.join("localhost", actor.open_port(), 1)
    finally:
        actor.close()


# Weights


def test_published_weights_are_the_cast_masters_under_the_files_names(scenario, path) -> None:
    with safe_open(f"{path}/model.safetensors", "pt") as file:
        masters = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    half = replace(scenario, dtype="bfloat16").actor(0)
    half.join("localhost", half.open_port(), 1)
    groups = list(half.publish(0))[1::2]
    half.close()
    weights = {name: tensor for group in groups for name, tensor in group.tensors()}
    assert weights.keys() == masters.keys()
    assert all(torch.equal(weights[name], own.bfloat16()) for name, own in masters.items())
    layers = [{slot.name.split(".layers.")[-1][:2] for slot in group.slots} for group in groups]
    assert layers[1:] == [{"0."}, {"1."}]


def test_publishing_after_a_forward_alone_still_works(scenario, actor) -> None:
    before = published(actor, 0)
    with torch.no_grad():
        actor._group.root(micro_batches(scenario.steps[0][0], 4096)[0])
    after = published(actor, 0)
    assert all(torch.equal(after[name], own) for name, own in before.items())


# Export


def test_the_export_loads_and_answers_as_the_trained_student(scenario, path, tmp_path) -> None:
    target = tmp_path / "deep" / "export"
    played = play_on_one(replace(scenario, dtype="bfloat16", export=f"file://{target}"))
    exported = AutoModelForCausalLM.from_pretrained(target)  # in the dtype that config.json says
    assert exported.dtype == torch.bfloat16
    assert exported.generation_config.temperature == 0.6
    assert (target / "tokenizer_config.json").is_file()
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    reference.load_state_dict(played.weights[1], strict=False)
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, reference(ids).logits)
    assert exported(ids).logits.shape[-1] == HEAD_ROWS
    loss, _ = dense_loss(exported.float(), scenario.steps[0][0])
    assert loss < played.reports[0].loss
    with safe_open(target / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(played.weights[1])


def test_a_large_export_is_split_with_an_index(
    scenario, path, actor, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    names = actor.export(str(tmp_path / "split"), path)
    weights = [name for name in names if name.endswith(".safetensors")]
    assert len(weights) > 2
    assert weights[0] == f"model-00001-of-{len(weights):05d}.safetensors"
    assert sum((tmp_path / "split" / name).stat().st_size > 20_000 + 4096 for name in weights) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "split")
    before = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = {name: own.detach() for name, own in exported.named_parameters()}
    expected = {name: own.detach() for name, own in before.named_parameters()}
    assert distance(found, expected) == 0


def test_an_export_replaces_the_one_before_whole(path, actor, tmp_path) -> None:
    target = tmp_path / "export"
    target.mkdir()
    (target / "left-over.json").write_text("{}")
    names = actor.export(str(target), path)
    assert sorted(file.name for file in target.iterdir()) == names
    assert list(tmp_path.iterdir()) == [target]


def test_an_export_that_fails_leaves_the_one_before(path, actor, tmp_path) -> None:
    target, broken = tmp_path / "export", tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    names = actor.export(str(target), path)
    with pytest.raises(ValueError, match="Expecting property name"):
        actor.export(str(target), str(broken))
    assert sorted(file.name for file in target.iterdir()) == names
    assert set(tmp_path.iterdir()) == {target, broken}


def test_an_export_to_an_object_store_ends_with_config_json(path, actor) -> None:
    names = actor.export("memory://learner/export", path)
    fs = fsspec.filesystem("memory")
    found = fs.ls("/learner/export", detail=True)
    assert sorted(Path(one["name"]).name for one in found) == names
    assert Path(max(found, key=lambda one: one["created"])["name"]).name == "config.json"
    fs.rm("/learner", recursive=True)


def test_selected_of_another_support_width_is_refused(actor) -> None:
    wide = concat([], selected_schema(K + 1))
    with pytest.raises(TableError, match="support_ids"):
        actor.train_step(1, wide)
