// The numbers at the head of a run.

import { fill, h } from "./dom.js";
import { bytes, count, duration, number, percent, saved } from "./format.js";
import { elapsed } from "./state.js";

/** Tiles: [label, value, what stands beside it, key]; keys name them for tests and styles. */
function facts(status) {
  const before = status.initial_accuracy === null ? "" : `${percent(status.initial_accuracy)} before`;
  const shipped = status.bytes_unpruned ? `${bytes(status.bytes_shipped)} of ${bytes(status.bytes_unpruned)}` : "";
  return [
    ["accuracy", percent(status.accuracy), before, "accuracy"],
    ["loss", number(status.loss), "nats", "loss"],
    ["tokens kept", percent(status.kept_fraction), `${count(status.tokens_kept)} of ${count(status.tokens_generated)}`, "kept"],
    ["bytes saved", percent(saved(status)), shipped, "saved"],
    ["learner", count(status.learner_tokens_per_s), "tokens/s", "speed"],
    ["time", duration(elapsed(status)), "", "time"],
  ];
}

/** Troubles that were counted; zeros are left out. */
function troubles(status) {
  const counts = {
    recoveries: status.recoveries, "rollouts quarantined": status.rollouts_quarantined,
    "updates skipped": status.updates_skipped, "prompts skipped": status.prompts_skipped,
  };
  return Object.entries(counts).filter(([, n]) => n > 0).map(([name, n]) => `${count(n)} ${name}`);
}

export function drawTiles(element, status) {
  const tiles = facts(status).map(([label, value, beside, key]) =>
    h("div", { class: "tile" }, h("span", { class: "label" }, label),
      h("b", { "data-field": key }, value), h("span", { class: "beside" }, beside)));
  fill(element, tiles);
}

export function drawTroubles(element, status) {
  const found = troubles(status);
  element.hidden = !found.length;
  element.textContent = found.join(" · ");
}
