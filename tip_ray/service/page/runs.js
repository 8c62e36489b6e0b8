// The list of runs: live, sortable, filtered by word and by state; ticked ones are compared.

import { api } from "./api.js";
import { built, choice, fill, h, say, style } from "./dom.js";
import { age, count, number, percent, saved } from "./format.js";
import { poll } from "./poll.js";
import { badge, detail, isActive, isTrouble, serverTime, word } from "./state.js";

const PAUSE_S = 3;
const AT_FIRST = 200;
const AT_MOST = 1000;
const FEW = 8; // so many runs can be told apart by colour
const isAlive = (status) => status.health === "live" || status.health === "stale";
const SETS = { all: () => true, active: isAlive, ended: (s) => !isActive(s), trouble: isTrouble };
const SORTS = { started: "newest", title: "name", loss: "loss", accuracy: "accuracy", progress: "progress" };

// Kept while the tab lives, so that coming back finds the list as it was left.
const memory = { word: "", set: "all", ticked: new Set(), sort: [{ column: "started", dir: "desc" }] };

export function showRuns(main, heard) {
  let limit = AT_FIRST;
  const view = layout(() => { limit = AT_MOST; });
  fill(main, view.element);
  const stop = poll(async () => view.take(await api.runs(limit)), () => PAUSE_S, heard);
  return () => {
    stop();
    view.table.destroy();
  };
}

function layout(showAll) {
  const place = h("div", { class: "runs" });
  const broken = h("div", { class: "broken" });
  const summary = h("p", { class: "note", role: "status" });
  const compare = h("button", { type: "button", class: "primary", disabled: true, onclick: goCompare }, "Compare");
  const more = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => { more.hidden = true; showAll(); } }, "Show more");
  const table = makeTable(place, () => tick(compare));
  const ready = built(table);
  const narrow = () => table.setFilter((row) => SETS[memory.set](row.status) && row.title.includes(memory.word.toLowerCase()));
  const search = h("input", {
    type: "search", placeholder: "Filter by name", "aria-label": "Filter by name", value: memory.word,
    oninput: () => { memory.word = search.value; ready.then(narrow); },
  });
  const sets = choice("Which runs", { all: "All", active: "Active", ended: "Ended", trouble: "Trouble" }, memory.set,
    (set) => { memory.set = set; ready.then(narrow); });
  const order = h("select", { onchange: () => table.setSort(order.value, order.value === "title" || order.value === "loss" ? "asc" : "desc") },
    Object.entries(SORTS).map(([field, text]) => h("option", { value: field }, text)));
  table.on("dataSorted", (sorters) => { memory.sort = sorters.map(({ field, dir }) => ({ column: field, dir })); });
  const tools = h("div", { class: "controls" }, search, sets, h("label", { class: "pick phone" }, "First", order), h("span", { class: "grow" }), compare);
  const element = h("div", {}, h("h1", {}, "Runs"), tools, broken, place, summary, more);
  let first = true;

  async function take({ runs, broken: lines, total }) {
    await ready;
    fill(broken, (lines ?? []).map((line) => h("p", { class: "error card", role: "alert" }, "Broken run: ", line)));
    const held = document.activeElement?.dataset?.key;
    const rows = runs.map(row);
    const known = new Set(rows.map(({ run_id: id }) => id));
    for (const id of memory.ticked) if (!known.has(id)) memory.ticked.delete(id);
    tick(compare);
    await Promise.all(table.getRows().filter((one) => !known.has(one.getData().run_id)).map((one) => one.delete()));
    await table.updateOrAddData(rows);
    if (first) narrow();
    else table.refreshFilter();
    first = false;
    table.setSort(memory.sort);
    if (held) place.querySelector(`[data-key="${held}"]`)?.focus();
    const active = runs.filter(isAlive).length;
    say(summary, `${total ?? runs.length} runs, ${active} active${runs.length < total ? `; the newest ${runs.length} are shown` : ""}`);
    more.hidden = !(runs.length < total && runs.length < AT_MOST);
  }

  tick(compare);
  return { element, table, take };
}

function goCompare() {
  location.hash = `#/compare/${[...memory.ticked].join(",")}`;
}

