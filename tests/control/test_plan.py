"""The plan's arithmetic, against bytes of real tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from safetensors import safe_open

from tests.runs_made import QUICKSTART
from tip_ray.commands.begin import plan_lines
from tip_ray.contract import tables
from tip_ray.control.plan import Hop, bytes_a_token, count_parameters, hidden_width, make_plan
from tip_ray.control.spec_file import load_spec
from tip_ray.demo import checkpoint_path


def grown(schema: pa.Schema, tokens: int, kept: int) -> int:
    """Bytes of one row whose response has `tokens` tokens, `kept` of them kept."""
    of_kept = "kept_positions" in schema.names or "kept" in schema.names
    columns: dict[str, Any] = {}
    for field in schema:
        if pa.types.is_list(field.type) and field.name not in ("prompt_ids", "teacher_prompt_ids"):
            every = field.name in ("quadrant", "input_ids") or not of_kept
            item: Any = 1
            if pa.types.is_fixed_size_list(field.type.value_type):
                item = [1] * field.type.value_type.list_size
            columns[field.name] = [[item] * (tokens if every else kept)]
        elif pa.types.is_list(field.type):
            columns[field.name] = [[1, 2]]
        else:
            columns[field.name] = [""] if field.type == pa.string() else [1]
    return tables.nbytes(tables.build(schema, columns))


@pytest.mark.parametrize(
    "schema",
    [
        tables.rollouts_schema(6),
        tables.SCORES,
        tables.KEEP,
        tables.selected_schema(6),
        tables.selected_schema(6, "hidden"),
    ],
    ids=["ROLLOUTS", "SCORES", "KEEP", "SELECTED", "hidden SELECTED"],
)
def test_bytes_a_token_are_what_a_token_adds(schema: pa.Schema) -> None:
    added = grown(schema, 200, 50) - grown(schema, 100, 25)
    assert bytes_a_token(schema, 0.25) == added / 100
    everything = grown(schema, 200, 200) - grown(schema, 100, 100)
    assert bytes_a_token(schema) == everything / 100


def test_the_documented_formulas_hold() -> None:
    spec = load_spec(QUICKSTART, {"support.k": 10, "selection.retention": 0.25})
    hops = {hop.name: hop for hop in make_plan(spec).hops}
    assert hops["rollout -> teacher"].bytes_a_token == 17 + 8 * 10
    assert hops["teacher -> selector"].bytes_a_token == 17
    assert hops["selector -> cut"].bytes_a_token == 1 + 8 * 0.25
    assert hops["cut -> learner"].bytes_a_token == 4 + 0.25 * (20 + 8 * 10)
    assert hops["cut -> learner"].bytes_a_token_unpruned == 4 + 20 + 8 * 10
    tokens = 32 * 4 * 48
    assert hops["teacher -> selector"].bytes_a_step == 17 * tokens


def test_hidden_targets_follow_the_teachers_width(tmp_path: Path) -> None:
    changes = {"teacher.targets": "hidden", "selection.retention": 0.25}
    spec = load_spec(QUICKSTART, changes)
    config = json.loads((checkpoint_path("carry-teacher") / "config.json").read_text())
    for plan, width in (
        (make_plan(spec), config["hidden_size"]),
        (make_plan(spec, teacher_hidden=4096), 4096),
    ):
        hop = plan.hops[-1]
        assert hop.bytes_a_token == 4 + 0.25 * (16 + 2 * width)
        assert hop.bytes_a_token_unpruned == 4 + 16 + 2 * width
        assert hop.bytes_a_step == hop.bytes_a_token * plan.response_tokens_a_step
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 640}}))
    assert hidden_width(tmp_path) == 640
    elsewhere = make_plan(load_spec(QUICKSTART, {**changes, "teacher.model": "org/name"}))
    assert elsewhere.hops[-1] == Hop("cut -> learner", None, None, None)
    assert any("known once the teacher is read" in line for line in plan_lines(elsewhere))
    assert elsewhere.hops[:3] == make_plan(spec).hops[:3]


def test_a_small_vocabulary_narrows_the_support() -> None:
    spec = load_spec(QUICKSTART, {"support.k": 16})
    narrow = make_plan(spec, vocab_size=15).hops[0]
    assert narrow.bytes_a_token == 17 + 8 * 15
    assert make_plan(spec).hops == make_plan(spec, vocab_size=15).hops  # by the two configs
    assert make_plan(spec, vocab_size=50_000).hops[0].bytes_a_token == 17 + 8 * 16


def test_pools_are_counted_over_their_replicas() -> None:
    changes = {"rollout.replicas": 3, "rollout.num_cpus": 2, "teacher.num_gpus": 4}
    plan = make_plan(load_spec(QUICKSTART, {**changes, "teacher.replicas": 2}))
    pools = {pool.name: (pool.replicas, pool.cpus, pool.gpus) for pool in plan.pools}
    assert pools == {
        "rollout": (3, 6, 0),
        "teacher": (2, 2, 8),
        "learner": (1, 1, 0),
        "selector": (1, 0, 0),
    }
    assert (plan.cpus, plan.gpus) == (9, 8)


def test_parameters_are_read_from_the_headers_of_the_weights(tmp_path: Path) -> None:
    directory = checkpoint_path("carry-student")
    real = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            real += sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert count_parameters(directory) == real
    assert make_plan(load_spec(QUICKSTART)).weight_sync_bytes == 2 * real
    float32 = load_spec(QUICKSTART, {"student.dtype": "float32"})
    assert make_plan(float32).weight_sync_bytes == 4 * real
    assert count_parameters(tmp_path) is None
    on_the_hub = load_spec(QUICKSTART, {"student.model": "org/name"})
    assert make_plan(on_the_hub).weight_sync_bytes is None
