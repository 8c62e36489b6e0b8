"""What rollout.engine_args may hold for vLLM; no engine is started."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.stages.rollout_toys import config, save_student
from tip_ray.contract.errors import SpecError
from tip_ray.stages.engines.vllm import VllmEngine
from tip_ray.stages.engines.vllm_args import ELSEWHERE, INEXACT, build_engine_args


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_student(tmp_path_factory.mktemp("student"))


def refused(student: str, **engine_args: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        build_engine_args(config(student, engine_args=engine_args))
    assert "\n" not in str(caught.value)
    return caught.value


def test_unknown_name_is_one_line_with_the_nearest(student: str) -> None:
    error = refused(student, max_num_seq=4)
    assert error.field == "rollout.engine_args.max_num_seq"
    assert "did you mean max_num_seqs?" in str(error)
    assert "remove it" in str(refused(student, zzzzzz=1))


@pytest.mark.parametrize("name", [*ELSEWHERE, *INEXACT])
def test_what_breaks_exactness_or_is_set_elsewhere_is_refused(student: str, name: str) -> None:
    error = refused(student, **{name: 1})
    assert error.field == f"rollout.engine_args.{name}"
    assert error.cure


def test_the_lists_name_arguments_that_exist() -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    known |= set(SamplingParams.__struct_fields__)  # named by users, though no engine argument
    assert not (set(ELSEWHERE) | set(INEXACT)) - known


def test_a_value_that_vllm_refuses_is_one_line(student: str) -> None:
    with pytest.raises(SpecError, match=r"^rollout\.engine_args: found .*max_num_seqs") as caught:
        VllmEngine(config(student, engine_args={"max_num_seqs": -3}))
    assert "\n" not in str(caught.value)


def test_engine_args_win_over_defaults_and_join_the_recorder(
    student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    args = build_engine_args(config(student))
    assert (args.kv_cache_memory_bytes, args.enforce_eager) == (1 << 30, True)
    assert args.distributed_executor_backend == "uni"
    assert args.enable_prefix_caching
    changed = build_engine_args(
        config(
            student,
            tensor_parallel=2,
            engine_args={"kv_cache_memory_bytes": 5, "additional_config": {"other": 1}},
        )
    )
    assert changed.kv_cache_memory_bytes == 5
    assert changed.additional_config == {"other": 1, "tip_ray": {"k": 8, "vocab_size": 60}}
    assert changed.distributed_executor_backend == "mp"


def test_cache_space_of_the_environment_is_left_alone(
    student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert build_engine_args(config(student)).kv_cache_memory_bytes is None


def test_gpus_need_another_vllm(student: str) -> None:
    with pytest.raises(SpecError, match=r"rollout\.num_gpus: found 1, expected 0"):
        build_engine_args(config(student, num_gpus=1))


def test_the_environment_is_set_before_vllm_is_imported() -> None:
    """In a fresh process: importing the engine imports no vllm, preparing sets what it reads."""
    code = """
import os, sys
from tip_ray.stages.engines import vllm, vllm_args, workarounds, base
assert "vllm" not in sys.modules
config = base.EngineConfig("x", "float32", False, 8, 4, (0,), 64, 3, 0, 1, 0.9, {})
workarounds.prepare_process(config)
import torch
assert "vllm" not in sys.modules
assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "1-2", "what the user set stays"
assert os.environ["OMP_NUM_THREADS"] == "3" and torch.get_num_threads() == 3
"""
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "VLLM_CPU_OMP_THREADS_BIND": "1-2",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
