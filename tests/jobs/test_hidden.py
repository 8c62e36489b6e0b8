"""A whole run on hidden targets: two FSDP2 ranks that hold the teacher's head in halves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.jobs.harness import Crew, quickstart
from tip_ray.control.plan import make_plan
from tip_ray.control.run_reader import RunReader
from tip_ray.demo import checkpoint_path

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS = 8
SPEC = quickstart(
    teacher__targets="hidden",
    student__dtype="float32",
    teacher__dtype="float32",
    rollout__engine="transformers",
    learner__replicas=2,
    samples_per_step=128,
    steps=STEPS,
    max_lag=0,
    evaluation__0__every_steps=STEPS,
    evaluation__0__limit=128,
)


@pytest.fixture(scope="module")
def run(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunReader]:
    crew = Crew.start(SPEC)
    yield crew.train(SPEC, tmp_path_factory.mktemp("runs"), "hidden")
    crew.close()


def test_the_student_learns(run: RunReader) -> None:
    status = run.read_status()
    assert status.initial_accuracy == pytest.approx(0.42, abs=0.09)
    assert status.accuracy > 0.75  # of 128 problems, one standard error is below 0.04


def model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint_path(name), dtype=torch.float32).eval()


@torch.no_grad()
def test_the_first_loss_is_that_of_dense_forwards(run: RunReader) -> None:
    """The mean over kept tokens of KL(S||T) on the whole vocabulary, T from rounded states."""
    torch.set_num_threads(1)
    student, teacher = model("carry-student"), model("carry-teacher")
    head_VD = teacher.get_output_embeddings().weight.double()
    divergences = []
    for row in run.read_samples(1).to_pylist():
        ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
        inputs = slice(len(row["prompt_ids"]) - 1, ids.shape[1] - 1)
        hidden_TD = teacher.base_model(ids, use_cache=False).last_hidden_state[0]
        theirs = (hidden_TD.bfloat16().double() @ head_VD.T).log_softmax(-1)[inputs]
        ours = student(ids, use_cache=False).logits[0].double().log_softmax(-1)[inputs]
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        divergences += kl[torch.tensor(row["kept"], dtype=torch.bool)].tolist()
    first = run.read_metrics().to_pylist()[0]
    assert len(divergences) == first["tokens_kept"] > 1000
    assert first["loss"] == pytest.approx(np.mean(divergences), rel=1e-4)


def test_bytes_follow_the_plan_and_the_kept_tokens(run: RunReader) -> None:
    hop = make_plan(SPEC).hops[-1]
    for row in run.read_metrics().to_pylist():
        assert row["bytes_cut_to_learner"] < 0.56 * row["bytes_unpruned_to_learner"]
        # What does not grow with a response (the key, the prompt, the offsets) comes on top.
        of_tokens = hop.bytes_a_token_unpruned * row["tokens_scored"]
        assert of_tokens < row["bytes_unpruned_to_learner"] < 1.1 * of_tokens
