"""What a run will ask for, from its spec alone, before anything is started.

Bytes a token count the columns that grow with a response; a row's own key, prompt and list offsets
come on top. The width W of the targets is K, 2K where the loss compares a union of supports, or 1
for policy_gradient; a vocabulary smaller than K makes both smaller. With teacher.targets hidden a
kept token carries the D numbers of the teacher's hidden state instead. With retention rho, a
response token costs

    rollout -> teacher     17 + 8 K                     ROLLOUTS
    teacher -> selector    17                           SCORES
    selector -> cut        1 + 8 rho                    KEEP
    cut -> learner         4 + rho (20 + 8 W)           SELECTED; hidden: 4 + rho (16 + 2 D)

The numbers are computed from the schemas, so they follow them.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from tip_ray.contract.spec import LearnerSpec, RolloutSpec, RunSpec, TeacherSpec
from tip_ray.contract.tables import (
    KEEP,
    SCORES,
    rollouts_schema,
    selected_schema,
    targets_schema,
)
from tip_ray.control.plan_devices import (
    DTYPE_BYTES,
    Models,
    PoolMemory,
    device_of_plan,
    models_of,
    pool_memory,
    stage_seconds,
)
from tip_ray.control.plan_models import local_directory

_WEIGHT_VERSIONS = 2  # at most alive in the object store
_NOT_GROWING = ("prompt_ids", "teacher_prompt_ids")  # lists, but not of the response
_OF_EVERY_TOKEN = ("quadrant", "input_ids")  # in KEEP and SELECTED, whether kept or not


@dataclass(frozen=True)
class PoolDemand:
    """What one pool reserves."""

    name: str
    replicas: int
    cpus: int  # of all replicas
    gpus: int


@dataclass(frozen=True)
class Hop:
    """One way a token travels."""

    name: str
    # None: they follow the teacher's width, and it is not local
    bytes_a_token: float | None
    bytes_a_token_unpruned: float | None
    bytes_a_step: float | None  # at most: every response as long as it may be


@dataclass(frozen=True)
class Plan:
    """The demand of a run."""

    pools: tuple[PoolDemand, ...]
    rollouts_a_step: int
    response_tokens_a_step: int  # at most
    hops: tuple[Hop, ...]
    weight_sync_bytes: int | None  # a step and rollout replica; None: the student is not known
    object_store_bytes: float | None  # of all steps in flight, at most; None: a model is not known
    device: str  # what memory and seconds are of
    memory: tuple[PoolMemory, ...]  # of the pools whose models are known
    seconds: dict[str, float]  # a step, by stage on GPUs: an estimate
    step_seconds: float | None  # one stage after the other with max_lag 0, else the slowest
    unknown: tuple[str, ...]  # fields whose model's architecture is not known

    @property
    def cpus(self) -> int:
        return sum(pool.cpus for pool in self.pools)

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for pool in self.pools)


def make_plan(
    spec: RunSpec,
    vocab_size: int | None = None,
    teacher_hidden: int | None = None,
    models: Models | None = None,
) -> Plan:
    """The plan of `spec`; reads nothing but the headers of a local student's weights, and the
    configs of local models.

    Args:
        vocab_size: the shared vocabulary's, where it is known: K is at most that.
        teacher_hidden: D, where it is known.
        models: their architectures, where more is known than the spec tells.
    """
    models, device = models or models_of(spec), device_of_plan()
    tokens = spec.rollouts_per_step * spec.rollout.max_response_tokens
    known = [own.vocab for own in (models.student, models.teacher) if own is not None]
    vocab_size = vocab_size or min(known, default=None)
    if models.teacher:
        teacher_hidden = teacher_hidden or models.teacher.hidden
    hops, sync = _hops(spec, tokens, vocab_size, teacher_hidden), _sync_bytes(spec, models)
    seconds = stage_seconds(spec, models, device)
    return Plan(
        pools=_pools(spec),
        rollouts_a_step=spec.rollouts_per_step,
        response_tokens_a_step=tokens,
        hops=hops,
        weight_sync_bytes=sync,
        object_store_bytes=_object_store_bytes(
            spec, hops, tokens, sync, vocab_size, teacher_hidden
        ),
        device=device.name,
        memory=pool_memory(spec, models, device),
        seconds=seconds,
        step_seconds=_step_seconds(spec, seconds),
        unknown=tuple(f"{role}.model" for role, own in vars(models).items() if own is None),
    )


def bytes_a_token(schema: pa.Schema, retention: float = 1.0) -> float:
    """Bytes that one response token adds to a table of `schema`."""
    total = 0.0
    for field in schema:
        if pa.types.is_list(field.type) and field.name not in _NOT_GROWING:
            kept_only = schema.equals(KEEP) or "kept_positions" in schema.names
            share = retention if kept_only and field.name not in _OF_EVERY_TOKEN else 1.0
            total += share * _width_bytes(field.type.value_type)
    return total


def _width_bytes(kind: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * _width_bytes(kind.value_type)
    return int(kind.bit_width) // 8


def _pools(spec: RunSpec) -> tuple[PoolDemand, ...]:
    pools: dict[str, RolloutSpec | TeacherSpec | LearnerSpec] = {
        "rollout": spec.rollout,
        "teacher": spec.teacher,
        "learner": spec.learner,
    }
    demands = [
        PoolDemand(
            name, pool.replicas, pool.replicas * pool.num_cpus, pool.replicas * pool.num_gpus
        )
        for name, pool in pools.items()
    ]
    return (*demands, PoolDemand("selector", 1, 0, 0))


def _hops(
    spec: RunSpec, tokens: int, vocab_size: int | None, teacher_hidden: int | None
) -> tuple[Hop, ...]:
    k = min(spec.support.k, vocab_size or spec.support.k)
    schemas = {
        "rollout -> teacher": rollouts_schema(k),
        "teacher -> selector": SCORES,
        "selector -> cut": KEEP,
        "cut -> learner": _selected_schema(spec, k, teacher_hidden),
    }
    return tuple(
        _hop(name, schema, spec.selection.retention, tokens) for name, schema in schemas.items()
    )


def _hop(name: str, schema: pa.Schema | None, retention: float, tokens: int) -> Hop:
    if schema is None:
        return Hop(name, None, None, None)
    shipped = bytes_a_token(schema, retention)
    return Hop(name, shipped, bytes_a_token(schema), shipped * tokens)


def _selected_schema(spec: RunSpec, k: int, teacher_hidden: int | None) -> pa.Schema | None:
    if spec.teacher.targets == "topk":
        return selected_schema(spec.selected_width(k))
    width = teacher_hidden or hidden_width(local_directory(spec.teacher.model))
    return None if width is None else selected_schema(width, "hidden")


def hidden_width(directory: Path) -> int | None:
    """D by a directory's config.json; None where it has none or does not say."""
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    width = config.get("text_config", config).get("hidden_size")
    return width if isinstance(width, int) else None


