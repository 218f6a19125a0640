// Elements, built from text alone: nothing a model says is ever read as HTML.

/** Return an element with these properties and children. `class` and `data-`/`aria-` names are attributes. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Return an SVG element with these attributes and children. */
export function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Return the element with this id. */
export const byId = (id) => document.getElementById(id);

/** Return a text's parts, commands and flags as code, which no line's end parts. */
export const withFlags = (text) =>
  text.split(/(bitwatt [a-z]+(?: MODEL)?(?: --[a-z-]+)*|--[a-z][a-z-]*)/).map((part, i) => (i % 2 ? make("code", { className: "flag" }, part) : part));

/** Mark a button as one that does nothing now. It keeps the focus, which `disabled` would drop. */
export const setDisabled = (button, isDisabled) => button.setAttribute("aria-disabled", String(isDisabled));

/** Return a span that marks a side by colour and by shape. */
export const markOf = (side) => make("span", { className: `mark ${side}`, "aria-hidden": "true" });
