// What each engine holds, by kind: bars for the eye, a table with the numbers.

import { byId, make, makeSvg, markOf } from "./dom.js";
import { bytes } from "./format.js";

const WEIGHTS = [
  ["packed_weights_bytes", "Packed ternary weights"],
  ["embedding_bytes", "Embeddings"],
  ["other_weights_bytes", "Other weights"],
];
const KINDS = [...WEIGHTS, ["kv_cache_bytes", "KV cache"]];

const sum = (memory, kinds) => kinds.reduce((total, [kind]) => total + memory[kind], 0);

/** Return the bytes of a model's weights of every kind; null before its engine has said. */
export const weightBytes = (model) => (model.memory ? sum(model.memory, WEIGHTS) : null);

/** Return the bytes of all that serves a model; null where the system doesn't tell. */
export const processBytes = (model) =>
  model.device.startsWith("cuda") ? sum(model.memory, KINDS) : model.rss_anon_bytes;

let shown = null;
let processCells = {};

/** Show the bars and the table; the same figures leave them, and the focus in them, alone. */
export function showMemory(sides) {
  const known = Object.entries(sides).filter(([, model]) => model.memory);
  const now = JSON.stringify(known.map(([side, { name, memory }]) => [side, name, memory]));
  if (!known.length) return;
  if (now === shown) {
    showProcesses(known);
    return;
  }
  shown = now;
  byId("memory").replaceChildren(
    make("div", { className: "memory-groups" },
      makeGroup("Weights", known, WEIGHTS),
      makeGroup("Weights and KV cache", known, KINDS)),
    makeTable(known),
  );
  showProcesses(known);
}

function showProcesses(known) {
  const beside = known.map(([, model]) => model.rss_anon_bytes);
  for (const [side, model] of known) {
    const said = model.rss_anon_bytes === null ? "unknown" : bytes(model.rss_anon_bytes, { beside });
    if (processCells[side].textContent !== said) processCells[side].textContent = said;
  }
}

function makeGroup(title, known, kinds) {
  const beside = known.map(([, model]) => sum(model.memory, kinds));
  const widest = Math.max(...beside, 1);
  const rows = known.map(([side, model]) =>
    make(
      "div",
      { className: "memory-row" },
      make(
        "p",
        { className: "name" },
        make("span", {}, markOf(side), model.name),
        make("span", {}, bytes(sum(model.memory, kinds), { beside })),
      ),
      makeBar(side, model.memory, kinds, widest),
    ),
  );
  return make("div", {}, make("h3", {}, title), ...rows);
}

function makeBar(side, memory, kinds, widest) {
  const bar = makeSvg("svg", {
    class: `bar ${side}`,
    viewBox: "0 0 1000 10",
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  let x = 0;
  for (const [kind] of kinds) {
    const width = (memory[kind] / widest) * 1000;
    bar.append(makeSvg("rect", { x, y: 0, width, height: 10, class: `fill-${kind}` }));
    x += width;
  }
  return bar;
}

function makeTable(known) {
  const head = make("tr", {}, make("th", { scope: "col" }, "Kind"));
  for (const [side, model] of known) {
    head.append(make("th", { scope: "col" }, markOf(side), model.name));
  }
  const rows = KINDS.map(([kind, label]) => {
    const beside = known.map(([, model]) => model.memory[kind]);
    const swatches = known.map(([side]) => make("span", { className: `swatch ${side} fill-${kind}` }));
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, ...swatches, label),
      ...beside.map((held) => make("td", {}, bytes(held, { beside }))),
    );
  });
  processCells = Object.fromEntries(known.map(([side]) => [side, make("td")]));
  rows.push(make("tr", {}, make("th", { scope: "row" }, "Whole process, in the machine's memory"), ...Object.values(processCells)));
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
  const region = { className: "scroll", role: "region", tabIndex: 0, "aria-label": "Memory by kind" };
  return make("div", region, table);
}