function tick(button) {
  const n = memory.ticked.size;
  button.disabled = n < 2 || n > FEW;
  button.textContent = n > FEW ? `Compare at most ${FEW}` : n ? `Compare ${n} ticked` : "Compare ticked";
}

/** A run as a flat row: the table redraws just the cells whose value has changed. */
function row(status) {
  return {
    run_id: status.run_id,
    title: `${status.run_id} ${status.name}`.toLowerCase(),
    error: status.error ?? "",
    state: `${word(status)} ${detail(status)}`,
    progress: status.step / status.steps,
    loss: status.loss,
    accuracy: status.accuracy,
    kept: status.kept_fraction,
    saved: saved(status),
    started: status.started_at,
    age: age(serverTime(status) - status.started_at),
    status,
  };
}

/** Missing numbers go last, whichever way. */
function numeric(a, b, _rowA, _rowB, _column, direction) {
  const missing = direction === "asc" ? Infinity : -Infinity;
  return (a ?? missing) - (b ?? missing) || 0;
}

function makeTable(place, onTick) {
  const figure = (format) => (cell) => h("span", { class: "num", "data-label": cell.getColumn().getDefinition().title }, format(cell.getValue()));
  const right = { cssClass: "figure", hozAlign: "right", headerHozAlign: "right", sorter: numeric, headerSortStartingDir: "desc" };
  return new Tabulator(place, {
    index: "run_id",
    layout: "fitColumns",
    placeholder: "No runs here yet. tip-ray run starts one.",
    initialSort: memory.sort,
    columnDefaults: { titleFormatter: heading, resizable: false },
    columns: [
      { title: "", field: "ticked", width: 44, headerSort: false, formatter: (cell) => tickBox(cell.getData().run_id, onTick), titleFormatter: () => h("span", { class: "hidden" }, "compare") },
      { title: "Run", field: "title", minWidth: 220, widthGrow: 3, formatter: name, sorter: "string" },
      { title: "State", field: "state", minWidth: 150, widthGrow: 2, formatter: state, sorter: "string" },
      { title: "Steps", field: "progress", minWidth: 120, widthGrow: 1.5, formatter: progress, ...right, cssClass: "", hozAlign: "left", headerHozAlign: "left" },
      { title: "Loss", field: "loss", width: 112, formatter: figure(number), ...right },
      { title: "Accuracy", field: "accuracy", width: 122, formatter: figure(percent), ...right },
      { title: "Kept", field: "kept", width: 92, formatter: figure(percent), ...right },
      { title: "Saved", field: "saved", width: 104, formatter: figure(percent), ...right },
      { title: "Age", field: "age", width: 92, formatter: figure(String), ...right, sorter: (_a, _b, rowA, rowB) => rowB.getData().started - rowA.getData().started },
      { title: "", field: "started", visible: false, sorter: "number" },
    ],
  });
}

/** A header that the keyboard reaches: its click sorts, as one on the header does. */
function heading(cell) {
  return h("button", { type: "button", class: "heading" }, cell.getValue());
}

function tickBox(id, onTick) {
  const box = h("input", {
    type: "checkbox", checked: memory.ticked.has(id), "data-key": `tick-${id}`, "aria-label": `Compare ${id}`,
    onchange: () => {
      if (box.checked) memory.ticked.add(id);
      else memory.ticked.delete(id);
      onTick();
    },
  });
  return box;
}

function name(cell) {
  const { run_id: id, status } = cell.getData();
  const link = h("a", { href: `#/runs/${id}`, class: "name", "data-key": `open-${id}` }, id);
  return h("div", {}, link, h("div", { class: "soft small" }, status.error ? h("span", { class: "error clamp" }, status.error) : status.name));
}

function state(cell) {
  const { status } = cell.getData();
  return h("div", {}, badge(status), h("div", { class: "soft small" }, detail(status)));
}

function progress(cell) {
  const { status } = cell.getData();
  const bar = style(h("span", { class: "meter steps", "aria-hidden": "true" }), "--p", `${(100 * status.step) / status.steps}%`);
  return h("div", {}, h("span", {}, `${count(status.step)} / ${count(status.steps)}`), bar);
}
