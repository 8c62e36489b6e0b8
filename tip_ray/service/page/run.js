// The page of one run.

import { api } from "./api.js";
import { bytesCard } from "./bytes.js";
import { cancelButton } from "./cancel.js";
import { ownCharts, runColour, sharedCharts } from "./curves.js";
import { fill, h, say } from "./dom.js";
import { eventTable } from "./events.js";
import { Feed } from "./feed.js";
import { count, duration, moment } from "./format.js";
import { HeatMap } from "./heatmap.js";
import { poll } from "./poll.js";
import { specCards } from "./spec.js";
import { badge, detail, isActive } from "./state.js";
import { drawTiles, drawTroubles } from "./tiles.js";

const LIVE_S = 2;
const ENDED_S = 15; // it may be resumed
const RECENT_STEPS = 10; // for the time that is left

/** Show run `run` in `main`; returns a function that ends it. */
export function showRun(main, run, heard) {
  const feed = new Feed(run);
  const view = layout(run);
  fill(main, view.element);
  const stop = poll(
    async () => {
      const moved = await feed.refresh();
      drawHead(view, feed);
      if (moved) drawBody(view, feed);
      if (moved || !view.hasSamples || view.heatmap.late) await drawSamples(view);
      if (!view.hasSpec) await drawSpec(view, run);
    },
    () => (feed.status && !isActive(feed.status) ? ENDED_S : LIVE_S),
    heard,
  );
  return () => {
    stop();
    for (const part of [view.curves, view.own, view.events, view.heatmap]) part.destroy();
  };
}

function layout(run) {
  const group = `run-${run}`;
  const view = {
    run,
    badge: h("span"),
    detail: h("span", { class: "soft" }),
    told: h("p", { class: "notice", role: "status", hidden: true }),
    error: h("p", { class: "error card", role: "alert", hidden: true }),
    problems: h("div", { role: "alert" }),
    progress: h("progress", { max: 1, value: 0, "aria-label": "Steps" }),
    steps: h("span", { class: "steps" }),
    left: h("span", { class: "soft" }),
    tiles: h("div", { class: "tiles" }),
    troubles: h("p", { class: "troubles" }),
    curves: sharedCharts(group, [{ label: run, colour: runColour(0), metrics: { step: [] }, evaluations: [] }]),
    own: ownCharts(group),
    bytes: bytesCard(),
    events: eventTable(),
    heatmap: new HeatMap((step) => api.samples(run, step)),
    heatPlace: h("div", {}, h("p", { class: "note" }, "No rollouts yet.")),
    spec: h("div", {}),
    hasSamples: false,
    hasSpec: false,
  };
  const cancel = cancelButton(run, (line) => { view.told.hidden = false; view.told.textContent = line; });
  view.cancel = cancel.button;
  const { charts } = view.own;
  const parts = {
    curves: ["Curves", h("div", { class: "grid charts" }, view.curves.elements(""))],
    rollouts: ["Rollouts", view.heatPlace],
    tokens: ["Quadrants", h("div", { class: "grid charts two" }, charts.quadrants.element, charts.frozen.element)],
    time: ["Where the time goes", h("div", { class: "grid charts wide-first" }, charts.stages.element, view.curves.elements("time"))],
    bytes: ["Bytes", view.bytes.element],
    events: ["Faults and recoveries", view.events.element],
    spec: ["Spec, as resolved", view.spec],
  };
  view.element = h("div", { class: "run" },
    h("div", { class: "title" }, h("h1", {}, run), view.badge, view.detail, h("span", { class: "grow" }), view.cancel),
    cancel.dialog, view.told, view.error, view.problems,
    h("div", { class: "progress" }, view.progress, view.steps, view.left),
    view.tiles, view.troubles, jumps(parts),
    Object.entries(parts).map(([key, [title, content]]) => h("section", { id: `part-${key}`, tabindex: -1 }, h("h2", {}, title), content)));
  return view;
}

/** Buttons to the parts; links would clash with the address of the run. */
function jumps(parts) {
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const go = (key) => () => {
    const part = document.getElementById(`part-${key}`);
    part.scrollIntoView({ behavior: calm.matches ? "auto" : "smooth" });
    part.focus({ preventScroll: true });
  };
  return h("nav", { class: "jumps", "aria-label": "Parts of this page" }, Object.entries(parts).map(([key, [title]]) =>
    h("button", { type: "button", onclick: go(key) }, title)));
}

function drawHead(view, { status, metrics, problems }) {
  if (view.problems.childElementCount || problems.length) {
    fill(view.problems, problems.map((line) => h("p", { class: "error card" }, line)));
  }
  fill(view.badge, badge(status));
  say(view.detail, detail(status) || `started ${moment(status.started_at)}`);
  view.cancel.hidden = !isActive(status);
  view.error.hidden = !status.error;
  say(view.error, status.error ?? "");
  view.progress.value = status.step / status.steps;
  say(view.steps, `step ${count(status.step)} of ${count(status.steps)}`);
  say(view.left, timeLeft(status, metrics));
  drawTiles(view.tiles, status);
  drawTroubles(view.troubles, status);
}

function timeLeft(status, metrics) {
  const recent = (metrics.seconds_step ?? []).slice(-RECENT_STEPS);
  if (status.health !== "live" || !recent.length || status.step >= status.steps) return "";
  const mean = recent.reduce((sum, seconds) => sum + seconds, 0) / recent.length;
  return `about ${duration(mean * (status.steps - status.step))} left`;
}

function drawBody(view, feed) {
  const { metrics, evaluations, marks, status, events } = feed;
  view.events.update(events);
  view.bytes.update(status, metrics);
  if (!metrics.step.length && !evaluations.length) return;
  view.curves.update([{ label: view.run, colour: runColour(0), metrics, evaluations, marks }]);
  view.own.update({ metrics, marks });
}

async function drawSamples(view) {
  try {
    const some = await view.heatmap.refresh();
    if (some && !view.hasSamples) fill(view.heatPlace, view.heatmap.element);
    view.hasSamples ||= some;
  } catch (error) {
    if (error.status === 401 || !error.status) throw error;
    if (!view.hasSamples) fill(view.heatPlace, h("p", { class: "error card" }, error.message));
  }
}

async function drawSpec(view, run) {
  try {
    fill(view.spec, specCards(await api.spec(run)));
    view.hasSpec = true;
  } catch (error) {
    if (error.status === 401 || !error.status) throw error;
    fill(view.spec, h("p", { class: "error" }, error.message));
  }
}
