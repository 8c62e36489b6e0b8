// What a run's state and health look like. A silent run is never shown as simply RUNNING.

import { h } from "./dom.js";
import { age } from "./format.js";

// A sign beside each word, so that colour is not the only difference.
const SIGNS = {
  PENDING: "◌", STARTING: "◔", RUNNING: "●", RECOVERING: "↻",
  SUCCEEDED: "✓", FAILED: "✕", CANCELLED: "■", STALE: "▲", LOST: "✕",
};

/** One word: the state, or STALE or LOST where the driver has fallen silent. */
export function word(status) {
  if (status.health === "stale") return "STALE";
  return status.health === "lost" ? "LOST" : status.state;
}

/** What the word leaves out: how long a driver has been silent, what a run waits for. */
export function detail(status) {
  if (status.health === "stale" || status.health === "lost") {
    return `was ${status.state}, silent for ${age(status.heartbeat_age_s)}`;
  }
  return status.waiting_for ? `waits for ${status.waiting_for}` : "";
}

/** The word in a coloured pill. */
export function badge(status) {
  const name = word(status);
  const sign = h("span", { class: "sign", "aria-hidden": "true" }, SIGNS[name] ?? "");
  return h("span", { class: `badge ${name.toLowerCase()}` }, sign, name);
}

export const isActive = (status) => status.health !== "ended";
export const isTrouble = (status) =>
  status.state === "FAILED" || status.health === "stale" || status.health === "lost";

/** Seconds since 1970 at the server when it made `status`. */
export const serverTime = (status) => status.heartbeat_at + status.heartbeat_age_s;

/** How long a run has taken so far, or took. */
export function elapsed(status) {
  const end = status.health === "ended" ? status.updated_at : serverTime(status);
  return end - status.started_at;
}
