"""The web page in a real browser: its numbers equal the run directory's, and it stays safe."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from playwright.sync_api import Browser, Page, expect

from tests.runs_made import (
    QUICKSTART,
    made_evaluation,
    made_metrics,
    made_run,
    made_samples,
    made_status,
)
from tests.service.api_served import TOKEN, Served, serving
from tests.service.browser import Tab, chromium
from tests.service.real_runs import PRUNED, STEPS, WHOLE, make_real_runs
from tip_ray.contract.run_state import RunState
from tip_ray.control.progress import size
from tip_ray.control.run_directory import RunDirectory
from tip_ray.control.run_reader import RunReader
from tip_ray.control.spec_file import load_spec

KEY = "tip-ray-token"
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
DESK = {"viewport": {"width": 1280, "height": 800}}
Opened = Callable[..., Tab]
expect.set_options(timeout=60_000)  # for a machine that does much else


@pytest.fixture(scope="module")
def root(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_real_runs(root)
    return root


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    with serving(root) as one:
        yield one


@pytest.fixture(scope="module")
def browser(root: Path) -> Iterator[Browser]:
    """After the runs were made: they need this thread's event loop."""
    with chromium() as one:
        yield one


@pytest.fixture
def tabs(browser: Browser, served: Served) -> Iterator[Opened]:
    """Opens tabs that have the token; none may load from elsewhere, throw, or break the policy."""
    opened: list[Tab] = []

    def open_one(**context: Any) -> Tab:
        tab = Tab(browser, f"http://127.0.0.1:{served.port}", **{**DESK, **context})
        tab.keep_token(KEY, TOKEN)
        opened.append(tab)
        return tab

    yield open_one
    for tab in opened:
        foreign, said = tab.foreign(), tab.said
        tab.close()
        assert foreign == []
        assert said == []


@pytest.fixture(scope="module")
def whole(root: Path) -> RunReader:
    return RunReader(str(root / WHOLE))


def percent(fraction: float) -> str:
    return f"{fraction:.1%}"


def number(text: str) -> float:
    return float(text.replace(",", "").removesuffix("%"))


def legend(tab: Tab, chart: str) -> dict[str, float]:
    """What a chart's legend says, by line."""
    values = tab.page.locator(f'[data-chart="{chart}"] [data-value]')
    expect(values.first).to_have_text(re.compile(r"\d"))
    return {one.get_attribute("data-value"): number(one.inner_text()) for one in values.all()}


def rollouts_of(page: Page) -> list[tuple[int, int]]:
    """(slot, sample) of the cards in their order."""
    cards = page.locator(".rollout").all()
    places = [(c.get_attribute("data-slot"), c.get_attribute("data-sample")) for c in cards]
    return [(int(slot or ""), int(sample or "")) for slot, sample in places]


def visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "↵")


