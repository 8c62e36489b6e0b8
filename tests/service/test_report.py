"""report.html: whole in itself, true to the numbers, and safe to open."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from tests.runs_made import (
    QUICKSTART,
    made_evaluation,
    made_metrics,
    made_run,
    made_samples,
    made_status,
)
from tip_ray.contract.errors import NotFoundError
from tip_ray.contract.run_state import RunState
from tip_ray.control.metrics_parts import METRICS_SCHEMA
from tip_ray.control.run_directory import RunDirectory
from tip_ray.control.run_reader import RunReader
from tip_ray.control.spec_file import load_spec
from tip_ray.service.report import render, write_report
from tip_ray.service.report_charts import MAX_POINTS, thinned


class Page(HTMLParser):
    """Tags with their attributes, the text of scripts, and the text outside them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    @property
    def tokens(self) -> list[dict[str, str | None]]:
        return [a for tag, a in self.tags if tag == "span" and (a.get("class") or "")[:1] == "t"]


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(render([RunReader(made_run(tmp_path, "a-run").url)]))


def test_every_chart_has_a_place_and_its_numbers(page: Page, tmp_path: Path) -> None:
    places = {a["id"] for tag, a in page.tags if tag == "div" and a.get("class") == "chart"}
    shared = {"loss", "accuracy", "kept", "divergence", "entropy", "gradient", "length", "ends"}
    shared |= {"speed", "gap"}
    own = {"quadrants-0", "frozen-0", "bytes-0", "stages-0"}
    assert set(page.figures) == places == shared | own
    loss = page.figures["loss"]["traces"][0]
    metrics = RunReader(str(tmp_path / "a-run")).read_metrics()
    assert loss["x"] == metrics.column("step").to_pylist()
    assert loss["y"] == pytest.approx(metrics.column("loss").to_pylist(), rel=1e-4)
    accuracy = page.figures["accuracy"]["traces"][0]
    assert (accuracy["x"], accuracy["y"]) == ([0, 12], [0.42, 0.95])


def test_bytes_have_binary_units_everywhere(tmp_path: Path) -> None:
    directory = made_run(tmp_path, "a-run", steps=1)
    sizes = {"bytes_cut_to_learner": 3 * 1024, "bytes_unpruned_to_learner": 5 << 20}
    directory.append_metrics(made_metrics(1, **sizes))
    page = Page(render([RunReader(directory.url)]))
    bars = page.figures["bytes-0"]["traces"][0]
    assert dict(zip(bars["y"], bars["text"], strict=True)) == {
        "rollout → teacher": "1 B",
        "teacher → selector": "1 B",
        "selector → cut": "1 B",
        "cut → learner": "3.0 KiB",
        "the same, all tokens": "5.0 MiB",
        "weights → rollout": "1 B",
    }
    assert not re.search(r"[0-9.] ?[kMG]B\b", page.text)


def test_the_header_has_result_and_key_facts(page: Page) -> None:
    text = " ".join(page.text.split())
    for fact in ("a-run", "SUCCEEDED", "42.0% → 95.0%", "12/12", "demo:carry-student", "soft_or"):
        assert fact in text


def test_nothing_is_loaded_and_only_known_scripts_run(page: Page) -> None:
    for tag, attributes in page.tags:
        assert not {"src", "href", "data", "action", "onload", "onclick"} & set(attributes), tag
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    _, *scripts = page.scripts
    hashes = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts}
    assert hashes == allowed
    assert len(scripts) == 2


def test_what_a_model_says_stays_text(tmp_path: Path) -> None:
    evil = ["</script><script>alert(1)</script>", '"onclick="x', "<img src=x>", "\x1b[2J", "a\nb"]
    directory = made_run(tmp_path, "a-run")
    for step in (1, 12):
        directory.write_samples(step, made_samples(step, [evil]))
    directory.write_evaluation(made_evaluation(12, 0.5, name="</script><b>evil"))
    error = "<b>bold</b>"
    directory.write_status(made_status("a-run", step=12, state=RunState.FAILED, error=error))
    page = Page(render([RunReader(directory.url)]))
    assert len(page.scripts) == 3
    assert "</script><b>evil" in [t["name"] for t in page.figures["accuracy"]["traces"]]
    assert not {"img", "b"} & {tag for tag, a in page.tags if tag != "b" or a}
    assert "</script><script>alert(1)</script>" in page.text
    assert error in page.text
    assert "\\x1b[2J" in page.text
    assert "a↵\nb" in page.text


