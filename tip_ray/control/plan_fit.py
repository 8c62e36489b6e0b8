"""Refuse a spec whose pools do not fit their devices, with the smallest change that would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import RunSpec
from tip_ray.control.plan_devices import (
    DEVICE_VARIABLE,
    Models,
    PoolMemory,
    device_of_plan,
    longest_row,
    pool_memory,
)
from tip_ray.control.plan_memory import Device
from tip_ray.control.plan_models import Architecture

_MOST_DEVICES = 1024
Change = dict[str, Any]  # fields of one pool's section


def check_fit(spec: RunSpec, models: Models) -> None:
    """Compare every pool on GPUs with one device's memory; of other pools no limit is known.

    Raises:
        SpecError: it does not fit; the cure is the smallest change that makes it.
    """
    if not any(pool.num_gpus for pool in (spec.rollout, spec.teacher, spec.learner)):
        return
    device = device_of_plan()
    for pool in pool_memory(spec, models, device):
        if pool.fits or pool.limit_bytes is None:
            continue
        change = smallest_change(spec, models, device, pool.name)
        field = f"{pool.name}.{next(iter(change))}" if change else pool.name
        raise SpecError(
            field,
            f"{pool.total_bytes / 1e9:.1f} GB a device ({_largest(pool)})",
            f"at most {pool.limit_bytes / 1e9:.1f} GB of {device.name}",
            f"{_said(pool.name, change)}, or {DEVICE_VARIABLE}=GB if your devices have more",
        )


def smallest_change(spec: RunSpec, models: Models, device: Device, pool: str) -> Change:
    """The first of `_changes` with which `pool` fits; empty if none does."""
    for change in _changes(spec, models, pool):
        section = getattr(spec, pool).model_copy(update=change)
        changed = spec.model_copy(update={pool: section})
        if all(one.fits for one in pool_memory(changed, models, device) if one.name == pool):
            return change
    return {}


def _changes(spec: RunSpec, models: Models, pool: str) -> Iterator[Change]:
    """From what costs time to what costs devices, fewest first."""
    longest, more = longest_row(spec), range(1, _MOST_DEVICES + 1)
    if pool == "learner":
        if not spec.learner.gradient_checkpointing:
            yield {"gradient_checkpointing": True}
        if spec.learner.micro_batch_tokens > longest:
            yield {"micro_batch_tokens": longest}
        yield from ({"replicas": n} for n in more if n > spec.learner.replicas)
        yield from ({"replicas": n, "gradient_checkpointing": True} for n in more)
    elif pool == "teacher":
        if spec.teacher.max_batch_tokens > longest:
            yield {"max_batch_tokens": longest}
        sizes = (n for n in more if n > spec.teacher.num_gpus)
        if spec.teacher.engine == "transformers":
            yield from ({"num_gpus": n} for n in sizes)
        else:
            yield from _tensor_parallel(models.teacher, sizes)
    elif spec.rollout.engine == "vllm":
        if spec.rollout.gpu_memory_utilization < 0.9:
            yield {"gpu_memory_utilization": 0.9}
        sizes = (n for n in more if n > spec.rollout.tensor_parallel)
        yield from _tensor_parallel(models.student, sizes)


def _tensor_parallel(model: Architecture | None, sizes: Iterable[int]) -> Iterator[Change]:
    """Of `sizes`, those that share out the key and value heads evenly."""
    for n in sizes:
        if model is not None and model.kv_heads % n == 0:
            yield {"tensor_parallel": n, "num_gpus": n}


def _largest(pool: PoolMemory) -> str:
    name, size = max(pool.parts.items(), key=lambda part: part[1])
    return f"{name} {size / 1e9:.1f}"


def _said(pool: str, change: Change) -> str:
    if not change:
        return "shorten the rollouts or choose a smaller model"
    return "set " + " and ".join(f"{pool}.{name} to {value}" for name, value in change.items())
