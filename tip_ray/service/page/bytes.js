// The bytes at each hop, against what they would be without selection.

import { fill, h, style } from "./dom.js";
import { bytes, percent } from "./format.js";
import { figures } from "./curves.js";

const mean = (values) => values.reduce((sum, value) => sum + (value ?? 0), 0) / Math.max(1, values.length);

export function bytesCard() {
  const lead = h("p", { class: "lead" });
  const body = h("tbody");
  const element = h("div", { class: "card wide", "data-chart": "bytes" },
    h("h3", {}, "Bytes by hop"), h("p", { class: "note" }, "Mean of a step"), lead,
    h("table", { class: "hops" },
      h("thead", { class: "hidden" }, h("tr", {}, ["hop", "bar", "a step"].map((name) => h("th", { scope: "col" }, name)))),
      body));
  return { element, update: (status, metrics) => draw(lead, body, status, metrics) };
}

function draw(lead, body, status, metrics) {
  const shares = status.bytes_unpruned ? 1 - status.bytes_shipped / status.bytes_unpruned : null;
  fill(lead, h("b", { "data-field": "saved" }, percent(shares)), " of the bytes to the learner never travelled: ",
    h("b", { "data-field": "shipped" }, bytes(status.bytes_shipped)), " instead of ",
    h("b", { "data-field": "unpruned" }, bytes(status.bytes_unpruned)), " in all.");
  const rows = figures.hops.map((hop) => ({ ...hop, value: mean(metrics[hop.column] ?? []) }));
  const widest = Math.max(...rows.filter(({ weights }) => !weights).map(({ value }) => value), 1);
  fill(body, rows.map(({ label, value, unpruned, weights, column }) =>
    h("tr", { class: unpruned ? "unpruned" : "" },
      h("th", { scope: "row" }, label),
      h("td", {}, weights ? h("span", { class: "soft small aside" }, "the model itself, whatever is kept")
        : style(h("span", { class: "hop" }), "--w", `${(100 * value) / widest}%`)),
      h("td", { class: "num", "data-hop": column }, bytes(value)))));
}
