"""Whole runs of toy Qwen3, Llama and Qwen2 pairs: tied and untied heads, padded to other sizes.

Every run is two steps of the real driver: vLLM, a teacher, FSDP2, checkpoints, the export.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.jobs.padded import SHARED, TOKENS, WIDE, K, Reference, kl, save_padded, save_prompts
from tip_ray.contract.run_state import RunState
from tip_ray.contract.spec import RunSpec
from tip_ray.contract.spec_check import parse_spec
from tip_ray.control import driver
from tip_ray.control.audit import check_audit
from tip_ray.control.progress import SilentProgress
from tip_ray.control.run_reader import RunReader
from tip_ray.stages.state import read_parameters

pytestmark = pytest.mark.usefixtures("ray_cluster")

STEPS, PROMPTS, SAMPLES = 2, 8, 4
CLOSE_NATS = 1e-3  # float32 engines against float64
CLASSES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@dataclass(frozen=True)
class Case:
    """One pair; where the student's head is tied the teacher's is not, and the other way round."""

    kind: str
    tied: bool  # the student's
    rows: int  # of the student's head; the teacher has the other number
    engine: str = "transformers"
    targets: str = "topk"
    ranks: int = 1


CASES = {  # tied and untied, narrower and wider, on both sides
    "qwen3-tied": Case("qwen3", True, SHARED),
    "qwen3-untied": Case("qwen3", False, WIDE, engine="vllm", targets="hidden"),
    "llama-tied": Case("llama", True, WIDE),
    "llama-untied": Case("llama", False, SHARED, engine="vllm"),
    "qwen2-tied": Case("qwen2", True, SHARED, targets="hidden", ranks=2),  # as Qwen2.5-14B, 1.5B
}


@dataclass
class Ended:
    """A run that has ended."""

    case: Case
    spec: RunSpec
    reader: RunReader

    def checkpoint(self, step: int) -> str:
        return f"{self.reader.url}/checkpoints/step-{step:08d}"


def spec_of(case: Case, root: Path) -> RunSpec:
    """The pair's checkpoints, prompts and spec under `root`."""
    theirs = WIDE if case.rows == SHARED else SHARED
    student = save_padded(root / "s", case.kind, rows=case.rows, tied=case.tied, seed=1)
    teacher = save_padded(root / "t", case.kind, rows=theirs, tied=not case.tied, seed=2)
    return parse_spec(
        {
            "name": "pair",
            "run_root": str(root / "runs"),
            "steps": STEPS,
            "max_lag": 0,
            "student": {"model": student, "dtype": "float32"},
            "teacher": {
                "model": teacher,
                "dtype": "float32",
                "engine": case.engine,
                "targets": case.targets,
            },
            "support": {"k": K},
            "prompts": {"source": save_prompts(root / "p.jsonl"), "prompts_per_step": PROMPTS},
            "rollout": {"samples_per_prompt": SAMPLES, "max_response_tokens": 12},
            "learner": {"replicas": case.ranks, "lr": 1e-3, "schedule": "constant"},
            "checkpoint": {"every_steps": 1, "keep": STEPS},
            "samples_per_step": PROMPTS * SAMPLES,
        }
    )


