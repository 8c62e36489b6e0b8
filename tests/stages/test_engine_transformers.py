"""Plain batched decoding: equal to a dense forward, reproducible, independent of its company."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stages.rollout_toys import (
    TOLERANCE_NATS,
    assert_ending,
    assert_greedy,
    assert_trace,
    by_index,
    config,
    prompt,
    reference_model,
    request,
    save_student,
)
from tip_ray.contract.errors import ModelMismatchError, SpecError
from tip_ray.stages.engines.base import Finished
from tip_ray.stages.engines.transformers import TransformersEngine, batches


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_student(tmp_path_factory.mktemp(request.param), kind=request.param)


@pytest.fixture(scope="module")
def engine(student: str) -> TransformersEngine:
    return TransformersEngine(config(student))


def equal(one: Finished, other: Finished) -> bool:
    assert one.trace is not None
    assert other.trace is not None
    numbers = ("logprob", "entropy", "topk_ids", "topk_logprobs", "tail_logprob")
    return np.array_equal(one.response_ids, other.response_ids) and all(
        np.array_equal(getattr(one.trace, name), getattr(other.trace, name)) for name in numbers
    )


def test_traces_equal_a_dense_forward(engine: TransformersEngine, student: str) -> None:
    """Prompts of 4 to 43 tokens in one batch: padded on the left, rows leave one by one."""
    model = reference_model(student)
    asked = [request(i, prompt(4 + 3 * i), temperature=float(i % 4 != 0)) for i in range(14)]
    done = by_index(engine.generate(asked))
    for one in asked:
        assert_trace(model, one, done[one.index])
        assert_ending(one, done[one.index])
        if one.temperature == 0:
            assert_greedy(model, one, done[one.index])
    assert {one.finish_reason for one in done.values()} == {"stop", "length"}


def test_temperature_and_top_p_shape_the_sample_but_not_the_trace(
    engine: TransformersEngine, student: str
) -> None:
    model = reference_model(student)
    asked = [request(i, prompt(8), temperature=0.5, top_p=0.6) for i in range(12)]
    for done in by_index(engine.generate(asked)).values():
        trace = done.trace
        assert_trace(model, asked[done.index], done)
        ahead = np.where(trace.topk_logprobs > trace.logprob[:, None] + 1e-5, 1.0, 0.0)
        assert ((ahead * np.exp(trace.topk_logprobs)).sum(1) <= 0.6 + 1e-4).all()


def test_same_batch_gives_the_same_bits(engine: TransformersEngine, student: str) -> None:
    asked = [request(i, prompt(3 + i)) for i in range(10)]
    first = by_index(engine.generate(asked))
    again = by_index(engine.generate(asked))
    elsewhere = by_index(TransformersEngine(config(student)).generate(asked))
    for index in first:
        assert equal(first[index], again[index])
        assert equal(first[index], elsewhere[index])


def test_company_changes_a_row_by_float_noise_only(engine: TransformersEngine) -> None:
    asked = [request(i, prompt(3 + 4 * i)) for i in range(10)]
    together = by_index(engine.generate(asked))
    for one in asked:
        alone = by_index(engine.generate([one]))[one.index]
        company = together[one.index]
        np.testing.assert_array_equal(alone.response_ids, company.response_ids)
        for name in ("logprob", "entropy", "topk_logprobs"):
            pair = getattr(alone.trace, name), getattr(company.trace, name)
            np.testing.assert_allclose(*pair, atol=TOLERANCE_NATS, rtol=0)


def test_seed_decides_the_response(engine: TransformersEngine) -> None:
    asked = [request(i, prompt(6), seed=77 if i < 2 else 78) for i in range(3)]
    done = by_index(engine.generate(asked))
    assert equal(done[0], done[1])
    assert done[0].response_ids.tolist() != done[2].response_ids.tolist()


def test_responses_are_handed_on_as_they_finish(engine: TransformersEngine) -> None:
    asked = [request(i, prompt(5), max_response_tokens=1 + 9 * i) for i in range(3)]
    stream = engine.generate(asked)
    assert [one.index for one in next(stream)] == [0]
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert len(by_index(engine.generate(asked))) == 3


def test_nothing_is_recorded_unless_asked(engine: TransformersEngine, student: str) -> None:
    asked = [request(i, prompt(5 + i), record=i % 2 == 0) for i in range(6)]
    done = by_index(engine.generate(asked))
    assert [done[i].trace is not None for i in range(6)] == [True, False] * 3
    assert_trace(reference_model(student), asked[4], done[4])


def test_new_weights_are_used(engine: TransformersEngine, student: str, tmp_path: Path) -> None:
    old = reference_model(student)
    kind = old.config.model_type
    new = reference_model(save_student(tmp_path, kind=kind, seed=1))
    asked = request(0, prompt(20))
    try:
        engine.load_weights((name, tensor.detach()) for name, tensor in new.named_parameters())
        done = by_index(engine.generate([asked]))[0]
        assert_trace(new, asked, done)
        with pytest.raises(AssertionError):
            assert_trace(old, asked, done, tolerance=0.1)
    finally:
        engine.load_weights(old.named_parameters())
    assert_trace(old, asked, by_index(engine.generate([asked]))[0])


def test_weights_of_another_model_are_refused(engine: TransformersEngine, student: str) -> None:
    own = dict(reference_model(student).named_parameters())
    with pytest.raises(ModelMismatchError, match=r"has no other\.weight \[3\]"):
        engine.load_weights([("other.weight", torch.zeros(3))])
    with pytest.raises(ModelMismatchError, match=r"model\.norm\.weight \[3\]"):
        engine.load_weights([("model.norm.weight", torch.zeros(3))])
    left_out = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ModelMismatchError, match=f"no values for the student's {left_out}"):
        engine.load_weights((name, one) for name, one in own.items() if name != left_out)


def test_batches_stay_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    asked = [
        request(i, prompt(int(rng.integers(1, 60))), max_response_tokens=int(rng.integers(1, 40)))
        for i in range(50)
    ]
    made = list(batches(asked, 300))
    assert sorted(one.index for batch in made for one in batch) == list(range(50))
    for batch in made:
        longest_prompt = max(len(one.prompt_ids) for one in batch)
        longest_response = max(one.max_response_tokens for one in batch)
        assert len(batch) == 1 or len(batch) * (longest_prompt + longest_response) <= 300
    assert len(made) < 30
    assert [len(batch) for batch in batches(asked, 1)] == [1] * 50


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"engine_args": {"max_batch_token": 3}}, "rollout.engine_args.max_batch_token"),
        ({"num_gpus": 2}, "rollout.num_gpus"),
        ({"tensor_parallel": 2}, "rollout.tensor_parallel"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        TransformersEngine(config("nowhere", **changes))
    assert caught.value.field == field
