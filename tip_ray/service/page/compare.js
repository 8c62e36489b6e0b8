// Several runs laid over each other, and where their specs differ.

import { api } from "./api.js";
import { runColour, sharedCharts } from "./curves.js";
import { chip, fill, h } from "./dom.js";
import { Feed } from "./feed.js";
import { bytes, duration, number, percent, plain, saved } from "./format.js";
import { poll } from "./poll.js";
import { differences } from "./spec.js";
import { badge, elapsed, isActive } from "./state.js";

const LIVE_S = 4;
const ENDED_S = 20;

const RESULTS = {
  steps: (s) => `${s.step} of ${s.steps}`,
  "accuracy, before": (s) => percent(s.initial_accuracy),
  accuracy: (s) => percent(s.accuracy),
  loss: (s) => number(s.loss),
  "tokens kept": (s) => percent(s.kept_fraction),
  "bytes saved": (s) => percent(saved(s)),
  "bytes shipped": (s) => bytes(s.bytes_shipped),
  time: (s) => duration(elapsed(s)),
};

export function showCompare(main, names, heard) {
  const feeds = names.map((name) => new Feed(name));
  const specs = new Map();
  const place = { results: h("div", { class: "card wide scroll" }), specs: h("div", { class: "card wide scroll" }), broken: h("div") };
  let charts = null;
  const grid = h("div", { class: "grid charts" });
  fill(main, h("h1", {}, `${names.length} runs compared`), place.broken, place.results,
    h("h2", {}, "Where their specs differ"), place.specs, h("h2", {}, "Curves"), grid);

  async function refresh() {
    const broken = await Promise.all(feeds.map((feed) => one(feed)));
    fill(place.broken, broken.filter(Boolean).map((line) => h("p", { class: "error card", role: "alert" }, line)));
    const shown = feeds.map((feed, index) => ({ feed, colour: runColour(index) })).filter(({ feed }) => feed.status);
    const runs = shown.map(({ feed, colour }) => ({ label: feed.run, colour, metrics: feed.metrics, evaluations: feed.evaluations, marks: [] }));
    fill(place.results, resultTable(shown));
    fill(place.specs, specTable(shown, specs));
    draw(runs);
  }

  async function one(feed) {
    try {
      await feed.refresh();
      if (!specs.has(feed.run)) specs.set(feed.run, await api.spec(feed.run));
      return feed.problems.length ? `${feed.run}: ${feed.problems.join("; ")}` : null;
    } catch (error) {
      if (error.status === 401 || !error.status) throw error;
      return `${feed.run}: ${error.message}`;
    }
  }

  function draw(runs) {
    const withSteps = runs.filter(({ metrics }) => metrics.step.length);
    if (!withSteps.length) return;
    const key = withSteps.map(({ label }) => label).join();
    if (charts?.key !== key) {
      charts?.destroy();
      charts = { ...sharedCharts("compare", withSteps), key };
      fill(grid, charts.elements());
    }
    charts.update(withSteps);
  }

  const stop = poll(refresh, () => (feeds.some(({ status }) => status && isActive(status)) ? LIVE_S : ENDED_S), heard);
  return () => {
    stop();
    charts?.destroy();
  };
}

function head(shown, first) {
  return h("thead", {}, h("tr", {}, h("th", { scope: "col" }, first), shown.map(({ feed, colour }) =>
    h("th", { scope: "col" }, chip(colour), h("a", { href: `#/runs/${feed.run}` }, feed.run)))));
}

function resultTable(shown) {
  const rows = Object.entries(RESULTS).map(([name, say]) =>
    h("tr", {}, h("th", { scope: "row" }, name), shown.map(({ feed }) => h("td", { "data-result": `${feed.run} ${name}` }, say(feed.status)))));
  const states = h("tr", {}, h("th", { scope: "row" }, "state"), shown.map(({ feed }) => h("td", {}, badge(feed.status))));
  return h("table", { class: "side" }, head(shown, "result"), h("tbody", {}, states, rows));
}

function specTable(shown, specs) {
  const known = shown.filter(({ feed }) => specs.has(feed.run));
  const found = differences(known.map(({ feed }) => specs.get(feed.run)));
  if (!found.length) return h("p", { class: "note" }, "In nothing but their names.");
  return h("table", { class: "side" }, head(known, "field"), h("tbody", {}, found.map(([path, values]) =>
    h("tr", {}, h("th", { scope: "row" }, path), values.map((value) => h("td", {}, plain(value)))))));
}
