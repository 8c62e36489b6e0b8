"""The README's quickstart, a few steps of it, as a user types it: what it prints and leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.jobs.harness import QUICKSTART
from tests.jobs.reference import Pair
from tip_ray.contract.run_state import RunState
from tip_ray.control.run_reader import RunReader
from tip_ray.demo import problems
from tip_ray.demo.train import greedy_accuracy
from tip_ray.stages.engines.base import EngineConfig, Request
from tip_ray.stages.engines.vllm import VllmEngine

STEPS = 8
OPTIONS = [f"--set=steps={STEPS}", "--set=evaluation.0.every_steps=8", "--set=samples_per_step=128"]


@dataclass
class Ended:
    """A run that has ended, and what it printed."""

    output: str
    reader: RunReader


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    root = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "tip_ray.cli", "run", str(QUICKSTART), *OPTIONS]
    done = subprocess.run(
        [*command, "--run-root", str(root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"},
    )
    assert done.returncode == 0, done.stderr
    run_id = done.stdout.splitlines()[0]
    return Ended(done.stdout, RunReader(str(root / run_id)))


def test_it_prints_a_line_a_step_and_how_it_ended(quickstart: Ended) -> None:
    lines = quickstart.output.splitlines()
    assert lines[0].startswith("carry-quickstart-")
    assert sum(line.startswith("step ") for line in lines) == STEPS
    assert any(line.startswith("accuracy") for line in lines)
    assert quickstart.reader.url in quickstart.output
    assert "report.html" in quickstart.output
    assert "\x1b" not in quickstart.output  # no colour when piped


def test_the_student_learned(quickstart: Ended) -> None:
    status = quickstart.reader.read_status()
    assert status.state is RunState.SUCCEEDED
    assert status.step == STEPS
    assert status.initial_accuracy == pytest.approx(0.42, abs=0.05)
    assert status.accuracy is not None
    assert status.accuracy > 0.8
    assert [result.step for result in quickstart.reader.read_evaluations()] == [0, STEPS]


def test_the_run_directory_is_whole(quickstart: Ended) -> None:
    root = Path(quickstart.reader.url)
    there = {path.name for path in root.iterdir()}
    assert {"spec.yaml", "status.json", "metrics", "events", "samples", "logs", "export"} <= there
    assert "quarantine.jsonl" not in there
    page = (root / "report.html").read_text()
    assert "carry-quickstart" in page
    assert quickstart.reader.read_metrics().column("step").to_pylist() == list(range(1, STEPS + 1))
    assert quickstart.reader.sample_steps() == list(range(1, STEPS + 1))


def test_step_one_agrees_on_the_mean_with_float32(quickstart: Ended) -> None:
    """bfloat16 engines against float32 transformers: single tokens differ, their mean does not."""
    pair = Pair("carry-student", "carry-teacher")
    gaps: dict[str, list[float]] = {"entropy": [], "reverse_kl": [], "logprob": []}
    for row in quickstart.reader.read_samples(1).to_pylist():
        dense = pair.dense(row["prompt_ids"], row["response_ids"])
        gaps["entropy"] += list(np.array(row["student_entropy"]) - dense.entropy)
        gaps["reverse_kl"] += list(np.array(row["reverse_kl"]) - dense.reverse_kl)
        gaps["logprob"] += list(np.array(row["student_logprob"]) - dense.student_logprob)
    assert len(gaps["entropy"]) > 2000
    for name, found in gaps.items():
        assert abs(np.mean(found)) < 0.05, name
        assert np.mean(np.abs(found)) < 0.05, name


def test_the_text_of_samples_is_that_of_their_ids(quickstart: Ended) -> None:
    tokenizer = AutoTokenizer.from_pretrained(f"{quickstart.reader.url}/export")
    for row in quickstart.reader.read_samples(STEPS).to_pylist()[:8]:
        assert "".join(row["text"]) == tokenizer.decode(row["response_ids"])
        assert len(row["text"]) == len(row["response_ids"]) == len(row["kept"])


def test_the_export_is_the_trained_student_in_transformers_and_in_vllm(quickstart: Ended) -> None:
    path = f"{quickstart.reader.url}/export"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    rows = list(problems("carry-eval", limit=256))
    accuracy = quickstart.reader.read_status().accuracy
    assert greedy_accuracy(model, tokenizer, rows) == pytest.approx(accuracy, abs=0.03)
    engine = VllmEngine(
        EngineConfig(
            path=path,
            dtype="bfloat16",
            trust_remote_code=False,
            vocab_size=15,
            k=4,
            eos_ids=(14,),
            max_model_tokens=64,
            num_cpus=1,
            num_gpus=0,
            tensor_parallel=1,
            gpu_memory_utilization=0.9,
            engine_args={},
        )
    )
    prompts = [tokenizer(row["problem"])["input_ids"] for row in rows]
    requests = [
        Request(index, prompt, 0, 48, temperature=0.0, top_p=1.0, record=False)
        for index, prompt in enumerate(prompts)
    ]
    texts = {
        one.index: tokenizer.decode(one.response_ids, skip_special_tokens=True)
        for finished in engine.generate(requests)
        for one in finished
    }
    engine.close()
    right = [texts[index] == row["answer"] for index, row in enumerate(rows)]
    assert np.mean(right) == pytest.approx(accuracy, abs=0.03)
