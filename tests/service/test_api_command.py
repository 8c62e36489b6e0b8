"""`tip-ray serve` as a process of its own, and what it refuses to start with."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs_made import made_run
from tests.service.api_served import WAIT_S, Served
from tip_ray.cli import main

SERVE = [sys.executable, "-m", "tip_ray.cli", "serve"]


def test_without_a_file_it_prints_a_token_and_stops_at_sigterm(tmp_path: Path) -> None:
    made_run(tmp_path, "a-run", steps=1)
    command = [*SERVE, "--run-root", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        assert process.stdout is not None
        where, token = process.stdout.readline(), process.stdout.readline().split()[-1]
        assert where.startswith("http://127.0.0.1:")
        assert where.endswith(f"  1 run under {tmp_path}\n")
        assert len(token) > 40
        served = Served(str(tmp_path), int(where.split()[0].rpartition(":")[2]))
        authorized = {"Authorization": f"Bearer {token}"}
        assert served.ask("GET", "/api/runs", authorized).json()["total"] == 1
        assert served.ask("GET", f"/api/runs?token={token}").status == 401
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGTERM
    assert (out, err) == ("", "")  # no token, no requests


def test_it_loads_neither_torch_nor_ray_nor_vllm() -> None:
    code = "import tip_ray.commands.serve, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "uvicorn" in loaded
    assert not loaded & {"torch", "ray", "vllm", "transformers"}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "No such file"),
        (b"", "holds no token"),
        (b"\n \n", "holds no token"),
        (b"two words", "holds no token"),
        (b"two\nlines", "holds no token"),
        ("schl\u00fcssel".encode(), "holds no token"),
        (b"\xff\xfe", "holds no token"),
    ],
)
def test_a_token_file_without_a_token_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, found: str
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    root = ["--run-root", str(tmp_path), "--port", "0"]
    assert main(["serve", *root, "--token-file", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: token_file: {file} ")
    assert found in err
    assert len(err.splitlines()) == 1


def test_an_address_that_is_taken_or_no_address_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for place in (["--port", port], ["--host", "no.such.host.invalid", "--port", "0"]):
            assert main(["serve", "--run-root", str(tmp_path), *place]) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err.startswith("error: --host, --port: found ")
    for port in ("-1", "65536", "0000000001", "a"):
        with pytest.raises(SystemExit) as stop:
            main(["serve", "--run-root", str(tmp_path), "--port", port])
        assert stop.value.code == 2
        assert "argument --port" in capsys.readouterr().err


def test_a_root_that_cannot_be_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for root in (str(tmp_path / "file"), "nothing://here"):
        assert main(["serve", "--run-root", root, "--port", "0"]) == 2
        assert capsys.readouterr().err.startswith("error: ")