def test_it_asks_for_the_token_and_says_when_it_is_wrong(browser: Browser, served: Served) -> None:
    tab = Tab(browser, f"http://127.0.0.1:{served.port}", **DESK)
    page = tab.open("")
    for wrong, says in (("not-the-token", "Wrong token"), ("ümlaut or blank", "Wrong token")):
        page.get_by_label("Token").fill(wrong)
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_role("alert")).to_contain_text(says)
        assert page.evaluate("sessionStorage.length") == 0
        assert WHOLE not in page.content()
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Open").click()
    expect(page.get_by_role("link", name=WHOLE)).to_be_visible()
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    assert not any(TOKEN in url for url in tab.asked)
    page.get_by_role("button", name="Forget token").click()
    expect(page.get_by_label("Token")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    tab.close()


def test_the_list_shows_what_the_status_files_say(tabs: Opened, whole: RunReader) -> None:
    tab, status = tabs(), whole.read_status()
    page = tab.open("")
    row = page.locator(".tabulator-row", has=page.get_by_role("link", name=WHOLE))
    assert status.loss is not None
    assert status.accuracy is not None
    assert status.kept_fraction is not None
    expect(row).to_contain_text("SUCCEEDED")
    cells = {field: row.locator(f'[tabulator-field="{field}"]') for field in ("loss", "accuracy")}
    assert number(cells["loss"].inner_text()) == pytest.approx(status.loss, rel=1e-3)
    assert cells["accuracy"].inner_text() == percent(status.accuracy)
    expect(row.locator('[tabulator-field="kept"]')).to_have_text(percent(status.kept_fraction))
    saved = 1 - status.bytes_shipped / status.bytes_unpruned
    expect(row.locator('[tabulator-field="saved"]')).to_have_text(percent(saved))
    expect(row.locator('[tabulator-field="progress"]')).to_contain_text(f"{STEPS} / {STEPS}")


def test_silent_and_broken_runs_are_told_apart(tabs: Opened, root: Path) -> None:
    for run_id, silent_s in (("quiet", 60), ("gone", 3600)):
        directory = RunDirectory.create(str(root), run_id, load_spec(QUICKSTART))
        heartbeat = time.time() - silent_s
        directory.write_status(
            made_status(run_id, state=RunState.RUNNING, heartbeat_at=heartbeat, step=3)
        )
    (root / "torn").mkdir()
    (root / "torn" / "status.json").write_text('{"run_id": "to')
    page = tabs().open("")
    state = {
        run: page.locator(".tabulator-row", has=page.get_by_role("link", name=run)).locator(
            '[tabulator-field="state"]'
        )
        for run in ("quiet", "gone")
    }
    expect(state["quiet"]).to_have_text(re.compile(r"STALE\s*was RUNNING, silent for 1 min"))
    expect(state["gone"]).to_have_text(re.compile(r"LOST\s*was RUNNING, silent for 1 h"))
    expect(page.get_by_role("alert")).to_contain_text("torn/status.json")
    page.get_by_text("Trouble", exact=True).click()
    expect(page.get_by_role("link", name=WHOLE)).to_have_count(0)
    expect(page.get_by_role("link", name="quiet")).to_be_visible()
    page.get_by_label("Filter by name").fill("gon")
    expect(page.get_by_role("link", name="quiet")).to_have_count(0)
    expect(page.get_by_role("link", name="gone")).to_be_visible()
    for run_id in ("quiet", "gone", "torn"):
        shutil.rmtree(root / run_id)


def test_the_list_is_sorted_by_a_header(tabs: Opened) -> None:
    page = tabs().open("")
    names = page.locator(".tabulator-row a.name")
    page.get_by_role("button", name="Run", exact=True).press("Enter")
    expect(names).to_have_text([PRUNED, WHOLE])
    page.get_by_role("button", name="Run", exact=True).press("Enter")
    expect(names).to_have_text([WHOLE, PRUNED])


def test_tiles_and_curves_equal_the_run_directory(tabs: Opened, whole: RunReader) -> None:
    tab, status, metrics = tabs(), whole.read_status(), whole.read_metrics().to_pydict()
    page = tab.open(f"runs/{WHOLE}")
    assert status.accuracy is not None
    assert status.kept_fraction is not None
    expect(page.locator('[data-field="accuracy"]')).to_have_text(percent(status.accuracy))
    assert number(tab.text('[data-field="loss"]')) == pytest.approx(metrics["loss"][-1], rel=1e-3)
    expect(page.locator('[data-field="kept"]')).to_have_text(percent(status.kept_fraction))
    lines = {
        ("divergence", "mean"): "reverse_kl_mean",
        ("divergence", "0.98 quantile"): "reverse_kl_p98",
        ("entropy", "student"): "student_entropy_mean",
        ("entropy", "teacher"): "teacher_entropy_mean",
        ("gradient", "norm"): "grad_norm",
        ("length", "mean"): "response_length_mean",
        ("loss", "loss"): "loss",
        ("stages", "rollout"): "seconds_rollout",
        ("stages", "wall time of the step"): "seconds_step",
    }
    for (chart, line), column in lines.items():
        assert legend(tab, chart)[line] == pytest.approx(metrics[column][-1], rel=1e-3)
    shares = [metrics[f"frozen_q{q}_share"][-1] for q in (1, 2, 3, 4)]
    assert list(legend(tab, "frozen").values()) == pytest.approx(
        [100 * share for share in shares], abs=0.051
    )
    last = next(result for result in whole.read_evaluations() if result.step == STEPS)
    assert legend(tab, "accuracy") == {"carry": pytest.approx(100 * last.mean, abs=0.051)}


def test_the_keyboard_reads_a_curve_step_by_step(tabs: Opened, whole: RunReader) -> None:
    tab, metrics = tabs(), whole.read_metrics().to_pydict()
    page = tab.open(f"runs/{WHOLE}")
    legend(tab, "loss")
    plot = page.locator('[data-chart="loss"] .plot')
    for key, step in (("Home", 1), ("ArrowRight", 2), ("ArrowRight", 3), ("End", STEPS)):
        plot.press(key)
        expect(page.locator('[data-chart="loss"] .at')).to_have_text(f"step {step}")
        assert legend(tab, "loss")["loss"] == pytest.approx(metrics["loss"][step - 1], rel=1e-3)
        norm = legend(tab, "gradient")["norm"]  # the charts share the cursor
        assert norm == pytest.approx(metrics["grad_norm"][step - 1], rel=1e-3)
    assert (plot.get_attribute("aria-label") or "").startswith(f"step {STEPS}: loss ")


def test_bytes_at_each_hop_equal_the_run_directory(tabs: Opened, whole: RunReader) -> None:
    tab, status, metrics = tabs(), whole.read_status(), whole.read_metrics().to_pydict()
    page = tab.open(f"runs/{WHOLE}")
    expect(page.locator('[data-field="shipped"]')).to_have_text(size(status.bytes_shipped))
    expect(page.locator('[data-field="unpruned"]')).to_have_text(size(status.bytes_unpruned))
    hops = page.locator("[data-hop]")
    expect(hops).to_have_count(6)
    for hop in hops.all():
        values = metrics[hop.get_attribute("data-hop") or ""]
        assert hop.inner_text() == size(sum(values) / len(values))


def test_the_resolved_spec_is_shown_whole(tabs: Opened, whole: RunReader) -> None:
    page = tabs().open(f"runs/{WHOLE}")
    spec = whole.read_spec()
    shown = page.locator("[data-spec]")
    expect(page.locator('[data-spec="selection.retention"]')).to_have_text("0.5")
    expect(page.locator('[data-spec="rollout.engine"]')).to_have_text("transformers")
    expect(page.locator('[data-spec="learner.betas"]')).to_have_text("[0.9,0.999]")
    names = {(one.get_attribute("data-spec") or "").split(".")[0] for one in shown.all()}
    assert names == set(spec) | {"tracking"}


def test_the_heat_map_shows_real_tokens(tabs: Opened, whole: RunReader) -> None:
    page = tabs().open(f"runs/{WHOLE}")
    rows = whole.read_samples().to_pylist()
    expect(page.locator(".rollout")).to_have_count(len(rows))
    for row in rows:
        card = page.locator(f'[data-slot="{row["slot"]}"][data-sample="{row["sample_index"]}"]')
        assert card.locator(".prompt").inner_text() == visible(row["prompt_text"])
        tokens = card.locator("[data-index]")
        assert tokens.all_inner_texts() == [visible(text) for text in row["text"]]
        kept = tokens.evaluate_all("all => all.map(t => Number(t.classList.contains('kept')))")
        assert kept == row["kept"]
        for index in (row["kept"].index(1), row["kept"].index(0)):  # not by colour alone
            sign = tokens.nth(index).evaluate("t => getComputedStyle(t, '::after').content")
            assert ("▴" in sign) == bool(row["kept"][index])


@pytest.mark.parametrize(
    ("switch", "column"), [("divergence", "reverse_kl"), ("entropy", "student_entropy")]
)
def test_tokens_are_shaded_by_what_the_switch_says(
    switch: str, column: str, tabs: Opened, whole: RunReader
) -> None:
    page = tabs().open(f"runs/{WHOLE}")
    page.locator(".heatmap").get_by_text(switch, exact=True).click()
    rows = whole.read_samples().to_pylist()
    values = sorted(value for row in rows for value in row[column])
    deepest = values[int(0.98 * (len(values) - 1))]
    expect(page.locator(".scale-end")).to_contain_text(f"nats of {switch}")
    for row in rows:
        card = page.locator(f'[data-slot="{row["slot"]}"][data-sample="{row["sample_index"]}"]')
        found = card.locator("[data-index]").evaluate_all(
            "all => all.map(t => Number(t.style.getPropertyValue('--d')))"
        )
        shares = [min(1.0, max(0.0, value) / deepest) for value in row[column]]
        assert found == pytest.approx([0.85 * math.sqrt(share) for share in shares], abs=2e-3)


def test_rollouts_are_sorted_and_the_slider_goes_to_another_step(
    tabs: Opened, whole: RunReader
) -> None:
    def order(step: int, column: str) -> list[tuple[int, int]]:
        rows = whole.read_samples(step).to_pylist()
        rows.sort(key=lambda row: -sum(row[column]) / len(row[column]))
        return [(row["slot"], row["sample_index"]) for row in rows]

    page = tabs().open(f"runs/{WHOLE}")
    expect(page.locator(".slider .at")).to_have_text(f"step {STEPS}, newest")
    assert rollouts_of(page) == order(STEPS, "reverse_kl")
    page.get_by_label("First").select_option("entropy")
    assert rollouts_of(page) == order(STEPS, "student_entropy")
    page.get_by_role("button", name="Step before").click()
    expect(page.locator(".slider .at")).to_have_text(f"step {STEPS - 1} of {STEPS}")
    expect(page.locator(f'.rollouts[data-step="{STEPS - 1}"]')).to_be_visible()
    page.get_by_label("First").select_option("divergence")
    assert rollouts_of(page) == order(STEPS - 1, "reverse_kl")


@pytest.mark.parametrize("how", ["hover", "focus", "tap"])
def test_a_token_shows_the_top_five_of_both_models(
    how: str, tabs: Opened, whole: RunReader
) -> None:
    page = tabs(**(PHONE if how == "tap" else {})).open(f"runs/{WHOLE}")
    row = whole.read_samples().to_pylist()[0]
    index = max(range(len(row["text"])), key=lambda i: row["student_entropy"][i])
    card = page.locator(f'[data-slot="{row["slot"]}"][data-sample="{row["sample_index"]}"]')
    token = card.locator(f'[data-index="{index}"]')
    if how == "focus":
        card.locator('[data-index="0"]').focus()
        for _ in range(index):
            page.keyboard.press("ArrowRight")
        expect(token).to_be_focused()
    else:
        token.hover() if how == "hover" else token.tap()
    panel = page.locator(".panel")
    expect(panel.locator(".fate")).to_have_text("kept" if row["kept"][index] else "dropped")
    for model in ("student", "teacher"):
        lines = panel.locator(f".{model} tr:not(.beyond)")
        texts = [visible(text) for text in row[f"{model}_top_text"][index]]
        assert [
            one.removesuffix(" ◀") for one in lines.locator("td:first-child").all_inner_texts()
        ] == texts
        for shown, logprob in zip(
            lines.locator("td.num").all_inner_texts(),
            row[f"{model}_top_logprobs"][index],
            strict=True,
        ):
            value = number(shown) / (100 if shown.endswith("%") else 1)
            assert value == pytest.approx(math.exp(logprob), abs=5.1e-4, rel=0.06)
    sampled = visible(row["text"][index])
    expect(panel.locator(".student .chosen code")).to_have_text(sampled)
    assert f"{row['student_entropy'][index]:.2g}"[:3] in panel.locator(".scalars").inner_text()


def test_a_clicked_token_stays_until_it_is_closed(tabs: Opened) -> None:
    page = tabs().open(f"runs/{WHOLE}")
    card, panel = page.locator(".rollout").first, page.locator(".panel")
    card.locator('[data-index="3"]').click()
    card.locator('[data-index="5"]').hover()
    expect(panel).to_contain_text("token 4 of")
    panel.get_by_role("button", name="Close").click()
    expect(panel).to_be_hidden()
    card.locator('[data-index="5"]').hover()
    expect(panel).to_contain_text("token 6 of")
    card.locator('[data-index="5"]').press("Escape")
    expect(panel).to_be_hidden()


def test_a_run_that_is_not_there_is_said_to_be(tabs: Opened) -> None:
    page = tabs().open("runs/no-such-run")
    expect(page.get_by_role("heading", name="Not here")).to_be_visible()
    expect(page.locator("main")).to_contain_text("no such run")
    page.get_by_role("link", name="All runs").click()
    expect(page.get_by_role("link", name=WHOLE)).to_be_visible()


def test_texts_of_the_top_five_are_the_tokenizers(whole: RunReader) -> None:
    known: dict[int, str] = {}
    rows = whole.read_samples().to_pylist()
    for row in rows:
        known |= dict(zip(row["response_ids"], row["text"], strict=True))
    for row in rows:
        for model in ("student", "teacher"):
            ids, texts = row[f"{model}_top_ids"], row[f"{model}_top_text"]
            pairs = [
                (i, t) for a, b in zip(ids, texts, strict=True) for i, t in zip(a, b, strict=True)
            ]
            assert any(i in known for i, _ in pairs)
            assert all(known.get(i, t) == t for i, t in pairs)


def test_runs_are_compared_by_step_and_by_what_differs(
    tabs: Opened, whole: RunReader, root: Path
) -> None:
    tab, pruned = tabs(), RunReader(str(root / PRUNED))
    page = tab.open("")
    for run in (WHOLE, PRUNED):
        page.get_by_label(f"Compare {run}").check()
    page.get_by_role("button", name="Compare 2 ticked").click()
    expect(page.locator(f'[data-result="{PRUNED} loss"]')).to_be_visible()
    for reader in (whole, pruned):
        metrics = reader.read_metrics().to_pydict()
        assert legend(tab, "loss")[reader.run_id] == pytest.approx(metrics["loss"][-1], rel=1e-3)
    differing = page.locator("table.side").nth(1).locator("tbody tr")
    expect(differing).to_have_text(re.compile(r"selection.retention\s*0.5\s*0.1"))
    expect(differing).to_have_count(1)


def test_a_running_run_moves_before_ones_eyes(tabs: Opened, root: Path) -> None:
    directory = RunDirectory.create(str(root), "moving", load_spec(QUICKSTART))

    def step(number: int, **changes: Any) -> None:
        directory.append_metrics(made_metrics(number, loss=0.1 * number))
        now = {"step": number, "loss": 0.1 * number, "state": RunState.RUNNING}
        directory.write_status(made_status("moving", **{**now, **changes}))

    step(1)
    tab = tabs()
    page = tab.open("runs/moving")
    expect(page.locator(".title .badge")).to_have_text(re.compile("RUNNING"))
    assert legend(tab, "loss") == {"loss": 0.1}
    directory.write_event("replica_lost", 2, pool="rollout", replica=0, reason="it died")
    directory.write_event("replica_recovered", 2, pool="rollout", replica=0, seconds=1.5)
    directory.write_evaluation(made_evaluation(2, 0.75))
    directory.write_samples(2, made_samples(2, [list("7+8"), ["<eos>"]]))
    step(2, accuracy=0.75, recoveries=1)
    expect(page.locator('[data-field="loss"]')).to_have_text("0.2")
    expect(page.locator('[data-chart="loss"] [data-value]')).to_have_text("0.2")
    assert legend(tab, "accuracy") == {"carry": 75.0}
    expect(page.locator(".rollout")).to_have_count(2)
    expect(page.locator(".events")).to_contain_text("it died")
    expect(page.get_by_text("3 events: 1 faults (▼), 1 recoveries (▲)")).to_be_visible()
    expect(page.locator(".troubles")).to_have_text("1 recoveries")

    page.get_by_role("button", name="Cancel run…").click()
    page.get_by_role("button", name="Let it run").click()
    assert not directory.cancel_requested()
    page.get_by_role("button", name="Cancel run…").click()
    page.get_by_role("button", name="Cancel the run").click()
    expect(page.locator(".notice")).to_contain_text("Asked to stop")
    assert directory.cancel_requested()

    step(3, heartbeat_at=time.time() - 30)
    expect(page.locator(".title .badge")).to_have_text(re.compile("STALE"))
    shutil.rmtree(root / "moving")


EVIL = [
    "</script><script>window.hacked = 1</script>",
    '<img src="/nowhere" onerror="window.hacked = 2">',
    "<b>bold</b>\n",
    "\x1b[2J\u202e",
]


def test_what_models_and_files_say_stays_text(tabs: Opened, root: Path) -> None:
    directory = made_run(root, "evil", steps=2)
    samples = made_samples(2, [EVIL])
    texts = [[[EVIL[1]] * 5] * len(EVIL)]
    for name, value in {
        "prompt_text": [EVIL[1]],
        "student_top_text": texts,
        "teacher_top_text": texts,
    }.items():
        field = samples.schema.field(name)
        column = samples.schema.get_field_index(name)
        samples = samples.set_column(column, field, pa.array(value, field.type))
    directory.write_samples(2, samples)
    directory.write_event("samples_lost", 2, reason=EVIL[1])
    directory.write_evaluation(made_evaluation(2, 0.5, name=EVIL[1]))
    directory.write_status(made_status("evil", step=2, state=RunState.FAILED, error=EVIL[1]))
    tab = tabs()
    page = tab.open("runs/evil")
    expect(page.locator(".rollout .prompt")).to_have_text(visible(EVIL[1]))
    token = page.locator('.rollout [data-index="0"]')
    expect(token).to_have_text(visible(EVIL[0]))
    token.hover()
    expect(page.locator(".panel .student code").first).to_have_text(visible(EVIL[1]))
    expect(page.locator('.rollout [data-index="2"]')).to_have_text("<b>bold</b>↵")
    expect(page.locator('.rollout [data-index="3"]')).to_have_text("\\u001b[2J\\u202e")
    expect(page.locator("p.error.card:visible")).to_have_text(EVIL[1])
    expect(page.locator(".events")).to_contain_text(EVIL[1])
    expect(page.locator('[data-chart="accuracy"]')).to_contain_text(EVIL[1])
    page.goto(f"{tab.base}/#/")
    expect(page.get_by_text(EVIL[1])).to_be_visible()
    page.goto(f"{tab.base}/#/compare/evil,{WHOLE}")
    expect(page.locator('[data-chart="accuracy"]')).to_contain_text(EVIL[1])
    assert page.evaluate("window.hacked") is None
    assert not any("nowhere" in url for url in tab.asked)
    assert page.locator("main img, main b:text-is('bold'), main script").count() == 0
    shutil.rmtree(root / "evil")


def test_a_broken_file_leaves_the_rest_standing(root: Path, tabs: Opened) -> None:
    directory = made_run(root, "half", steps=3)
    part = next(Path(directory.url, "metrics").iterdir())
    part.write_bytes(part.read_bytes()[:40])
    page = tabs().open("runs/half")
    expect(page.locator("p.error.card:visible")).to_contain_text(f"metrics/{part.name}")
    expect(page.locator('[data-field="accuracy"]')).to_have_text("95.0%")
    expect(page.locator(".rollout")).to_have_count(2)
    shutil.rmtree(root / "half")


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("shape", [PHONE, DESK], ids=["phone", "desk"])
def test_nothing_is_wider_than_the_window_in_light_and_dark(
    shape: dict[str, Any], colours: str, tabs: Opened, tmp_path: Path
) -> None:
    tab = tabs(**shape, color_scheme=colours)
    for route, there in (
        ("", ".tabulator-row"),
        (f"runs/{WHOLE}", ".rollout"),
        (f"compare/{WHOLE},{PRUNED}", ".uplot"),
    ):
        page = tab.open(route)
        expect(page.locator(there).first).to_be_visible()
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert tab.overflow() == 0
        channels = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", channels)[:3]))
        assert (brightness < 150) == (colours == "dark")
    assert (tmp_path / "page.png").stat().st_size > 10_000
