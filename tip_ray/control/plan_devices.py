"""What each pool of a spec needs on one device, and how long its part of a step takes there.

Everything is at most: each response as long as it may be, each micro-batch as full. The seconds are
an estimate by the data sheet of `plan_memory.H100`, of the work alone.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import RunSpec
from tip_ray.control import plan_memory
from tip_ray.control.plan_memory import H100, Device
from tip_ray.control.plan_models import Architecture, architecture_of

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
DEVICE_VARIABLE = "TIP_RAY_DEVICE_GB"  # memory of one GPU in 10^9 bytes, where it is not 80
_ENGINE_ROWS = 256  # that vLLM samples from at once
_ENGINE_SHARE = 0.92  # of a device that vLLM takes, its default
_TRANSFORMERS_CACHE = 32768  # positions, the engine's default


@dataclass(frozen=True)
class Models:
    """The architectures that are known."""

    student: Architecture | None
    teacher: Architecture | None


@dataclass(frozen=True)
class PoolMemory:
    """One device of a pool, or the memory of a replica without one."""

    name: str
    on_device: bool  # a GPU
    parts: dict[str, float]  # bytes
    limit_bytes: float | None  # what may be used; None: not known

    @property
    def total_bytes(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.limit_bytes is None or self.total_bytes <= self.limit_bytes


def models_of(spec: RunSpec, student_path: str = "", teacher_path: str = "") -> Models:
    """By the checkpoints' directories, where they are known to be local, else by their names."""
    return Models(
        architecture_of(student_path or spec.student.model),
        architecture_of(teacher_path or spec.teacher.model),
    )


def device_of_plan() -> Device:
    """The GPU that is planned for: 80 GB, or what the environment says.

    Raises:
        SpecError: the environment's number is none.
    """
    said = os.environ.get(DEVICE_VARIABLE)
    if not said:
        return H100
    try:
        memory_gb = float(said)
    except ValueError:
        memory_gb = math.nan
    if not 0 < memory_gb < math.inf:
        raise SpecError(DEVICE_VARIABLE, repr(said), "the memory of one GPU in GB, e.g. 141")
    return replace(H100, name=f"a GPU of {memory_gb:g} GB", memory_bytes=memory_gb * 1e9)


def pool_memory(spec: RunSpec, models: Models, device: Device) -> tuple[PoolMemory, ...]:
    """By pool; one whose model is not known is left out."""
    pools = []
    if models.student is not None:
        pools.append(_rollout(spec, models.student, device))
    if models.teacher is not None:
        pools.append(_teacher(spec, models.teacher, device))
    if models.student is not None and (models.teacher or spec.teacher.targets == "topk"):
        pools.append(_learner(spec, models, device))
    return tuple(pools)


def longest_row(spec: RunSpec) -> int:
    """Tokens of the longest rollout."""
    return spec.rollout.max_prompt_tokens + spec.rollout.max_response_tokens


