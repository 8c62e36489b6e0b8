"""A real S3 server: run directory, prompts and student of a whole run; keys come by environment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem
from transformers import AutoModelForCausalLM, AutoTokenizer

from tip_ray import demo
from tip_ray.cli import main
from tip_ray.contract.errors import NotFoundError, SpecError
from tip_ray.contract.run_state import RunState
from tip_ray.control.checkpoint import Checkpoints
from tip_ray.control.run_reader import RunReader, list_runs
from tip_ray.control.spec_file import dump_spec, load_spec
from tip_ray.stages.prompt_rows import read_rows

QUICKSTART = Path(__file__).parents[2] / "job_specs" / "quickstart.yaml"
START_S = 400  # for a machine that does much else
PROBLEMS = 24


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def post(url: str, content: bytes = b"") -> None:
    plain = {"Content-Type": "text/plain"}
    request = urllib.request.Request(url, content, plain, method="POST")  # noqa: S310 - http only
    urllib.request.urlopen(request, timeout=10).close()  # noqa: S310


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Moto's S3 at a free port of the loopback, and an environment that leads there."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "a-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-value")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("TIP_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        S3FileSystem.clear_instance_cache()
        try:
            _wait_for(url, process)
            yield url
        finally:
            process.kill()
            process.wait()
            S3FileSystem.clear_instance_cache()


def _wait_for(url: str, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            post(f"{url}/moto-api/reset")
            return
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture(scope="module")
def bucket(server: str) -> str:
    """With prompts in two formats and the tiny student."""
    s3 = fsspec.filesystem("s3")
    s3.mkdir("bucket")
    rows = [
        {"problem": row["problem"], "answer": row["answer"]} for row in demo.problems("demo:carry")
    ][:PROBLEMS]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    s3.pipe_file("bucket/data/train.jsonl", lines.encode())
    with s3.open("bucket/data/test.parquet", "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)
    student = demo.checkpoint_path("demo:carry-student")
    for path in student.iterdir():
        s3.put_file(str(path), f"bucket/models/student/{path.name}")
    return "s3://bucket"


def spec_on(bucket: str, **overrides: Any) -> Any:
    small = {
        "run_root": f"{bucket}/runs",
        "student.model": f"{bucket}/models/student",
        "prompts.source": f"{bucket}/data/train.jsonl",
        "prompts.prompts_per_step": 4,
        "rollout.engine": "transformers",
        "max_lag": 0,
        "checkpoint": {"every_steps": 2, "keep": 2},
        "evaluation.0.source": f"{bucket}/data/test.parquet",
        "evaluation.0.limit": 8,
    }
    return load_spec(QUICKSTART, {**small, **overrides})


def run_process(spec_url: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tip_ray.cli", "run", spec_url, "--run-id", "far-away", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )


def wait_until(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        try:
            if happened():
                return
        except NotFoundError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not within {START_S} s")


def test_prompts_in_both_formats(bucket: str) -> None:
    lines = list(read_rows(f"{bucket}/data/train.jsonl"))
    parquet = list(read_rows(f"{bucket}/data/test.parquet"))
    assert len(lines) == PROBLEMS
    assert [row for _, row in lines] == [row for _, row in parquet]
    assert list(read_rows(f"{bucket}/data/*.jsonl")) == lines


def test_a_whole_run_cancelled_and_resumed(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    s3 = fsspec.filesystem("s3")
    s3.pipe_file("bucket/specs/job.yaml", dump_spec(spec_on(bucket, steps=100_000)).encode())
    run_url = f"{bucket}/runs/far-away"
    reader = RunReader(run_url)

    process = run_process(f"{bucket}/specs/job.yaml")
    try:
        wait_until(process, lambda: reader.read_status().step >= 3)
        assert main(["cancel", run_url]) == 0
        output, _ = process.communicate(timeout=START_S)
    finally:
        process.kill()
    assert process.returncode == 130, output
    cancelled = reader.read_status()
    assert cancelled.state is RunState.CANCELLED
    steps = Checkpoints(reader.storage, keep=2).steps()
    assert steps[-1] == cancelled.step
    assert len(steps) == 2

    last = cancelled.step + 2
    process = run_process(f"{bucket}/specs/job.yaml", "--set", f"steps={last}")
    try:
        output, _ = process.communicate(timeout=START_S)
    finally:
        process.kill()
    assert process.returncode == 0, output
    _look(reader, last, capsys)
    _load_export(reader, tmp_path)
    assert "a-secret-value" not in reader.read_log() + reader.storage.read("spec.yaml").decode()


def _look(reader: RunReader, last: int, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command line says of a run on S3."""
    status = reader.read_status()
    assert (status.state, status.step, status.epoch) == (RunState.SUCCEEDED, last, 2)
    assert status.updates_skipped == 0
    assert [run.run_id for run in list_runs(reader.url.rpartition("/")[0])] == ["far-away"]
    assert reader.read_metrics().column("step").to_pylist() == list(range(1, last + 1))
    assert reader.sample_steps() == list(range(1, last + 1))
    assert reader.read_samples(last).num_rows > 0
    states = [event["state"] for event in reader.read_events() if event["kind"] == "state"]
    one_life = ["STARTING", "RUNNING"]
    assert states == [*one_life, "CANCELLED", *one_life, "SUCCEEDED"]
    assert {result.step for result in reader.read_evaluations()} >= {0, last}
    assert reader.storage.exists("report.html")
    capsys.readouterr()
    for command in ("status", "metrics", "samples", "logs"):
        assert main([command, reader.url]) == 0
        assert capsys.readouterr().out
    assert main(["list", "--run-root", reader.url.rpartition("/")[0]]) == 0
    assert "far-away" in capsys.readouterr().out


def _load_export(reader: RunReader, tmp_path: Path) -> None:
    """It is a model of transformers once it is on this machine."""
    fsspec.filesystem("s3").get(f"{reader.url}/export/", str(tmp_path / "export"), recursive=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    ids = tokenizer("12+34=", return_tensors="pt").input_ids
    assert model(ids).logits.isfinite().all()


def test_a_bucket_that_is_not_there_is_one_line(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(QUICKSTART), "--run-root", "s3://nowhere/runs"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: run_root: nowhere/runs/")
    assert "bucket" in error
    assert main(["status", "s3://nowhere/runs/a-run"]) == 3
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SpecError, match=r"prompts.source: .*s3://nowhere/train.jsonl"):
        list(read_rows("s3://nowhere/train.jsonl"))


def test_wrong_keys_are_one_line(
    bucket: str, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    post(f"{server}/moto-api/reset-auth", b"0")
    S3FileSystem.clear_instance_cache()
    try:
        assert main(["run", str(QUICKSTART), "--run-root", f"{bucket}/runs"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert error.endswith("cannot be looked up (Forbidden)\n")
        assert "a-secret-value" not in error
        with pytest.raises(SpecError, match=r"prompts\.source") as refused:
            list(read_rows(f"{bucket}/data/train.jsonl"))
        assert "\n" not in str(refused.value)
    finally:
        post(f"{server}/moto-api/reset-auth", b"inf")
        S3FileSystem.clear_instance_cache()
