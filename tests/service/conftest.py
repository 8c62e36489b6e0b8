"""A status API and the runs that it serves, anew for each test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs_made import made_run
from tests.service.api_served import CANARY, Served, serving


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good runs, `one` and `two`, one outside of their root, and a secret beside it."""
    place = tmp_path_factory.mktemp("made")
    (place / "secret.json").write_text(json.dumps({"time": 1.0, "key": CANARY}))
    made_run(place, "outside", steps=1)
    for run_id in ("one", "two"):
        made_run(place / "runs", run_id, steps=2)
    return place


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served") / "place" / "runs") as one:
        yield one


@pytest.fixture
def served(made: Path, server: Served) -> Iterator[Served]:
    """One service for all tests, and the runs anew for each."""
    place = Path(server.root).parent
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(made, place)
    yield server
    assert server.get("/api/runs/two").status == 200
