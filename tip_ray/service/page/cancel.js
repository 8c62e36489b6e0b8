// Ask a run to stop, after asking the person.

import { api } from "./api.js";
import { fill, h } from "./dom.js";

/** A button and its dialog; `done(line)` gets what the server made of it. */
export function cancelButton(run, done) {
  const dialog = h("dialog", { "aria-labelledby": "cancel-title" });
  const failure = h("p", { class: "error", role: "alert" });
  const yes = h("button", { type: "button", class: "danger", onclick: go }, "Cancel the run");
  fill(dialog, h("h2", { id: "cancel-title" }, `Cancel ${run}?`),
    h("p", {}, "It finishes its step, saves a checkpoint and stops. The same run id goes on from there later."),
    failure,
    h("div", { class: "buttons" }, h("button", { type: "button", onclick: () => dialog.close() }, "Let it run"), yes));

  async function go() {
    yes.disabled = true;
    failure.textContent = "";
    try {
      const { cancelling, state } = await api.cancel(run);
      dialog.close();
      done(cancelling ? "Asked to stop: it ends after its step and a checkpoint." : `Nothing to cancel: the run is ${state}.`);
    } catch (error) {
      failure.textContent = error.message;
    } finally {
      yes.disabled = false;
    }
  }

  const button = h("button", { type: "button", class: "danger quiet", onclick: () => dialog.showModal() }, "Cancel run…");
  return { button, dialog };
}
