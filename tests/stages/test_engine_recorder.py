"""The recorder's bookkeeping, against a plain simulation of the engine's batch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from tip_ray.compute.divergence import row_statistics
from tip_ray.stages.engines.recorder import RECORDING, Recorder
from tip_ray.stages.engines.trace_buffer import TraceBuffer

V, SHARED, K = 11, 9, 4
MOVE, SWAP = MoveDirectionality.UNIDIRECTIONAL, MoveDirectionality.SWAP


def recorder() -> Recorder:
    settings = SimpleNamespace(additional_config={"tip_ray": {"k": K, "vocab_size": SHARED}})
    return Recorder(settings, torch.device("cpu"), False)


def added(index: int, recording: int | None, output_ids: list[int]) -> tuple:
    extra = None if recording is None else {RECORDING: recording}
    return (index, SamplingParams(extra_args=extra), None, output_ids)


def logits(seed: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))


def entropies(logits_NV: torch.Tensor) -> list[float]:
    return row_statistics(logits_NV, K, SHARED).entropy_N.tolist()


def test_rows_are_followed_through_removals_additions_and_moves() -> None:
    one = recorder()
    ids: dict[int, list[int]] = {7: [], 8: [], 9: [], 10: []}
    one.update_state(BatchUpdate(3, [], [added(i, 7 + i, ids[7 + i]) for i in range(3)], []))
    expected: dict[int, list[float]] = {key: [] for key in ids}

    def step(seed: int, batch: list[int | None]) -> None:
        logits_NV = logits(seed, len(batch))
        for key, entropy in zip(batch, entropies(logits_NV), strict=True):
            if key is not None:
                expected[key].append(entropy)
        one.apply(logits_NV)
        for key in batch:
            if key is not None:
                ids[key].append(0)

    step(0, [7, 8, 9])
    # 7 ends; an unrecorded request takes its place; 8 and 9 change places.
    one.update_state(BatchUpdate(3, [], [added(0, None, [])], [(1, 2, SWAP)]))
    step(1, [None, 9, 8])
    # The unrecorded one ends and 8 slides into its place; 10 comes last.
    one.update_state(BatchUpdate(3, [0], [added(3, 10, ids[10])], [(2, 0, MOVE), (3, 2, MOVE)]))
    step(2, [8, 9, 10])
    one.update_state(None)
    step(3, [8, 9, 10])
    for key, values in expected.items():
        taken = one.buffer.take(key, len(values))
        np.testing.assert_allclose(taken.entropy, values, rtol=1e-6)
    assert len(one.buffer) == 0


def test_a_position_that_is_sampled_again_is_written_again() -> None:
    """Chunks of a prompt are sampled and thrown away: the output list does not grow."""
    one, ids = recorder(), []
    one.update_state(BatchUpdate(1, [], [added(0, 1, ids)], []))
    for seed in range(3):
        one.apply(logits(seed, 1))
    ids.append(4)
    one.apply(logits(3, 1))
    expected = entropies(torch.cat([logits(2, 1), logits(3, 1)]))
    np.testing.assert_allclose(one.buffer.take(1, 2).entropy, expected, rtol=1e-6)


def test_a_preempted_request_goes_on_where_it_was() -> None:
    one, ids = recorder(), []
    one.update_state(BatchUpdate(1, [], [added(0, 1, ids)], []))
    one.apply(logits(0, 1))
    ids.append(4)
    one.update_state(BatchUpdate(0, [0], [], []))
    resumed = list(ids)  # the engine hands in a new list
    one.update_state(BatchUpdate(1, [], [added(0, 1, resumed)], []))
    one.apply(logits(1, 1))
    expected = entropies(torch.cat([logits(0, 1), logits(1, 1)]))
    np.testing.assert_allclose(one.buffer.take(1, 2).entropy, expected, rtol=1e-6)


def test_ids_outside_the_shared_vocabulary_are_masked_for_every_row() -> None:
    one = recorder()
    logits_NV = logits(0, 2)
    kept = logits_NV[:, :SHARED].clone()
    one.apply(logits_NV)
    assert torch.isneginf(logits_NV[:, SHARED:]).all()
    assert torch.equal(logits_NV[:, :SHARED], kept)
    assert not one.is_argmax_invariant()


def test_buffer_grows_without_losing_and_reuses_slots() -> None:
    buffer, keys = TraceBuffer(K, torch.device("cpu")), list(range(40))
    by_step = [row_statistics(logits(100 + step, len(keys)), K, SHARED) for step in range(50)]
    slots = [buffer.open(key) for key in keys]
    assert slots == [buffer.open(key) for key in keys]
    assert len(set(slots)) == len(keys)
    for step, statistics in enumerate(by_step):
        buffer.write(slots, [step] * len(slots), statistics)
    for key in keys:
        taken = buffer.take(key, len(by_step))
        for name in ("topk_ids", "topk_logprobs"):
            column = [getattr(one, f"{name}_NK")[key].numpy() for one in by_step]
            np.testing.assert_array_equal(getattr(taken, name), np.stack(column))
        for name in ("entropy", "tail_logprob", "log_normalizer"):
            column = [getattr(one, f"{name}_N")[key].item() for one in by_step]
            np.testing.assert_array_equal(getattr(taken, name), np.array(column, np.float32))
    assert {buffer.open(key) for key in range(100, 140)} <= set(range(64))
    buffer.discard([100, 101, 555])
    assert len(buffer) == 38


def test_taken_numbers_do_not_change_when_the_slot_is_used_again() -> None:
    buffer = TraceBuffer(K, torch.device("cpu"))
    buffer.write([buffer.open("a")], [0], row_statistics(logits(0, 1), K, SHARED))
    taken = buffer.take("a", 1)
    before = taken.topk_logprobs.copy()
    buffer.write([buffer.open("b")], [0], row_statistics(logits(1, 1), K, SHARED))
    np.testing.assert_array_equal(taken.topk_logprobs, before)


def test_sampled_logit_gives_the_log_probability_of_any_token() -> None:
    buffer, logits_1V = TraceBuffer(K, torch.device("cpu")), logits(5, 1)
    buffer.write([buffer.open("a")], [0], row_statistics(logits_1V, K, SHARED))
    least = int(logits_1V[0, :SHARED].argmin())
    trace = buffer.take("a", 1).trace(logits_1V[0, least : least + 1].numpy())
    expected = logits_1V[0, :SHARED].double().log_softmax(0)[least]
    assert least not in trace.topk_ids
    np.testing.assert_allclose(trace.logprob, [expected], atol=1e-6)