def _rollout(spec: RunSpec, model: Architecture, device: Device) -> PoolMemory:
    pool, width = spec.rollout, DTYPE_BYTES[spec.student.dtype]
    fixed = _engine_bytes(spec, model)
    rows = -(-spec.rollouts_per_step // pool.replicas)
    cache = rows * row_cache_bytes(spec, model)
    if pool.engine == "transformers":
        positions = pool.engine_args.get("max_batch_tokens", _TRANSFORMERS_CACHE)
        cache = positions * plan_memory.kv_bytes_a_token(model, width)
    limit = None
    if pool.num_gpus:
        limit = device.memory_bytes * pool.gpu_memory_utilization
        # The engine takes its whole share; what does not fit at once waits. One row must.
        cache = max(row_cache_bytes(spec, model), min(cache, limit - sum(fixed.values())))
    return PoolMemory("rollout", pool.num_gpus > 0, fixed | {"KV cache": cache}, limit)


def _engine_bytes(spec: RunSpec, model: Architecture) -> dict[str, float]:
    """Of a rollout engine, beside the cache."""
    width, devices = DTYPE_BYTES[spec.student.dtype], spec.rollout.tensor_parallel
    weights, live, chunk = plan_memory.scoring_bytes(
        model,
        devices=devices,
        dtype_bytes=width,
        tokens=longest_row(spec),
        chunk_rows=min(_ENGINE_ROWS, spec.rollouts_per_step),
    )
    return {"weights": weights, "activations": live / devices, "head chunk": chunk}


def row_cache_bytes(spec: RunSpec, model: Architecture) -> float:
    """Of one rollout of the greatest length, on one device of an engine."""
    token = plan_memory.kv_bytes_a_token(model, DTYPE_BYTES[spec.student.dtype])
    return longest_row(spec) * token / spec.rollout.tensor_parallel


def rows_at_once(spec: RunSpec, model: Architecture, device: Device) -> int:
    """Rollouts of the greatest length that one engine's cache holds."""
    rows = -(-spec.rollouts_per_step // spec.rollout.replicas)
    if not spec.rollout.num_gpus:
        return rows
    share = device.memory_bytes * spec.rollout.gpu_memory_utilization
    room = share - sum(_engine_bytes(spec, model).values())
    return max(1, min(rows, int(room / row_cache_bytes(spec, model))))


def _teacher(spec: RunSpec, model: Architecture, device: Device) -> PoolMemory:
    pool = spec.teacher
    weights, live, chunk = plan_memory.scoring_bytes(
        model,
        devices=teacher_devices(spec),
        dtype_bytes=DTYPE_BYTES[pool.dtype],
        tokens=min(
            max(pool.max_batch_tokens, longest_row(spec)),
            spec.rollouts_per_step * longest_row(spec),
        ),
        chunk_rows=pool.chunk_rows,
    )
    parts = {"weights": weights, "activations": live, "head chunk": chunk}
    limit = device.memory_bytes if pool.num_gpus else None
    if pool.engine == "vllm":
        token = plan_memory.kv_bytes_a_token(model, DTYPE_BYTES[pool.dtype])
        parts["KV cache"] = longest_row(spec) * token / pool.tensor_parallel  # one row, at least
        share = pool.engine_args.get("gpu_memory_utilization", _ENGINE_SHARE)
        limit = limit and limit * share
    return PoolMemory("teacher", pool.num_gpus > 0, parts, limit)


def teacher_devices(spec: RunSpec) -> int:
    """That one replica's weights are spread over."""
    pool = spec.teacher
    return pool.tensor_parallel if pool.engine == "vllm" else max(pool.num_gpus, 1)


def _learner(spec: RunSpec, models: Models, device: Device) -> PoolMemory:
    pool, model = spec.learner, models.student
    assert model is not None
    tokens = learner_tokens(spec)
    hidden = spec.teacher.targets == "hidden" and models.teacher is not None
    found = plan_memory.training_bytes(
        model,
        ranks=pool.replicas,
        dtype_bytes=DTYPE_BYTES[spec.student.dtype],
        tokens=tokens,
        kept=math.ceil(spec.selection.retention * tokens),
        checkpointing=pool.gradient_checkpointing,
        teacher_head=models.teacher.head_parameters if hidden and models.teacher else 0,
    )
    parts = {
        "float32 masters": found.masters,
        "gradients": found.gradients,
        "Adam": found.adam,
        "compute copies": found.copies,
        "activations": found.activations,
        "loss": found.loss,
    }
    limit = device.memory_bytes if pool.num_gpus else None
    return PoolMemory("learner", pool.num_gpus > 0, parts, limit)


def learner_tokens(spec: RunSpec) -> int:
    """Of the fullest micro-batch of one rank."""
    rows = -(-spec.rollouts_per_step // spec.learner.replicas)
    longest = longest_row(spec)
    return min(max(spec.learner.micro_batch_tokens, longest), rows * longest)


def stage_seconds(spec: RunSpec, models: Models, device: Device) -> dict[str, float]:
    """Seconds a step by stage, of the stages that compute on GPUs and whose model is known."""
    tokens, seconds = spec.rollouts_per_step * longest_row(spec), {}
    student, teacher = models.student, models.teacher
    if student is not None and spec.rollout.num_gpus:
        seconds["rollout"] = plan_memory.decoding_seconds(
            student,
            rows=-(-spec.rollouts_per_step // spec.rollout.replicas),
            at_once=rows_at_once(spec, student, device),
            prompt_tokens=spec.rollout.max_prompt_tokens,
            response_tokens=spec.rollout.max_response_tokens,
            dtype_bytes=DTYPE_BYTES[spec.student.dtype],
            devices=spec.rollout.tensor_parallel,
            device=device,
        )
    if teacher is not None and spec.teacher.num_gpus:
        parallel = spec.teacher.tensor_parallel
        seconds["teacher"] = plan_memory.scoring_seconds(
            teacher, tokens, spec.teacher.replicas, parallel, device
        )
    if student is not None and spec.learner.num_gpus:
        seconds["learner"] = plan_memory.training_seconds(
            student,
            tokens,
            spec.learner.replicas,
            device,
            checkpointing=spec.learner.gradient_checkpointing,
        )
    return seconds
