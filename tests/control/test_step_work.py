"""What a step still has to make, and what came back of it."""

from __future__ import annotations

from tip_ray.contract import tables
from tip_ray.contract.headers import Quarantined, RolloutHeader
from tip_ray.control.step_work import RolloutWork

KEYS = [(1, slot, sample) for slot in range(2) for sample in range(2)]


def work() -> RolloutWork:
    rows = len(KEYS)
    columns = {
        "step": [key[0] for key in KEYS],
        "slot": [key[1] for key in KEYS],
        "sample_index": [key[2] for key in KEYS],
        "attempt": [0] * rows,
        "prompt_uid": ["uid"] * rows,
        "prompt_ids": [[1]] * rows,
        "teacher_prompt_ids": [None] * rows,
        "answer": ["1"] * rows,
        "source": ["test"] * rows,
    }
    cursor = {"epoch": 0, "index": 2, "digest": "d"}
    return RolloutWork(1, tables.build(tables.PROMPTS, columns), cursor)


def header(keys: list[tables.Key], rewards: tuple[float, ...]) -> RolloutHeader:
    ones = (1,) * len(keys)
    return RolloutHeader(
        tuple(keys), ones, ones, (False,) * len(keys), (0.0,) * len(keys), 0, 1, 0.1, (), rewards
    )


def test_rewards_follow_their_rollouts() -> None:
    step = work()
    step.received(header(KEYS[:2], (1.0, 0.5)))
    assert step.rewards == {KEYS[0]: 1.0, KEYS[1]: 0.5}
    step.quarantine([Quarantined(KEYS[0], "uid", "teacher", "poisonous")])
    assert step.rewards == {KEYS[1]: 0.5}
    assert step.rewards.keys() == step.row_tokens.keys()
    step.received(header(KEYS[2:], (0.0, 1.0)))
    assert step.complete
    assert step.again().rewards == {}


def test_without_a_scorer_there_are_no_rewards() -> None:
    step = work()
    step.received(header(KEYS, ()))
    assert step.rewards == {}
    assert step.complete