def _sync_bytes(spec: RunSpec, models: Models) -> int | None:
    parameters = count_parameters(local_directory(spec.student.model))
    if parameters is None and models.student is not None:
        parameters = models.student.parameters
    return None if parameters is None else parameters * DTYPE_BYTES[spec.student.dtype]


def _object_store_bytes(
    spec: RunSpec,
    hops: tuple[Hop, ...],
    tokens: int,
    sync_bytes: int | None,
    vocab_size: int | None,
    teacher_hidden: int | None,
) -> float | None:
    """Every table of every step in flight, TARGETS unpruned, and the versions of the weights."""
    shipped = [hop.bytes_a_step for hop in hops]
    width = spec.selected_width(min(spec.support.k, vocab_size or spec.support.k))
    if spec.teacher.targets == "hidden":
        width = teacher_hidden or hidden_width(local_directory(spec.teacher.model)) or 0
    if sync_bytes is None or not width or any(one is None for one in shipped):
        return None
    targets = bytes_a_token(targets_schema(width, spec.teacher.targets)) * tokens
    step = targets + sum(one for one in shipped if one is not None)
    return (spec.max_lag + 1) * step + _WEIGHT_VERSIONS * sync_bytes


def _step_seconds(spec: RunSpec, seconds: dict[str, float]) -> float | None:
    if len(seconds) < len(("rollout", "teacher", "learner")):
        return None
    return sum(seconds.values()) if spec.max_lag == 0 else max(seconds.values())


def count_parameters(directory: Path) -> int | None:
    """Parameters in a directory's safetensors files, from their headers; None without any."""
    files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    return sum(_parameters_in(file) for file in files) if files else None


def _parameters_in(path: Path) -> int:
    """safetensors: 8 bytes little-endian length, then JSON {name: {dtype, shape, ...}}."""
    total = 0
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(length, 100_000_000)))
    for name, tensor in header.items():
        if name != "__metadata__":
            count = 1
            for extent in tensor["shape"]:
                count *= extent
            total += count
    return total
