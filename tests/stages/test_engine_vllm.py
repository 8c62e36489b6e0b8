"""The real vLLM on the CPU: the recorder against transformers, weights, aborts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.exceptions import VLLMValidationError

from tests.stages.rollout_toys import (
    HEAD_ROWS,
    VOCAB,
    assert_ending,
    assert_greedy,
    assert_trace,
    by_index,
    config,
    opened,
    prompt,
    reference_model,
    request,
    save_student,
)
from tip_ray.contract.errors import ModelMismatchError, ReplicaError, SpecError
from tip_ray.stages.engines.vllm import VllmEngine

# One engine after the other: pytest groups the tests by these names.
ENGINES: dict[str, dict[str, Any]] = {
    "qwen3": {"engine_args": {"block_size": 32}},
    "llama": {"engine_args": {"max_num_seqs": 6}},
    "chunked": {
        "engine_args": {
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 32,
            "max_num_seqs": 8,
        }
    },
    "cramped": {
        "max_model_tokens": 96,
        "engine_args": {"block_size": 32, "num_gpu_blocks_override": 9},
    },
}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base: Path = tmp_path_factory.mktemp("students")
    qwen3 = save_student(base / "qwen3")
    return {
        "qwen3": qwen3,
        "qwen3-trained": save_student(base / "qwen3-trained", seed=1),
        "llama": save_student(base / "llama", kind="llama"),
        "llama-trained": save_student(base / "llama-trained", kind="llama", seed=1),
        "chunked": qwen3,
        "cramped": qwen3,
    }


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, students: dict[str, str]) -> Iterator[VllmEngine]:
    name = request.param
    with opened(VllmEngine(config(students[name], **ENGINES[name]))) as made:
        made.name = name
        made.checkpoint = students[name]
        yield made


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("engine", names, indirect=True)


@on("qwen3", "llama")
def test_traces_equal_a_dense_forward(engine: VllmEngine) -> None:
    """Mixed lengths: rows end at different steps, so the batch is condensed again and again."""
    model = reference_model(engine.checkpoint)
    asked = [request(i, prompt(4 + 3 * i), temperature=float(i % 4 != 0)) for i in range(14)]
    done = by_index(engine.generate(asked))
    assert len(done) == len(asked)
    for one in asked:
        assert_trace(model, one, done[one.index])
        assert_ending(one, done[one.index])
    reasons = {done[one.index].finish_reason for one in asked}
    assert reasons == {"stop", "length"}


@on("qwen3")
def test_temperature_and_top_p_shape_the_sample_but_not_the_trace(engine: VllmEngine) -> None:
    model = reference_model(engine.checkpoint)
    asked = [request(i, prompt(8), temperature=0.5, top_p=0.6) for i in range(12)]
    done = by_index(engine.generate(asked))
    for one in asked:
        trace = done[one.index].trace
        assert_trace(model, one, done[one.index])
        # With temperature 0.5 the nucleus of 0.6 lies within the ids of 0.6 at temperature 1.
        ahead = np.where(trace.topk_logprobs > trace.logprob[:, None] + 1e-5, 1.0, 0.0)
        assert ((ahead * np.exp(trace.topk_logprobs)).sum(1) <= 0.6 + 1e-4).all()


@on("qwen3")
def test_greedy(engine: VllmEngine) -> None:
    model = reference_model(engine.checkpoint)
    asked = [request(i, prompt(5 + i), temperature=0.0) for i in range(4)]
    done = by_index(engine.generate(asked))
    for one in asked:
        assert_greedy(model, one, done[one.index])
        assert_trace(model, one, done[one.index])


@on("qwen3")
def test_seed_decides_the_response(engine: VllmEngine) -> None:
    asked = [request(i, prompt(6), seed=2**63 - 1 if i < 2 else 2**63 - 2) for i in range(3)]
    first, twin, other = (by_index(engine.generate(asked))[i].response_ids for i in range(3))
    np.testing.assert_array_equal(first, twin)
    assert first.tolist() != other.tolist()


@on("llama")
def test_padding_rows_of_the_head_are_never_sampled(engine: VllmEngine) -> None:
    model = reference_model(engine.checkpoint)
    asked = [
        request(i, prompt(6, seed=i), temperature=float(i % 2), record=i % 3 == 0)
        for i in range(24)
    ]
    done = by_index(engine.generate(asked))
    unmasked_wins = 0
    for one in asked:
        response_ids = done[one.index].response_ids
        assert response_ids.max() < VOCAB
        assert (done[one.index].trace is not None) == one.record
        with torch.no_grad():
            ids = torch.tensor([[*one.prompt_ids, *response_ids.tolist()]])
            unmasked_wins += int((model(ids).logits.argmax(-1) >= VOCAB).sum())
    assert model.config.vocab_size == HEAD_ROWS
    assert unmasked_wins > 50, "the toy's padding rows must be tempting"


@on("chunked")
def test_prompts_longer_than_a_prefill_chunk(engine: VllmEngine) -> None:
    """Rows of unfinished prompts are sampled and thrown away; their numbers must not stay."""
    model = reference_model(engine.checkpoint)
    asked = [request(i, prompt(90 + 20 * i), temperature=0.0) for i in range(6)]
    done = by_index(engine.generate(asked))
    for one in asked:
        assert_trace(model, one, done[one.index])
        assert_greedy(model, one, done[one.index])


@on("chunked")
def test_seeds_with_chunked_prefill_are_refused_on_the_cpu(engine: VllmEngine) -> None:
    with pytest.raises(
        SpecError, match=r"rollout\.engine_args\.enable_chunked_prefill: found True"
    ):
        list(engine.generate([request(0, prompt(5))]))
    assert_empty(engine)


@on("cramped")
def test_forced_preemption(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine cache blocks for eight rows of up to three: rows are thrown out and start over."""
    scheduler = engine._engine.engine_core.engine_core.scheduler
    preempted = []
    original = scheduler._preempt_request
    monkeypatch.setattr(
        scheduler,
        "_preempt_request",
        lambda *args, **kwargs: (preempted.append(args[0]), original(*args, **kwargs)),
    )
    model = reference_model(engine.checkpoint)
    asked = [request(i, prompt(20 + i), max_response_tokens=64) for i in range(16)]
    done = by_index(engine.generate(asked))
    assert preempted
    for one in asked:
        assert_trace(model, one, done[one.index])
        assert_ending(one, done[one.index])


