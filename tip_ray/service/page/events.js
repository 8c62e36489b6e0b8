// What happened to a run: evaluations for the curves, faults and recoveries as marks and as a table.

import { built, h } from "./dom.js";
import { duration, moment, percent } from "./format.js";

const RECOVERIES = new Set(["replica_recovered"]);
const PLAIN = new Set(["state", "checkpoint", "evaluation"]);
const SIGNS = { fault: "▼", recovery: "▲", note: "·" };
const SHOWN_MARKS = 200;

/** fault | recovery | note. What is not known to be harmless counts as a fault. */
export function sort(event) {
  if (RECOVERIES.has(event.kind)) return "recovery";
  if (event.kind === "state") return event.state === "FAILED" ? "fault" : "note";
  return PLAIN.has(event.kind) ? "note" : "fault";
}

/** For the curves, one a step and kind; the newest ones where there are very many. */
export function marks(events) {
  const found = new Map();
  for (const event of events) {
    const mark = { step: event.step, kind: sort(event) };
    if (mark.kind !== "note") found.set(`${mark.kind} ${mark.step}`, mark);
  }
  return [...found.values()].slice(-SHOWN_MARKS);
}

/** In order of step; a replayed step's evaluation replaces the first one's. */
export function evaluations(events) {
  const newest = new Map();
  for (const event of events) {
    if (event.kind === "evaluation") newest.set(`${event.name} ${event.step}`, event);
  }
  return [...newest.values()].sort((a, b) => a.step - b.step);
}

/** One line about an event. */
export function describe(event) {
  const { kind } = event;
  if (kind === "state") return event.state;
  if (kind === "evaluation") {
    return `${event.name}: ${percent(event.mean)} ± ${percent(event.standard_error)} of ${event.problems} problems`;
  }
  if (kind === "checkpoint") return `written in ${duration(event.seconds)}`;
  const facts = Object.entries(event).filter(([name]) => !["time", "kind", "step", "reason", "seconds"].includes(name));
  const said = facts.map(([name, value]) => `${name} ${value}`);
  if (typeof event.seconds === "number") said.push(`in ${duration(event.seconds)}`);
  if (event.reason) said.push(event.reason);
  return said.join(", ");
}

/** A sortable table of events, newest first: {element, update(events), destroy()}. */
export function eventTable() {
  const place = h("div", { class: "events" });
  let table = null;
  let shown = 0;
  let faultsOnly = false;
  const filter = h("input", {
    type: "checkbox",
    onchange: () => {
      faultsOnly = filter.checked;
      table?.setFilter(faultsOnly ? [{ field: "sort", type: "!=", value: "note" }] : []);
    },
  });
  const summary = h("p", { class: "note", role: "status" });
  const element = h("div", { class: "card wide" }, summary, h("label", { class: "tick" }, filter, "Faults and recoveries only"), place);
  return {
    element,
    update(events) {
      const rows = events.map(row);
      const faults = rows.filter(({ sort }) => sort === "fault").length;
      const recoveries = rows.filter(({ sort }) => sort === "recovery").length;
      summary.textContent = `${rows.length} events: ${faults} faults (▼), ${recoveries} recoveries (▲). Both are marked on the curves.`;
      table ??= makeTable(place);
      const fresh = rows.slice(shown);
      if (rows.length < shown) table.built.then(() => table.replaceData(rows));
      else if (fresh.length) table.built.then(() => table.addData(fresh, true));
      shown = rows.length;
    },
    destroy: () => table?.destroy(),
  };
}

function row(event) {
  return { time: event.time, step: event.step, kind: event.kind, sort: sort(event), what: describe(event) };
}

function makeTable(place) {
  const text = (format, name = "") => (cell) => h("span", { class: name }, format(cell.getValue()));
  const phone = matchMedia("(max-width: 640px)").matches;
  const table = new Tabulator(place, {
    layout: "fitColumns",
    responsiveLayout: "hide",
    maxHeight: 360,
    placeholder: "Nothing yet",
    initialSort: [{ column: "time", dir: "desc" }],
    columns: [
      { title: "Step", field: "step", width: phone ? 72 : 96, hozAlign: "right", formatter: text(String) },
      {
        title: "Event", field: "kind", width: phone ? 128 : 190,
        formatter: (cell) => {
          const kind = cell.getData().sort;
          return h("span", { class: `event ${kind}` }, h("span", { "aria-label": kind, role: "img" }, SIGNS[kind]), " ", cell.getValue().replaceAll("_", " "));
        },
      },
      { title: "What", field: "what", minWidth: 130, widthGrow: 3, formatter: text(String, "what"), variableHeight: true },
      { title: "Time", field: "time", width: 168, formatter: text(moment), responsive: 1 },
    ],
  });
  table.built = built(table);
  return table;
}