@pytest.fixture(scope="module", params=CASES)
def run(
    request: pytest.FixtureRequest, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> Ended:
    case = CASES[request.param]
    spec = spec_of(case, tmp_path_factory.mktemp(request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "connected", lambda *_, **__: nullcontext())  # the test's own Ray
        driver.run(spec, "run", progress=SilentProgress(), finish=lambda _: None)
    return Ended(case, spec, RunReader(f"{spec.run_root}/run"))


def loss_of(run: Ended, dense: Any) -> torch.Tensor:
    """[m] what the learner's divergence of each token has to be."""
    if run.case.targets == "hidden":
        return kl(dense.student_mV, dense.teacher_rounded_mV)
    return dense.on_support()


def test_it_succeeds_and_every_rollout_is_trained_once(run: Ended) -> None:
    status = run.reader.read_status()
    assert (status.state, status.step, status.error) == (RunState.SUCCEEDED, STEPS, None)
    assert (status.updates_skipped, status.rollouts_quarantined) == (0, 0)
    assert check_audit(run.reader, run.spec).exactly_once


def test_every_step_agrees_with_dense_forwards(run: Ended) -> None:
    """Step 2 is rolled out with the weights after step 1: they arrived in vLLM, whole."""
    reference = Reference(run.spec.student.model, run.spec.teacher.model)
    for step, metrics in enumerate(run.reader.read_metrics().to_pylist(), start=1):
        if step > 1:
            reference.take_up(run.checkpoint(step - 1))
        divergences, kept_losses = [], []
        for row in run.reader.read_samples(step).to_pylist():
            dense = reference.dense(row)
            assert dense.padding_wins
            sampled_m1 = torch.tensor(row["response_ids"])[:, None]
            of_support = dense.on_support()
            for name, expected in (
                ("student_entropy", -(dense.student_mV.exp() * dense.student_mV).sum(1)),
                ("teacher_entropy", -(dense.teacher_mV.exp() * dense.teacher_mV).sum(1)),
                ("student_logprob", dense.student_mV.gather(1, sampled_m1)[:, 0]),
                ("teacher_logprob", dense.teacher_mV.gather(1, sampled_m1)[:, 0]),
                ("reverse_kl", of_support),
            ):
                gap = np.abs(np.array(row[name]) - expected.numpy()).max()
                assert gap < CLOSE_NATS, (step, name, gap)
            divergences += of_support.tolist()
            kept_losses += loss_of(run, dense)[torch.tensor(row["kept"]) == 1].tolist()
        assert len(divergences) == metrics["tokens_scored"]
        assert len(kept_losses) == metrics["tokens_kept"] > PROMPTS * SAMPLES
        assert metrics["reverse_kl_mean"] == pytest.approx(np.mean(divergences), rel=1e-4)
        assert metrics["loss"] == pytest.approx(np.mean(kept_losses), rel=1e-3)
        assert metrics["loss"] > 0.3  # there was something to get wrong
        assert metrics["logprob_gap_max"] < CLOSE_NATS


def test_no_id_beyond_the_shared_vocabulary_is_ever_seen(run: Ended) -> None:
    seen: dict[str, set[int]] = {}
    for step in range(1, STEPS + 1):
        for row in run.reader.read_samples(step).to_pylist():
            seen.setdefault("sampled", set()).update(row["response_ids"])
            for model in ("student", "teacher"):
                top = {one for token in row[f"{model}_top_ids"] for one in token}
                seen.setdefault(model, set()).update(top)
    for name, ids in seen.items():
        assert min(ids) >= 0, name
        assert max(ids) < SHARED, name
        assert len(ids) > TOKENS // 2, name


def test_the_export_is_the_trained_student(run: Ended) -> None:
    path, case = f"{run.reader.url}/export", run.case
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path)
    assert type(model).__name__ == CLASSES[case.kind]
    assert (model.config.vocab_size, model.config.tie_word_embeddings) == (case.rows, case.tied)
    head_VD, embedding_VD = (
        one.weight for one in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    assert (head_VD is embedding_VD) == case.tied
    assert head_VD.shape[0] == case.rows

    first = AutoModelForCausalLM.from_pretrained(run.spec.student.model)
    before, after = (dict(one.named_parameters()) for one in (first, model))
    trained = dict(read_parameters(run.checkpoint(STEPS)))
    assert before.keys() == after.keys() == trained.keys()
    for name, values in after.items():
        assert values.isfinite().all(), name
        assert torch.equal(values, trained[name]), name
        assert not torch.equal(values, before[name]), name
    # Nothing is learned of ids that the teacher does not have.
    padding = first.get_output_embeddings().weight[SHARED:]
    assert torch.equal(head_VD[SHARED:], padding)