def test_tokens_are_marked_and_shaded_by_divergence(tmp_path: Path) -> None:
    directory = made_run(tmp_path, "a-run")
    table = made_samples(1, [list("abcd")])
    divergence = pa.array([[0.0, 0.5, 2.0, 1.0]], table.schema.field("reverse_kl").type)
    index = table.schema.get_field_index("reverse_kl")
    table = table.set_column(index, table.schema.field("reverse_kl"), divergence)
    for step in (1, 12):
        directory.write_samples(step, table)
    tokens = Page(render([RunReader(directory.url)])).tokens
    assert [token["class"] for token in tokens] == ["t", "t k", "t", "t k"] * 2
    shades = [float((token["style"] or "").removeprefix("--d:")) for token in tokens[:4]]
    assert shades[0] == 0.0
    assert shades[0] < shades[1] < shades[3] <= shades[2]
    assert "reverse KL 0.500" in (tokens[1]["title"] or "")
    assert (tokens[1]["title"] or "").endswith("kept")


def test_long_rollouts_are_cut_and_say_so(tmp_path: Path) -> None:
    directory = made_run(tmp_path, "a-run")
    for step in (1, 12):
        directory.write_samples(step, made_samples(step, [["x"] * 700]))
    page = Page(render([RunReader(directory.url)]))
    assert len(page.tokens) == 2 * 600
    assert page.text.count("and 100 more") == 2


def test_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    readers = [
        RunReader(made_run(tmp_path, run, steps=n).url) for run, n in (("one", 3), ("two", 5))
    ]
    page = Page(render(readers))
    loss = page.figures["loss"]["traces"]
    assert [trace["name"] for trace in loss] == ["one", "two"]
    assert [len(trace["x"]) for trace in loss] == [3, 5]
    assert loss[0]["line"]["color"] != loss[1]["line"]["color"]
    assert {"stages-0", "stages-1"} <= set(page.figures)


def test_a_run_without_a_step_or_with_numbers_that_are_none(tmp_path: Path) -> None:
    directory = RunDirectory.create(str(tmp_path), "a-run", load_spec(QUICKSTART))
    reader = RunReader(directory.url)
    with pytest.raises(NotFoundError):
        render([reader])
    directory.write_status(made_status("a-run", state=RunState.FAILED, error="no room"))
    assert Page(render([reader])).figures == {}
    directory.append_metrics(made_metrics(1, loss=float("nan")))
    assert Page(render([reader])).figures["loss"]["traces"][0]["y"] == [None]


def test_it_is_written_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (RunReader(made_run(tmp_path / "runs", run, steps=2).url) for run in ("one", "two"))
    assert write_report([one]) == str(tmp_path / "runs" / "one" / "report.html")
    assert write_report([one, two]) == str(tmp_path / "report.html")
    assert write_report([one], "new/page.html") == str(tmp_path / "new" / "page.html")
    assert write_report([one], "memory://pages/page.html").endswith("pages/page.html")
    with fsspec.open("memory://pages/page.html") as file:
        assert file.read() == (tmp_path / "new" / "page.html").read_bytes()


def test_a_long_run_is_drawn_as_means_over_windows() -> None:
    rows = 2 * MAX_POINTS + 500
    rng = np.random.default_rng(0)
    columns = {name: rng.random(rows) for name in METRICS_SCHEMA.names}
    columns["step"] = np.arange(1, rows + 1)
    drawn = thinned(pa.table(columns))
    assert len(drawn["step"]) == MAX_POINTS
    starts = np.linspace(0, rows, MAX_POINTS, endpoint=False).astype(int)
    window = slice(starts[7], starts[8])
    assert drawn["loss"][7] == pytest.approx(columns["loss"][window].mean(), rel=1e-4)
    assert drawn["step"][-1] == pytest.approx(columns["step"][starts[-1] :].mean(), rel=1e-4)
    short = pa.table({name: values[:5] for name, values in columns.items()})
    assert thinned(short)["step"] == [1, 2, 3, 4, 5]