@on("qwen3", "llama")
def test_new_weights_are_used_and_old_prefixes_forgotten(
    engine: VllmEngine, students: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3 with tied embeddings, Llama without; the same prompt, its prefix in the cache."""
    cached: list[int] = []
    step = engine._engine.step

    def watched_step() -> list[Any]:
        outputs = step()
        cached.extend(output.num_cached_tokens for output in outputs if output.finished)
        return outputs

    monkeypatch.setattr(engine._engine, "step", watched_step)
    old = reference_model(students[engine.name])
    new = reference_model(students[f"{engine.name}-trained"])
    asked = request(0, prompt(200), max_response_tokens=16)
    for _ in range(2):
        assert_trace(old, asked, by_index(engine.generate([asked]))[0])
    assert cached[0] == 0
    assert cached[1] >= 128, "the prefix must have been in the cache"
    try:
        engine.load_weights(new.named_parameters())
        for _ in range(2):
            done = by_index(engine.generate([asked]))[0]
            assert_trace(new, asked, done)
        with pytest.raises(AssertionError):
            assert_trace(old, asked, done, tolerance=0.1)
        assert cached[2] == 0
        assert cached[3] >= 128
    finally:
        engine.load_weights(old.named_parameters())


@on("qwen3")
def test_weights_wait_for_an_empty_engine(engine: VllmEngine, students: dict[str, str]) -> None:
    model = reference_model(students["qwen3"])
    stream = engine.generate([request(0, prompt(5), max_response_tokens=1), request(1, prompt(9))])
    next(stream)
    with pytest.raises(ReplicaError, match="only change when it is empty"):
        engine.load_weights(model.named_parameters())
    stream.close()
    engine.load_weights(model.named_parameters())


@on("qwen3")
def test_weights_that_are_left_out_are_noticed(
    engine: VllmEngine, students: dict[str, str]
) -> None:
    own = dict(reference_model(students["qwen3"]).named_parameters())
    left_out = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ModelMismatchError, match=f"no values for the student's {left_out}"):
        engine.load_weights((name, one) for name, one in own.items() if name != left_out)
    engine.load_weights(own.items())


@on("qwen3")
def test_abandoned_generator_leaves_the_engine_empty(engine: VllmEngine) -> None:
    model = reference_model(engine.checkpoint)
    asked = [request(i, prompt(5 + i), max_response_tokens=1 + 9 * i) for i in range(6)]
    stream = engine.generate(asked)
    assert [one.index for one in next(stream)] == [0]
    stream.close()
    assert_empty(engine)
    done = by_index(engine.generate(asked))
    for one in asked:
        assert_trace(model, one, done[one.index])


@on("qwen3")
def test_failure_while_requests_are_added_leaves_the_engine_empty(engine: VllmEngine) -> None:
    too_long = request(1, prompt(5000))
    with pytest.raises(VLLMValidationError, match="context length is 256"):
        list(engine.generate([request(0, prompt(5)), too_long]))
    assert_empty(engine)
    assert len(by_index(engine.generate([request(2, prompt(5))]))) == 1


def assert_empty(engine: VllmEngine) -> None:
    assert engine._engine.get_num_unfinished_requests() == 0
    assert engine._engine.engine_core.engine_core.scheduler.get_num_unfinished_requests() == 0
    assert engine._rpc("tip_ray_discard", []) == 0, "a recording is still open"
