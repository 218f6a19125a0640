// What each engine holds, by kind: bars for the eye, a table with the numbers.

import { byId, make, makeSvg, markOf } from "./dom.js";
import { bytes } from "./format.js";

// The same matrices on both sides: what ternary packs is part of a dense model's "other" weights.
const linearBytes = ({ linear_bytes: linear, memory }) => linear ?? memory.packed_weights_bytes;

const WEIGHTS = [
  { kind: "linear", label: linearLabel, bytesOf: linearBytes },
  { kind: "embedding", label: () => "Embeddings", bytesOf: ({ memory }) => memory.embedding_bytes },
  {
    kind: "rest",
    label: (models) => (areLinearKnown(models) ? "Norms, biases and the rotary table" : "Other weights"),
    bytesOf: (model) => model.memory.packed_weights_bytes + model.memory.other_weights_bytes - linearBytes(model),
  },
];
const KINDS = [...WEIGHTS, { kind: "kv", label: () => "KV cache", bytesOf: ({ memory }) => memory.kv_cache_bytes }];

const areLinearKnown = (models) => models.every((model) => typeof model.linear_bytes === "number");
const isOnGpu = (model) => model.device.startsWith("cuda");

function linearLabel(models) {
  if (!areLinearKnown(models)) return "Packed ternary weights";
  const forms = models.map((model) => (model.weights === "ternary" ? "packed ternary" : model.dtype));
  return `Linear layers' matrices (${[...new Set(forms)].join(" or ")})`;
}

const sum = (model, kinds) => kinds.reduce((total, { bytesOf }) => total + bytesOf(model), 0);

/** Return the bytes of a model's weights of every kind; null before its engine has said. */
export const weightBytes = (model) => (model.memory ? sum(model, WEIGHTS) : null);

/** Return the bytes of all that serves a model; null where the system doesn't tell. */
export const processBytes = (model) => (isOnGpu(model) ? sum(model, KINDS) : model.rss_anon_bytes);

/** Return what its process holds beyond the kinds; null where that can't be told. */
function beyondBytes(model) {
  if (isOnGpu(model) || model.rss_anon_bytes === null) return null;
  const beyond = model.rss_anon_bytes - sum(model, KINDS);
  return beyond > 0 ? beyond : null; // a KV cache that nothing was written to is not in memory yet
}

let shown = null;
/** What of the process's memory moves: a row's cells by side. */
let moving = [];

/** Show the bars and the table; the same figures leave them, and the focus in them, alone. */
export function showMemory(sides) {
  const known = Object.entries(sides).filter(([, model]) => model.memory);
  const now = JSON.stringify(known.map(([side, { name, memory, linear_bytes: linear }]) => [side, name, memory, linear]));
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
  for (const { cells, bytesOf } of moving) {
    const held = known.map(([, model]) => bytesOf(model));
    for (const [i, [side]] of known.entries()) {
      const said = held[i] === null ? "unknown" : bytes(held[i], { beside: held });
      if (cells[side].textContent !== said) cells[side].textContent = said;
    }
  }
}

function makeGroup(title, known, kinds) {
  const beside = known.map(([, model]) => sum(model, kinds));
  const widest = Math.max(...beside, 1);
  const rows = known.map(([side, model]) =>
    make(
      "div",
      { className: "memory-row" },
      make(
        "p",
        { className: "name" },
        make("span", {}, markOf(side), model.name),
        make("span", {}, bytes(sum(model, kinds), { beside })),
      ),
      makeBar(side, model, kinds, widest),
    ),
  );
  return make("div", {}, make("h3", {}, title), ...rows);
}

function makeBar(side, model, kinds, widest) {
  const bar = makeSvg("svg", {
    class: `bar ${side}`,
    viewBox: "0 0 1000 10",
    preserveAspectRatio: "none",
    "aria-hidden": "true",
  });
  let x = 0;
  for (const { kind, bytesOf } of kinds) {
    const width = (bytesOf(model) / widest) * 1000;
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
  const models = known.map(([, model]) => model);
  const rows = KINDS.map(({ kind, label, bytesOf }) => {
    const beside = models.map(bytesOf);
    const swatches = known.map(([side]) => make("span", { className: `swatch ${side} fill-${kind}` }));
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, ...swatches, label(models)),
      ...beside.map((held) => make("td", {}, bytes(held, { beside }))),
    );
  });
  moving = [
    { label: "Python, its libraries and working memory (the difference)", bytesOf: beyondBytes },
    { label: "Whole process, in the machine's memory", bytesOf: (model) => model.rss_anon_bytes },
  ]
    .slice(models.some(isOnGpu) ? 1 : 0) // on a GPU the kinds are no part of the process's memory
    .map((row) => ({ ...row, cells: Object.fromEntries(known.map(([side]) => [side, make("td")])) }));
  rows.push(...moving.map(({ label, cells }) => make("tr", {}, make("th", { scope: "row" }, label), ...Object.values(cells))));
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
  const region = { className: "scroll", role: "region", tabIndex: 0, "aria-label": "Memory by kind" };
  return make("div", region, table);
}
