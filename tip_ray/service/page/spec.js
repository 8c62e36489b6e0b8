// A run's resolved spec: as cards by section, as key facts, and as differences between runs.

import { h } from "./dom.js";
import { plain } from "./format.js";

const NAMES = new Set(["name", "run_root"]); // differ between any two runs

/** `{a: {b: 1}}` as a map `a.b` -> 1; lists stay whole unless they hold objects. */
export function flat(value, path = "", found = new Map()) {
  if (value !== null && typeof value === "object" && (!Array.isArray(value) || value.some((v) => typeof v === "object"))) {
    for (const [key, inner] of Object.entries(value)) flat(inner, path ? `${path}.${key}` : key, found);
  } else {
    found.set(path, value);
  }
  return found;
}

/** The whole spec; sections side by side, single values first. */
export function specCards(spec) {
  const sections = Object.entries(spec).filter(([, value]) => value !== null && typeof value === "object");
  const single = Object.fromEntries(Object.entries(spec).filter(([, value]) => value === null || typeof value !== "object"));
  return h("div", { class: "spec" }, section("run", single), sections.map(([name, value]) => section(name, value)));
}

function section(name, value) {
  const rows = [...flat(value)].filter(([path]) => path !== "");
  if (!rows.length) rows.push(["none", null]);
  return h("div", { class: "card" }, h("h3", {}, name), h("dl", {}, rows.map(([path, inner]) =>
    h("div", {}, h("dt", {}, path), h("dd", { "data-spec": name === "run" ? path : `${name}.${path}` }, plain(inner))))));
}

/** Fields in which `specs` differ: [path, values]. */
export function differences(specs) {
  const flats = specs.map((spec) => flat(spec));
  const paths = [...new Set(flats.flatMap((one) => [...one.keys()]))].filter((path) => !NAMES.has(path));
  return paths
    .map((path) => [path, flats.map((one) => one.get(path))])
    .filter(([, values]) => new Set(values.map((value) => JSON.stringify(value))).size > 1);
}
