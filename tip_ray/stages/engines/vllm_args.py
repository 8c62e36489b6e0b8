"""From an EngineConfig to vLLM's EngineArgs; the spec's engine_args are checked on the way."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tip_ray.contract.errors import SpecError
from tip_ray.stages.engines.base import EngineConfig
from tip_ray.stages.engines.workarounds import cpu_engine_args

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

FIELD = "rollout.engine_args"
_PACKAGE = "tip_ray.stages.engines.recorder"
_MIN_BATCHED_TOKENS = 8192  # of one step on the CPU, where a prompt is not cut into chunks

# Decided by another field of the spec.
ELSEWHERE = {
    "model": "set student.model",
    "revision": "set student.revision",
    "dtype": "set student.dtype",
    "trust_remote_code": "set student.trust_remote_code",
    "tensor_parallel_size": "set rollout.tensor_parallel",
    "gpu_memory_utilization": "set rollout.gpu_memory_utilization",
    "max_model_len": "it follows rollout.max_prompt_tokens and max_response_tokens",
    "seed": "every rollout has a seed derived from the run's",
}

# Would change what is sampled after it is recorded, or what the recorder can see.
INEXACT = {
    "logits_processors": "they would change the logits beside the recorder",
    "logprobs_mode": "the recorder needs raw logits",
    "worker_extension_cls": "the recorder is reached through it",
    "worker_cls": "the recorder is reached through vLLM's own",
    "scheduler_cls": "the recorder relies on vLLM's own",
    "speculative_config": "drafted tokens are not recorded",
    "spec_method": "drafted tokens are not recorded",
    "spec_model": "drafted tokens are not recorded",
    "spec_tokens": "drafted tokens are not recorded",
    "diffusion_config": "tokens are recorded one after the other",
    "watermark_config": "it would bias the samples",
    "generation_config": "sampling is set by the spec alone",
    "override_generation_config": "sampling is set by the spec alone",
    "min_tokens": "it would hide the end token from the recorder; there is no such engine setting",
    "logit_bias": "it would change the logits before the recorder",
    "bad_words": "it would change the logits before the recorder",
    "enable_batch_sharded_sampling": "each rank would record its own part",
    "enable_lora": "weights arrive whole",
    "runner": "the engine generates",
    "convert": "the engine generates",
    "distributed_executor_backend": "it follows rollout.tensor_parallel",
    "pipeline_parallel_size": "use rollout.tensor_parallel",
    "data_parallel_size": "use rollout.replicas",
    "decode_context_parallel_size": "use rollout.tensor_parallel",
    "prefill_context_parallel_size": "use rollout.tensor_parallel",
    "nnodes": "a replica is one actor on one machine",
    "stream_interval": "only finished responses leave the engine",
}


def build_engine_args(config: EngineConfig) -> EngineArgs:
    """vLLM's EngineArgs for `config`.

    Raises:
        SpecError: an engine arg is unknown, set elsewhere in the spec, or breaks exactness; or
            this vLLM is not built for the replica's devices.
    """
    from vllm.engine.arg_utils import EngineArgs

    check_engine_args(FIELD, config.engine_args, ELSEWHERE, INEXACT)
    on_cpu = check_devices("rollout.num_gpus", config.num_gpus)
    batched_tokens = max(config.max_model_tokens, _MIN_BATCHED_TOKENS)
    args = _own_args(config) | (cpu_engine_args(batched_tokens) if on_cpu else {})
    extra = config.engine_args.get("additional_config", {}) | args["additional_config"]
    return EngineArgs(**args | config.engine_args | {"additional_config": extra})


def _own_args(config: EngineConfig) -> dict[str, Any]:
    return {
        "model": config.path,
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "generation_config": "vllm",  # the checkpoint's own sampling defaults are not ours
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "max_model_len": config.max_model_tokens,
        "tensor_parallel_size": config.tensor_parallel,
        # Named, since vLLM takes Ray inside a placement group, which refuses several GPUs a bundle.
        "distributed_executor_backend": "mp" if config.tensor_parallel > 1 else "uni",
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_prefix_caching": True,
        "logits_processors": [f"{_PACKAGE}:Recorder"],
        "worker_extension_cls": f"{_PACKAGE}.WorkerAccess",
        "additional_config": {"tip_ray": {"k": config.k, "vocab_size": config.vocab_size}},
        "logprobs_mode": "raw_logits",  # the sampled token's, before temperature and masks
        "disable_log_stats": True,
        "load_format": "safetensors",  # a pickle runs code when it is opened
        "use_tqdm_on_load": False,
    }


def check_engine_args(
    field: str,
    engine_args: Mapping[str, Any],
    elsewhere: Mapping[str, str],
    inexact: Mapping[str, str],
) -> None:
    """Refuse names that vLLM does not know, that another field decides, or that break exactness.

    Args:
        field: the spec's name for `engine_args`.
        elsewhere: name -> the cure.
        inexact: name -> why it cannot be set.

    Raises:
        SpecError: `field`.NAME.
    """
    from vllm.engine.arg_utils import EngineArgs

    known = {one.name for one in dataclasses.fields(EngineArgs)}
    for name, value in engine_args.items():
        path, found = f"{field}.{name}", repr(value)[:60]
        if name in elsewhere:
            raise SpecError(path, found, "nothing", elsewhere[name])
        if name in inexact:
            raise SpecError(path, found, "nothing", f"remove it: {inexact[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            cure = f"did you mean {near[0]}?" if near else "remove it"
            raise SpecError(path, "an unknown key", "an engine argument of vLLM", cure)


def check_devices(field: str, num_gpus: int) -> bool:
    """Whether this vLLM runs on the CPU.

    Raises:
        SpecError: it is not built for a replica with `num_gpus`.
    """
    from vllm.platforms import current_platform

    on_cpu = bool(current_platform.is_cpu())
    if on_cpu != (num_gpus == 0):
        kind = "the CPU" if on_cpu else "GPUs"
        expected = "0" if on_cpu else "at least 1"
        cure = f"this vllm is built for {kind}; install the other, or use engine transformers"
        raise SpecError(field, str(num_gpus), expected, cure)
    return on_cpu


@contextmanager
def values_checked_by_vllm(field: str, engine_args: Mapping[str, Any]) -> Iterator[None]:
    """What vLLM refuses of given `engine_args` becomes one SpecError line on `field`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not engine_args:
            raise
        line = " ".join(str(error).split())[:300]
        raise SpecError(field, repr(engine_args)[:200], "what vLLM takes", line) from None
