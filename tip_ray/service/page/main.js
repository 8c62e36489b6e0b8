// The frame around the views: address, token, and whether the server still answers.

import { api, token } from "./api.js";
import { showCompare } from "./compare.js";
import { fill, h, say } from "./dom.js";
import { showRun } from "./run.js";
import { showRuns } from "./runs.js";

const main = document.getElementById("main");
const crumbs = document.getElementById("crumbs");
const pulse = document.getElementById("pulse");
const forget = document.getElementById("forget");
let stop = () => {};

/** `#/`, `#/runs/<id>`, `#/compare/<id>,<id>` -> what to show and where that is. */
function route() {
  const [kind, names = ""] = location.hash.replace(/^#\/?/, "").split("/");
  const list = names.split(",").filter(Boolean);
  if (kind === "runs" && list.length === 1) {
    return { title: list[0], crumb: list[0], show: (heard) => showRun(main, list[0], heard) };
  }
  if (kind === "compare" && list.length) {
    return { title: "compare", crumb: "Compare", show: (heard) => showCompare(main, list, heard) };
  }
  return { title: "runs", crumb: null, show: (heard) => showRuns(main, heard) };
}

function show() {
  stop();
  stop = () => {};
  forget.hidden = !token.get();
  if (!token.get()) return askForToken("");
  const { title, crumb, show: open } = route();
  document.title = `${title} · tip-ray`;
  const here = crumb ? h("span", { "aria-current": "page" }, crumb) : null;
  fill(crumbs, crumb ? [h("a", { href: "#/" }, "Runs"), h("span", { "aria-hidden": "true" }, "›"), here] : []);
  scrollTo(0, 0);
  fill(main, h("p", { class: "note" }, "Loading…"));
  stop = open(heard);
  return undefined;
}

/** What became of the last question to the server. */
function heard(error) {
  if (error?.status === 401) {
    lock("The server no longer takes this token.");
  } else if (error) {
    pulse.className = "pulse bad";
    say(pulse, error.message);
    if (error.status === 404 && !main.querySelector(".run .tile, .tabulator")) fill(main, notFound(error));
  } else {
    pulse.className = "pulse good";
    say(pulse, "up to date");
  }
}

function notFound(error) {
  stop();
  return h("div", { class: "card narrow" }, h("h1", {}, "Not here"), h("p", {}, error.message), h("p", {}, h("a", { href: "#/" }, "All runs")));
}

function lock(line) {
  stop();
  stop = () => {};
  token.forget();
  askForToken(line);
}

function askForToken(line) {
  document.title = "tip-ray";
  forget.hidden = true;
  fill(crumbs);
  say(pulse, "");
  const field = h("input", { type: "password", id: "token", name: "token", required: true, autocomplete: "off", spellcheck: "false" });
  const failure = h("p", { class: "error", role: "alert" }, line);
  const go = h("button", { type: "submit", class: "primary" }, "Open");
  const form = h("form", { class: "card narrow token", onsubmit: (event) => { event.preventDefault(); tryToken(field, failure, go); } },
    h("img", { src: "/page/mark.svg", alt: "", width: 44, height: 44 }),
    h("h1", {}, "tip-ray status"),
    h("label", { for: "token" }, "Token"), field, go, failure,
    h("p", { class: "note" }, "tip-ray serve prints it, or reads it from --token-file. It stays in this tab and goes to this server alone."));
  fill(main, form);
  field.focus();
}

/** Keep the token if the server takes it; else say why not. */
async function tryToken(field, failure, go) {
  const given = field.value.trim();
  if (!/^[\x21-\x7e]+$/.test(given)) { // no header can carry it
    failure.textContent = "Wrong token: letters, digits and signs are expected, no blanks.";
    return;
  }
  go.disabled = true;
  token.set(given);
  try {
    await api.runs(1);
    show();
  } catch (error) {
    token.forget();
    failure.textContent = error.status === 401 ? "Wrong token: the server does not take it." : error.message;
    field.select();
  } finally {
    go.disabled = false;
  }
}

forget.addEventListener("click", () => lock(""));
addEventListener("hashchange", show);
show();
