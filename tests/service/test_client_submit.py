"""What travels with a submission, and what never may."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runs_made import QUICKSTART, made_run, made_status
from tip_ray.contract.errors import AccessError, SpecError
from tip_ray.contract.run_state import RunState
from tip_ray.contract.spec import RunSpec
from tip_ray.control.spec_file import load_spec
from tip_ray.service.client import RunClient
from tip_ray.service.client_cluster import ClusterRuns, cluster_run_root
from tip_ray.service.client_jobs import Job
from tip_ray.service.client_submit import check_travels, package, submit_run
from tip_ray.service.client_token import ray_token, read_token


class Jobs:
    """A cluster that starts nothing; what was known of a job is out of date the next time."""

    def __init__(self, *known: Job) -> None:
        self.known, self.sent = list(known), []
        self.later: dict[str, Any] = {}

    def all(self) -> list[Job]:
        known, self.known = self.known, [replace(one, **self.later) for one in self.known]
        return known

    def submit(self, job_id: str, entrypoint: str, files: tuple[str, bytes], metadata: Any) -> None:
        self.sent.append((job_id, entrypoint, files, metadata))


def quickstart(**overrides: Any) -> RunSpec:
    return load_spec(QUICKSTART, {name.replace("__", "."): v for name, v in overrides.items()})


def submitted(root: Path, *known: Job, **overrides: Any) -> tuple[Jobs, list[str]]:
    jobs, notices = Jobs(*known), []
    submit_run(jobs, str(root), quickstart(**overrides), "a-run", notices.append)
    return jobs, notices


def job(state: Any, attempt: int = 1) -> Job:
    return Job(f"a-run-a{attempt}", state, "tip-ray run s --run-id a-run", float(attempt))


def test_only_the_resolved_spec_travels(tmp_path: Path) -> None:
    jobs, notices = submitted(tmp_path, seed=3)
    ((job_id, entrypoint, (name, content), metadata),) = jobs.sent
    assert job_id == "a-run-a1"
    assert entrypoint == f"tip-ray run spec.yaml --run-id a-run --run-root {tmp_path}"
    assert notices == []
    with zipfile.ZipFile(io.BytesIO(content)) as files:
        assert files.namelist() == ["spec.yaml"]
        files.extractall(tmp_path)
    sent = load_spec(tmp_path / "spec.yaml")
    assert sent == quickstart(seed=3, run_root=str(tmp_path))
    assert package(sent) == (name, content)  # the same spec, the same name
    assert package(quickstart(seed=4))[0] != name
    assert set(metadata) == {"name", "steps", "spec_sha256"}


def test_the_devices_that_were_planned_for_travel_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIP_RAY_DEVICE_GB", "141")
    ((job_id, entrypoint, _, _),) = submitted(tmp_path)[0].sent
    assert entrypoint.startswith("env TIP_RAY_DEVICE_GB=141 tip-ray run spec.yaml --run-id a-run ")
    sent = Job(job_id, "RUNNING", entrypoint, 0.0)
    assert (sent.run_id, sent.run_root, sent.attempt) == ("a-run", str(tmp_path), 1)


def test_a_secret_in_the_spec_is_refused_by_its_field() -> None:
    check_travels(quickstart())
    for field, value in {
        "prompts.source": "https://bucket/train.jsonl?X-Amz-Signature=abc",
        "rollout.engine_args": {"hf_token": "abc"},
        "run_root": "s3://key:secret@bucket/runs",
    }.items():
        with pytest.raises(SpecError, match=r"found a secret, expected none") as refused:
            check_travels(load_spec(QUICKSTART, {field: value}))
        assert str(refused.value).startswith(field)
        assert "abc" not in str(refused.value)


def test_a_path_of_this_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = quickstart(student__model="org/model")
    check_travels(spec)  # a name on a hub
    (tmp_path / "org" / "model").mkdir(parents=True)
    with pytest.raises(SpecError, match=r"student\.model: found 'org/model', a file or folder"):
        check_travels(spec)
    check_travels(quickstart(student__model=str(tmp_path / "org" / "model")))


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_run_that_a_job_drives_is_not_sent_again(tmp_path: Path, state: str) -> None:
    jobs, notices = submitted(tmp_path, job(state, attempt=2))
    assert jobs.sent == []
    assert notices == [f"a-run: job a-run-a2 is at it already ({state})"]


def test_a_run_that_has_succeeded_is_not_sent_again(tmp_path: Path) -> None:
    made_run(tmp_path, "a-run", steps=40)
    jobs, notices = submitted(tmp_path, job("SUCCEEDED"))
    assert jobs.sent == []
    assert notices == ["a-run has succeeded before; nothing to do"]


@pytest.mark.parametrize("state", [RunState.FAILED, RunState.CANCELLED, RunState.RUNNING])
def test_a_run_that_ended_otherwise_gets_a_new_attempt(tmp_path: Path, state: RunState) -> None:
    made_run(tmp_path, "a-run", steps=40).write_status(made_status("a-run", state=state))
    jobs, _ = submitted(tmp_path, job("FAILED"), job("STOPPED", attempt=2), steps=60)
    assert [sent[0] for sent in jobs.sent] == ["a-run-a3"]
    with pytest.raises(SpecError, match=r"seed: found 1, expected 0 as the run was begun"):
        submitted(tmp_path, job("FAILED"), seed=1)


def test_a_driver_that_still_clears_up_is_waited_for(tmp_path: Path) -> None:
    ended = made_status("a-run", state=RunState.CANCELLED, job_id="a-run-a1")
    made_run(tmp_path, "a-run", steps=40).write_status(ended)
    jobs = Jobs(job("RUNNING"))
    jobs.later = {"state": "FAILED"}
    submit_run(jobs, str(tmp_path), quickstart(), "a-run", pytest.fail)
    assert [sent[0] for sent in jobs.sent] == ["a-run-a2"]


def test_jobs_that_write_elsewhere_are_not_listed(tmp_path: Path) -> None:
    made_run(tmp_path, "a-run", steps=2)
    words = "tip-ray run s --run-id {} --run-root {}"
    known = [
        Job("here-a1", "PENDING", words.format("here", tmp_path), 2.0),
        Job("there-a1", "PENDING", words.format("there", "/elsewhere"), 3.0),
    ]
    runs = ClusterRuns(Jobs(*known), str(tmp_path), pytest.fail)
    found = {run.run_id: run.state.value for run in runs.runs()}
    assert found == {"a-run": "SUCCEEDED", "here": "PENDING"}


def test_a_run_root_is_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIP_RAY_RUN_ROOT", raising=False)
    assert cluster_run_root("s3://bucket/runs/") == "s3://bucket/runs"
    assert cluster_run_root("~/runs") == os.path.expanduser("~/runs")
    for given in ("runs", None):
        with pytest.raises(SpecError, match=r"run_root: found .*, expected an absolute path"):
            RunClient.cluster("http://head:8265", run_root=given)
    monkeypatch.setenv("TIP_RAY_RUN_ROOT", "/mnt/runs")
    assert cluster_run_root(None) == "/mnt/runs"


@pytest.mark.parametrize(
    "address",
    ["head:8265", "ray://head:10001", "auto", "http://", "http://me:pw@head", "http://h:x"],
)
def test_an_address_is_that_of_the_dashboard(address: str) -> None:
    with pytest.raises(SpecError, match="address: found") as refused:
        RunClient.cluster(address, run_root="/runs")
    assert "pw" not in str(refused.value)


def test_the_token_comes_from_where_ray_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given, named, default = (tmp_path / name for name in ("given", "named", ".ray/auth_token"))
    default.parent.mkdir()
    for path in (given, named, default):
        path.write_text(f" {path.name}\n")
    both = {"RAY_AUTH_TOKEN": "direct", "RAY_AUTH_TOKEN_PATH": str(named)}
    assert ray_token(given, both) == "given"
    assert ray_token(None, both) == "direct"
    assert ray_token(None, {"RAY_AUTH_TOKEN_PATH": str(named)}) == "named"
    assert ray_token(None, {}) == "auth_token"
    assert ray_token(None, {"RAY_AUTH_MODE": "disabled"}) is None
    default.unlink()
    assert ray_token(None, {}) is None


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"a\nb", b"\xff", b"x" * 20_000])
def test_a_file_without_a_token_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(AccessError, match=f"{path} holds no token") as refused:
        read_token(path)
    assert "words" not in str(refused.value)
    with pytest.raises(AccessError, match="absent cannot be read"):
        read_token(tmp_path / "absent")


def test_a_client_loads_no_ray() -> None:
    script = (
        "import sys, tip_ray; tip_ray.RunClient.cluster('http://head:8265', run_root='/runs'); "
        "print({'ray', 'torch', 'vllm', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
