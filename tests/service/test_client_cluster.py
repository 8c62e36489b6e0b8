"""RunClient and `tip-ray submit` on a real head with token authentication."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs_made import QUICKSTART, made_run, made_status
from tests.service.head import START_S, Head, running_head
from tip_ray.cli import main
from tip_ray.contract.errors import AccessError, NotFoundError, UnreachableError
from tip_ray.contract.run_state import ObservedStatus, RunState
from tip_ray.service.client import RunClient, cluster_runs

SMALL = {
    "rollout.engine": "transformers",
    "rollout.max_response_tokens": 8,
    "prompts.prompts_per_step": 4,
    "checkpoint.every_steps": 2,
    "evaluation": [],
}
ENDLESS = {**SMALL, "steps": 100_000}
SEEN_DEAD_S = 15  # a driver that was killed reads FAILED within this


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as head:
        yield head


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def client(head: Head, root: Path, notices: list[str]) -> RunClient:
    return RunClient.cluster(
        head.address, run_root=str(root), token_file=head.token_file, notice=notices.append
    )


def options(values: dict[str, Any]) -> list[str]:
    return [word for name, one in values.items() for word in ("--set", f"{name}={json.dumps(one)}")]


def until(
    client: RunClient, job_id: str, wanted: Callable[[ObservedStatus], bool]
) -> ObservedStatus:
    """The first status that is `wanted` in the attempt that `job_id` is."""
    run_id = job_id.rpartition("-")[0]
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        found = client.status(run_id)
        if found.job_id == job_id:
            if wanted(found):
                return found
            assert not found.state.ended, found.error
        time.sleep(0.2)
    raise AssertionError(found)


def checkpoints(root: Path, run_id: str) -> list[int]:
    """Steps of whole checkpoints."""
    manifests = (root / run_id / "checkpoints").glob("step-*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in manifests)


def in_another_process(head: Head, root: Path, call: str) -> str:
    """What `print(client.<call>)` prints there."""
    script = (
        "import sys; from tip_ray import RunClient; "
        "client = RunClient.cluster(sys.argv[1], run_root=sys.argv[2]); "
        f"print(client.{call})"
    )
    command = [sys.executable, "-c", script, head.address, str(root)]
    done = subprocess.run(
        command, env=head.environment, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.runs(),
        lambda client: client.status("a-run"),
        lambda client: client.submit(QUICKSTART, run_id="a-run"),
        lambda client: client.cancel("a-run"),
        lambda client: client.logs("a-run"),
        lambda client: next(client.watch("a-run")),
        lambda client: client.wait("a-run", timeout_s=10),
    ],
)
def test_a_wrong_or_missing_token_is_refused(
    head: Head, root: Path, call: Callable[[RunClient], Any]
) -> None:
    for token_file, found in {
        head.wrong_token_file: r"the token is wrong \(403\)",
        None: r"a token is needed, none was given \(401\)",
    }.items():
        client = RunClient.cluster(head.address, run_root=str(root), token_file=token_file)
        with pytest.raises(AccessError, match=f"^{head.address}: {found}; give the cluster's"):
            call(client)


def test_submit_is_refused_in_one_line_without_its_token(
    head: Head, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    words = ["submit", str(QUICKSTART), "--run-root", str(root), "--run-id", "refused"]
    for more in ([], ["--token-file", str(head.wrong_token_file)]):
        assert main([*words, *more]) == 2
        out, err = capsys.readouterr()
        assert out == "refused\n"
        assert err.startswith(f"error: {head.address}: ")
        assert err.count("\n") == 1


def test_a_spec_that_is_refused_is_not_sent(client: RunClient) -> None:
    before = client.runs()
    for overrides in ({"learner.lr": -1}, {"prompts.source": "https://h/x?token=abc"}):
        with pytest.raises(Exception, match=r"found .*, expected"):
            client.submit(QUICKSTART, overrides=overrides, run_id="bad")
    assert client.runs() == before
    with pytest.raises(NotFoundError, match="no run 'bad'"):
        client.status("bad")


def test_submit_mirrors_a_driver_that_refuses(
    head: Head, client: RunClient, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--address", head.address, "--token-file", str(head.token_file)]
    words = ["submit", str(QUICKSTART), "--run-root", str(root), "--run-id", "absent-model"]
    code = main([*words, *where, "--set", "student.model=/absent/model", "--wait"])
    out, err = capsys.readouterr()
    assert (code, err) == (2, "")
    assert out.splitlines()[0] == "absent-model"
    found = client.status("absent-model")
    assert (found.state, found.exit_code, found.health) == (RunState.FAILED, 2, "ended")
    assert "/absent/model" in (found.error or "")
    assert (found.error or "") in out
    assert "error: " in client.logs("absent-model")


def test_cancel_and_sigterm_leave_checkpoints_and_resume(
    head: Head, client: RunClient, root: Path, notices: list[str]
) -> None:
    assert client.submit(QUICKSTART, overrides=ENDLESS, run_id="one") == "one"
    assert client.status("one").state is RunState.PENDING
    seen = list(itertools.takewhile(lambda found: found.step < 3, client.watch("one", poll_s=0.2)))
    assert {found.state for found in seen} >= {RunState.PENDING, RunState.RUNNING}
    assert client.submit(QUICKSTART, overrides=ENDLESS, run_id="one") == "one"
    assert notices == ["one: job one-a1 is at it already (RUNNING)"]
    listed = in_another_process(
        head, root, "runs() and [(r.run_id, r.state.value, r.health) for r in client.runs()][0]"
    )
    assert listed == "('one', 'RUNNING', 'live')"

    assert client.cancel("one") is True
    ended = client.wait("one", timeout_s=START_S)
    assert (ended.state, ended.exit_code) == (RunState.CANCELLED, 130)
    assert checkpoints(root, "one")[-1] == ended.step  # of the very step it ended after
    assert client.cancel("one") is False

    words = ["submit", str(QUICKSTART), "--run-id", "one", "--run-root", str(root), "--wait"]
    command = [sys.executable, "-m", "tip_ray.cli", *words, *options(ENDLESS)]
    again = subprocess.Popen(
        [*command, "--address", head.address],
        env=head.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    until(client, "one-a2", lambda found: found.step >= ended.step + 3)
    before = checkpoints(root, "one")
    jobs = cluster_runs(head.address, str(root), head.token_file, notice=notices.append).jobs
    jobs.stop("one-a2")
    out, _ = again.communicate(timeout=START_S)
    assert again.returncode == 143, out
    assert out.startswith("one\n")
    found = client.status("one")
    assert (found.state, found.exit_code, found.epoch) == (RunState.FAILED, 143, 2)
    assert "SIGTERM" in (found.error or "")
    assert set(before) <= set(checkpoints(root, "one"))
    steps = client.metrics("one").column("step").to_pylist()
    assert steps == list(range(1, found.step + 1))  # what was resumed went on where it stood
    assert {event["kind"] for event in client.events("one")} >= {"state"}
    assert client.samples("one").num_rows > 0


def test_a_killed_driver_reads_failed_and_a_waiting_job_is_cancelled(
    head: Head, client: RunClient
) -> None:
    client.submit(QUICKSTART, overrides=ENDLESS, run_id="two")
    until(client, "two-a1", lambda found: found.state is RunState.RUNNING)
    head.driver("two").kill()
    killed_at = time.monotonic()
    found = client.wait("two", timeout_s=SEEN_DEAD_S, poll_s=0.2)
    assert time.monotonic() - killed_at < SEEN_DEAD_S
    assert (found.state, found.health) == (RunState.FAILED, "ended")
    assert (found.error or "").startswith("the driver's process ended without a word (exit code")
    assert "SIGKILL" in (found.error or "")
    assert [one.state for one in client.runs() if one.run_id == "two"] == [RunState.FAILED]

    client.submit(QUICKSTART, overrides=ENDLESS, run_id="two")
    assert client.status("two").state is RunState.PENDING
    assert client.cancel("two") is True
    found = client.wait("two", timeout_s=START_S)
    assert (found.state, found.exit_code) == (RunState.CANCELLED, 130)
    assert found.job_id == "two-a2"


def test_plain_ray_job_submit(
    head: Head, client: RunClient, root: Path, notices: list[str], tmp_path: Path
) -> None:
    """As in README: the folder travels, but for what git ignores and environments."""
    shutil.copytree(QUICKSTART.parent, tmp_path / "job_specs")
    for name in ("runs/old/checkpoint", ".venv/lib/big"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("not to be sent")
    (tmp_path / ".rayignore").write_text("runs/\n")
    command = [f"{Path(sys.executable).parent}/ray", "job", "submit", "--working-dir", "."]
    entrypoint = ["tip-ray", "run", "job_specs/quickstart.yaml", "--run-root", str(root)]
    short = {**SMALL, "steps": 2}
    done = subprocess.run(
        [*command, "--", *entrypoint, "--run-id", "plain", *options(short)],
        cwd=tmp_path,
        env={**head.environment, "RAY_API_SERVER_ADDRESS": head.address},
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = client.status("plain")
    assert (found.state, found.step) == (RunState.SUCCEEDED, 2)
    assert (found.job_id or "").startswith("raysubmit_")
    assert "SUCCEEDED after step 2/2" in client.logs("plain")
    sent = list(head.folder.rglob("working_dir_files/*/job_specs/quickstart.yaml"))
    unpacked = sent[0].parents[1]
    assert sorted(os.listdir(unpacked)) == [".rayignore", "job_specs"]

    assert client.submit(QUICKSTART, overrides=short, run_id="plain") == "plain"
    assert notices == ["plain has succeeded before; nothing to do"]
    again = client.status("plain")
    assert (again.job_id, again.updated_at) == (found.job_id, found.updated_at)


def test_a_client_outlives_the_head_and_says_so(tmp_path: Path) -> None:
    directory = made_run(tmp_path, "a-run")
    directory.write_status(made_status("a-run", state=RunState.RUNNING, step=7))
    notices: list[str] = []
    with running_head() as head:
        client = RunClient.cluster(
            head.address,
            run_root=str(tmp_path),
            token_file=head.token_file,
            timeout_s=5,
            notice=notices.append,
        )
        statuses = client.watch("a-run", poll_s=0.2)
        assert next(statuses).step == 7
        assert notices == []
        head.stop()
        directory.write_status(made_status("a-run", state=RunState.RUNNING, step=8))
        assert next(statuses).step == 8
        assert client.runs()[0].step == 8
    assert len(notices) == 1  # said once
    assert notices[0].startswith(f"{head.address}: the Ray cluster does not answer (connection")
    assert "\n" not in notices[0]
    for call in (client.status, lambda run_id: client.submit(QUICKSTART, run_id=run_id)):
        with pytest.raises(UnreachableError, match="the Ray cluster does not answer"):
            call("nowhere")
