// Elements out of text. Nothing that comes from the server is ever parsed as HTML.

/**
 * An element with attributes and children. A function is a listener (`onclick`), true an empty
 * attribute; null, undefined and false are left out. Children are nodes or text.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value);
    }
  }
  return fill(element, ...children);
}

/** Put `children` into `element` in place of what it has. */
export function fill(element, ...children) {
  const shown = children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false);
  element.replaceChildren(...shown);
  return element;
}

/** Set text only where it differs: a screen reader then speaks changes alone. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A CSS variable of one element; style attributes are barred by the policy, properties are not. */
export function style(element, name, value) {
  element.style.setProperty(name, value);
  return element;
}

/** A swatch in the colour of a line, a run or a quadrant. */
export function chip(colour, kind = "") {
  return style(h("span", { class: `chip ${kind}`, "aria-hidden": "true" }), "--c", colour);
}

/** A group of radio buttons that looks like one switch; `choose` gets the chosen value. */
export function choice(label, options, chosen, choose) {
  const name = `choice-${(choice.count = (choice.count ?? 0) + 1)}`;
  const parts = Object.entries(options).map(([value, text]) =>
    h("label", {}, h("input", {
      type: "radio", name, value, checked: value === chosen, onchange: () => choose(value),
    }), h("span", {}, text)));
  return h("fieldset", { class: "choice" }, h("legend", {}, label), parts);
}

/** When a Tabulator may be given rows. Its scrolling part, a stop for the keyboard, becomes the grid's body. */
export function built(table) {
  return new Promise((done) => table.on("tableBuilt", () => {
    const holder = table.element.querySelector(".tabulator-tableholder");
    holder.setAttribute("role", "rowgroup");
    holder.setAttribute("aria-label", "rows");
    holder.querySelector(".tabulator-table").setAttribute("role", "presentation");
    table.element.removeAttribute("aria-owns");
    done();
  }));
}
