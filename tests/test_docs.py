"""The examples of the documentation, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.runs_made import made_run
from tip_ray.control.run_reader import RunReader

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the examples of reading-a-run.md leave behind, next to two runs."""
    root = tmp_path_factory.mktemp("docs")
    for run_id, steps in (("my-run", 12), ("other", 3)):
        made_run(root / "runs", run_id, steps=steps)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "reading-a-run.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    found: dict[str, Any] = {"root": root}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for block in blocks:
            exec(block, found)  # noqa: S102 - the project's own text
    return found


def test_metrics(names: dict[str, Any]) -> None:
    metrics = names["metrics"]
    assert metrics.step.tolist() == list(range(1, 13))
    written = RunReader(str(names["root"] / "runs" / "my-run")).read_metrics().to_pydict()
    assert metrics.loss.tolist() == written["loss"]
    assert names["saved"] == 0.0  # the made run carries 1 byte of 1 at each step
    assert names["slowest"].startswith("seconds_")
    assert [(run, step) for run, _, step in names["last"]] == [("my-run", 12), ("other", 3)]
    assert names["last"][0][1] == written["loss"][-1]


def test_samples(names: dict[str, Any]) -> None:
    samples = RunReader(str(names["root"] / "runs" / "my-run")).read_samples(12).to_pylist()
    flat = [value for row in samples for value in row["reverse_kl"]]
    assert names["worst"]["reverse_kl"].to_list() == sorted(flat, reverse=True)[:10]
    kept = [value for row in samples for value in row["kept"]]
    assert names["kept_share"] == pytest.approx(sum(kept) / len(kept))


def test_events_and_status(names: dict[str, Any]) -> None:
    assert names["accuracy"] == {0: 0.42, 12: 0.95}
    assert names["finished"]
    assert names["table"].num_rows == 12


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)
