"""RunClient.http and the commands with --url, against the status API on a real socket."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.runs_made import made_run, made_status
from tests.service.api_served import TOKEN, Served, serving
from tip_ray.cli import main
from tip_ray.contract.errors import (
    AccessError,
    NotFoundError,
    NotInTimeError,
    NotSupportedError,
    RunDirectoryError,
    RunFailedError,
    SpecError,
    UnreachableError,
)
from tip_ray.contract.run_state import RunState
from tip_ray.control.run_directory import RunDirectory
from tip_ray.control.run_reader import RunReader
from tip_ray.service.client import RunClient

Outcome = tuple[int, str, str]
Call = Callable[..., Outcome]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two runs, of which the second goes on."""
    root = tmp_path_factory.mktemp("served")
    made_run(root, "done", steps=12)
    running = made_run(root, "going-on", steps=4)
    running.write_status(made_status("going-on", state=RunState.RUNNING, step=4))
    with serving(root) as service:
        yield service


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return path


@pytest.fixture
def notices() -> list[str]:
    return []


@pytest.fixture
def client(served: Served, token_file: Path, notices: list[str]) -> RunClient:
    return RunClient.http(url(served), token_file=token_file, notice=notices.append)


def url(served: Served) -> str:
    return f"http://127.0.0.1:{served.port}"


def reader(served: Served, run_id: str) -> RunReader:
    return RunReader(f"{served.root}/{run_id}")


def test_everything_is_as_in_the_run_directory(client: RunClient, served: Served) -> None:
    files = reader(served, "done")
    found = client.status("done")
    assert found.health == "ended"
    known = files.read_status().model_dump()
    assert {name: value for name, value in found.model_dump().items() if name in known} == known
    assert client.metrics("done").equals(files.read_metrics())
    assert client.events("done") == files.read_events()
    for step in (None, 1, 12):
        assert client.samples("done", step).equals(files.read_samples(step))
    assert [run.run_id for run in client.runs()] == ["going-on", "done"]
    assert client.status("going-on").health == "live"


def test_cancel_asks_the_driver_and_leaves_an_ended_run_alone(
    client: RunClient, served: Served
) -> None:
    assert client.cancel("going-on") is True
    assert reader(served, "going-on").cancel_requested()
    assert client.cancel("done") is False
    assert not reader(served, "done").cancel_requested()


def test_what_a_status_api_cannot_do_says_who_can(client: RunClient) -> None:
    with pytest.raises(NotSupportedError, match=r"^logs: .*--run-root"):
        client.logs("done")
    with pytest.raises(NotSupportedError, match=r"^submit: .*RunClient\.cluster"):
        client.submit("job_specs/quickstart.yaml")


def test_a_wrong_or_missing_token_is_refused(served: Served, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("not-the-token")
    for token_file, found in {wrong: "the token is wrong", None: "a token is needed"}.items():
        client = RunClient.http(url(served), token_file=token_file)
        for call in (client.status, client.metrics, client.cancel):
            with pytest.raises(AccessError, match=found) as refused:
                call("done")
            assert "not-the-token" not in str(refused.value)
        with pytest.raises(AccessError, match=found):
            client.runs()


def test_what_is_not_there_is_not_found(client: RunClient) -> None:
    for call in (client.status, client.metrics, client.events, client.samples, client.cancel):
        with pytest.raises(NotFoundError, match="absent") as refused:
            call("absent")
        assert "\n" not in str(refused.value)
    with pytest.raises(NotFoundError, match="5"):
        client.samples("done", 5)
    for name in ("../etc", "a/b", "x" * 41, ""):
        with pytest.raises(SpecError, match="--run-id"):
            client.status(name)


def test_a_broken_file_is_named(served: Served, client: RunClient, notices: list[str]) -> None:
    broken = made_run(served.root, "broken", steps=2)
    status = broken.storage.read("status.json")
    broken.storage.write("status.json", status[:20])
    with pytest.raises(RunDirectoryError, match=r"status\.json"):
        client.status("broken")
    assert "broken" not in [run.run_id for run in client.runs()]
    assert ["status.json" in line for line in notices] == [True]


def test_wait_ends_in_time_and_with_a_lost_driver(served: Served, client: RunClient) -> None:
    with pytest.raises(NotInTimeError, match="going-on: has not ended within"):
        client.wait("going-on", timeout_s=0.1, poll_s=0.05)
    directory = made_run(served.root, "silent", steps=2)
    directory.write_status(
        made_status("silent", state=RunState.RUNNING, heartbeat_at=time.time() - 300)
    )
    with pytest.raises(RunFailedError, match="silent: no sign of life for 5 min"):
        client.wait("silent", timeout_s=10, poll_s=0.05)
    assert client.wait("done").state is RunState.SUCCEEDED


@pytest.fixture
def call(
    served: Served,
    token_file: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Call:
    """A command in an empty directory, here or at the status API."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, at: str | None = None) -> Outcome:
        api = ["--url", at or url(served), "--token-file", str(token_file)]
        code = main([*words, *api])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize(
    "words",
    [
        ["metrics", "done"],
        ["metrics", "done", "--format", "csv"],
        ["metrics", "done", "--format", "json"],
        ["samples", "done"],
        ["samples", "done", "--step", "1"],
    ],
)
def test_commands_print_the_same_as_with_the_directory(
    call: Call, served: Served, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main([*words, "--run-root", served.root]) == 0
    expected = capsys.readouterr().out
    assert call(*words) == (0, expected, "")


def test_status_list_watch_and_report_through_the_api(call: Call, served: Served) -> None:
    code, out, err = call("status", "done", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["state"], found["health"], found["step"]) == ("SUCCEEDED", "ended", 12)
    assert found["directory"] == f"{url(served)}/api/runs/done"
    code, out, _ = call("list")
    assert code == 0
    assert {"done", "going-on"} <= {line.split()[0] for line in out.splitlines()}
    code, out, err = call("watch", "done")
    assert (code, err) == (0, "")
    assert "SUCCEEDED after step 12/12" in out
    assert "go on with" not in out  # what it would name is out of reach
    assert call("report", "done") == (0, "report.html\n", "")
    assert "SUCCEEDED" in Path("report.html").read_text()
    assert call("cancel", "done") == (0, "done: has ended already: SUCCEEDED\n", "")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["status", "absent"], 3, "absent"),
        (["status", "../done"], 3, "no run '../done'"),
        (["logs", "done"], 1, "logs: a status API reads run directories only"),
        (["export", "done", "--output", "out"], 1, "export needs the run's files"),
        (["status", "done", "--run-root", "/runs"], 2, "--run-root: found --url beside it"),
    ],
)
def test_refusals_are_one_line(call: Call, words: list[str], code: int, says: str) -> None:
    found, out, err = call(*words)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


def test_a_token_needs_an_address(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "done", "--token-file", "token"]) == 2
    assert "--token-file: found no --url" in capsys.readouterr().err
    code, _, err = call("status", "done", at="nowhere:80")
    assert code == 2
    assert "address: found 'nowhere:80', expected http://HOST:PORT" in err


class Odd:
    """A server whose answers a test makes: (status, body, headers) one after the other."""

    def __init__(self, *answers: tuple[int, bytes, dict[str, str]]) -> None:
        self.asked: list[tuple[str, str, str | None]] = []
        odd, left = self, list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                odd.asked.append((self.command, self.path, self.headers.get("Authorization")))
                status, body, headers = left.pop(0) if len(left) > 1 else left[0]
                if status == 0:
                    self.connection.close()  # breaks off
                    return
                if status == 1:
                    time.sleep(2)  # too late
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                """Nothing on stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Odd:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def good(**changes: Any) -> tuple[int, bytes, dict[str, str]]:
    status = {**made_status("done", **changes).model_dump(mode="json"), "health": "live"}
    return 200, json.dumps({**status, "heartbeat_age_s": 0.0}).encode(), {}


def test_watch_tells_changes_but_no_heartbeats(token_file: Path) -> None:
    first = {"state": "RUNNING", "started_at": 1.0}
    answers = [good(**first), good(**first), good(**first, step=1), good(**first, step=1)]
    ended = {**first, "state": "CANCELLED", "step": 1}
    with Odd(*answers, good(**ended), (500, b"", {})) as odd:
        client = RunClient.http(odd.url, token_file=token_file)
        seen = [(found.state.value, found.step) for found in client.watch("done", poll_s=0.01)]
    assert seen == [("RUNNING", 0), ("RUNNING", 1), ("CANCELLED", 1)]
    assert len(odd.asked) == 5


def test_reading_is_repeated_where_the_server_falters(token_file: Path) -> None:
    with Odd((0, b"", {}), (503, b"", {}), good()) as odd:
        found = RunClient.http(odd.url, token_file=token_file).status("done")
    assert found.run_id == "done"
    assert odd.asked == [("GET", "/api/runs/done", f"Bearer {TOKEN}")] * 3


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((500, b"Traceback\nValueError: boom", {}), "answers 500: ValueError: boom"),
        ((200, b"<html>", {}), "something that is not JSON"),
        ((200, b"[]", {}), "is not that of a run's status"),
        ((200, b'{"run_id": "done"}', {}), "name is not that of a run's status"),
        ((0, b"", {}), "the status API broke off its answer|does not answer"),
        ((1, b"", {}), "the status API does not answer in time"),
        ((302, b"", {"Location": "http://elsewhere"}), "sends on to http://elsewhere"),
    ],
)
def test_nonsense_is_one_line_and_never_followed(
    token_file: Path, answer: tuple[int, bytes, dict[str, str]], says: str
) -> None:
    with Odd(answer) as odd:
        client = RunClient.http(odd.url, token_file=token_file, timeout_s=1)
        with pytest.raises(UnreachableError, match=says) as found:
            client.status("done")
    assert str(found.value).startswith(odd.url)
    assert "\n" not in str(found.value)


def test_tables_that_are_none_are_refused(token_file: Path) -> None:
    with Odd((200, b"no Arrow", {})) as odd:
        client = RunClient.http(odd.url, token_file=token_file)
        for call in (client.metrics, client.samples):
            with pytest.raises(UnreachableError, match="sends no whole Arrow stream"):
                call("done")


def test_a_netrc_never_takes_the_tokens_place(
    token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with Odd(good()) as odd:
        RunClient.http(odd.url, token_file=token_file).status("done")
        RunClient.http(odd.url).status("done")
    assert [asked[2] for asked in odd.asked] == [f"Bearer {TOKEN}", None]


def test_a_watcher_bears_a_silence_and_says_so_once(tmp_path: Path, token_file: Path) -> None:
    directory: RunDirectory = made_run(tmp_path, "done", steps=2)
    directory.write_status(made_status("done", state=RunState.RUNNING, step=1))
    notices: list[str] = []
    gone = (503, b"", {})
    with Odd(good(), *[gone] * 7, good(state="SUCCEEDED"), gone) as odd:
        client = RunClient.http(odd.url, token_file=token_file, notice=notices.append)
        states = [found.state for found in client.watch("done", poll_s=0.01)]
    assert states == [RunState.PENDING, RunState.SUCCEEDED]
    assert len(notices) == 1
    assert notices[0].endswith("waiting for it")
