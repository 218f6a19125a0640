// Runs measurements, one at a time: the load that a person sets, and the first quick look.

import { getJson } from "./api.js";
import { costReason, electricityReason } from "./cost.js";
import { byId, make, markOf, setDisabled, withFlags } from "./dom.js";
import { dollars, inOneUnit, joules, percent, rate, seconds, times, when } from "./format.js";
import { aboutRoofline, rooflineReason, rooflineShares } from "./roofline.js";
import { overHop } from "./pair.js";
import { gainOf, verdict } from "./statistics.js";
import { clockOf } from "./timing.js";
import { FIGURES, measure } from "./windows.js";

const QUICK = { kind: "quick", concurrency: 4, requests: 4, tokens: 8, warmups: 2, windows: 5, fitS: 5 };

const ROWS = [
  { key: "throughput", label: "Output tokens/s, all requests", show: rate },
  { key: "decode", label: "Decode tokens/s per request", show: rate },
  { key: "roofline", label: "Decode speed, share of own roofline", show: percent },
  { key: "ttft", label: "Time to first token", show: seconds },
  { key: "latency", label: "Latency of a request", show: seconds },
  { key: "energy", label: "Energy per token", show: joules },
  { key: "cost", label: "Rent per million tokens", show: dollars, lacks: "Not calculated" },
  { key: "electricity", label: "Electricity per million tokens", show: dollars, lacks: "Not calculated" },
];

/**
 * Return what measures. onChange is called when it begins and ends; onDone gets a result.
 * Only one measurement runs; a person's load takes the quick look's place.
 */
export function makeLoad({ onChange, onDone }) {
  let current = null;

  async function start(sides, plan) {
    const stop = new AbortController();
    let end;
    current = { plan, stop, ended: new Promise((resolve) => { end = resolve; }) };
    setDisabled(byId("load-stop"), false);
    onChange();
    let failure = null;
    try {
      const prompts = await getJson("/page/prompts.json");
      const result = await measure(sides, { ...plan, prompts }, stop.signal, report);
      showResult(result, sides);
      onDone(result);
    } catch (error) {
      failure = error;
      byId("load-status").textContent =
        error.name === "AbortError" ? "Stopped; nothing is concluded." : `Failed: ${error.message}`;
    }
    if (current.isRefused) failure = new Error("it was stopped");
    current = null;
    end();
    setDisabled(byId("load-stop"), true);
    onChange();
    return failure;
  }

  async function runForm(sides) {
    if (current?.plan.kind === "load") return;
    await giveWay();
    if (current) return;
    await start(sides, {
      kind: "load",
      concurrency: byId("load-concurrency").valueAsNumber,
      requests: byId("load-requests").valueAsNumber,
      tokens: byId("load-tokens").valueAsNumber,
      warmups: 1,
      windows: byId("load-windows").valueAsNumber,
      fitS: null,
    });
  }

  /** End the quick look, if it runs. */
  async function giveWay() {
    if (current?.plan.kind !== "quick") return;
    current.stop.abort();
    await current.ended;
  }

  function report(share, said) {
    const what = current.plan.kind === "quick" ? "A first quick look, a few seconds. " : "";
    byId("load-progress").value = share;
    byId("load-status").textContent = what + said;
  }

  byId("load-stop").addEventListener("click", () => {
    if (!current) return;
    current.isRefused = true;
    current.stop.abort();
  });
  return {
    runForm,
    giveWay,
    /** Return what went wrong, or null. */
    runQuick: (sides) => start(sides, QUICK),
    get kind() {
      return current?.plan.kind ?? null;
    },
    /** Return whether others call, as far as open choices tell. */
    isDisturbed: (models) => models.some((model) => model.num_open > current.plan.concurrency),
  };
}

/** Show a result's table, and in a line when it was measured and how. */
export function showResult(result, sides) {
  const { plan, figures } = result;
  const { a, b, gain } = figures.throughput;
  const what = plan.kind === "quick" ? "a first quick look, " : "";
  showTable(result, sides);
  byId("load-result").hidden = false;
  byId("load-progress").value = 1;
  byId("load-status").textContent =
    `Done: ${what}${when(result.at)}. ${b ? `${times(gain)} tokens a second` : rate(a.median)}.`;
}

/** Show a result's table, with what is known of the models by now. */
export function showTable(result, sides) {
  const isAgainstRoofline = rooflineShares(result.figures.decode, sides) !== null;
  byId("load-result").replaceChildren(
    makeTable(result, sides),
    ...(isAgainstRoofline ? [make("p", { className: "hint" }, aboutRoofline(sides))] : []),
  );
}

function makeTable({ plan, clock, figures, unavailable }, sides) {
  const names = [
    ...Object.entries(sides).map(([side, model]) => [markOf(side), model.name]),
    ...(sides.b ? [["Gain"], ["Pairs ranged"]] : []),
  ];
  const head = make("tr", { role: "row" }, make("th", { scope: "col", role: "columnheader" }, "Median [quartiles]"));
  for (const name of names) head.append(make("th", { scope: "col", role: "columnheader" }, ...name.map(copied)));
  const shown = { ...figures, roofline: rooflineShares(figures.decode, sides) };
  const reasons = {
    cost: costReason(sides),
    electricity: electricityReason(sides),
    roofline: Object.values(sides).map(rooflineReason).find(Boolean) ?? unavailable.decode,
    ...unavailable,
  };
  const rows = ROWS.map(({ key, label, show, lacks = "Unavailable" }) => {
    const cells = shown[key]
      ? cellsOf(shown[key], show, FIGURES[key]).map(({ parts, ...properties }, i) =>
          // A narrow page has no columns: each cell has its column's name with it.
          make("td", { ...properties, role: "cell" }, make("span", { className: "column", "aria-hidden": "true" }, ...names[i].map(copied)), ...parts))
      : [make("td", { className: "why", colSpan: names.length, role: "cell" }, ...withFlags(`${lacks}: ${reasons[key]}`))];
    return make("tr", { role: "row" }, make("th", { scope: "row", role: "rowheader" }, label), ...cells);
  });
  return make(
    "table",
    { role: "table" },
    make("caption", {}, captionOf(plan, clock, sides)),
    make("thead", { role: "rowgroup" }, head),
    make("tbody", { role: "rowgroup" }, ...rows),
  );
}

const copied = (part) => (part.cloneNode ? part.cloneNode() : part);

/** Return the cells of a figure: each model's, and of two that are compared the gain and its range. */
function cellsOf(figure, show, better) {
  const sides = [figure.a, figure.b].filter(Boolean);
  const medians = sides.map(({ median }) => median);
  const ratioOf = (x, y) => times(gainOf(x, y, better));
  const shown = figure.gain === undefined ? medians.map((median) => show(median)) : inOneUnit(...medians, show, ratioOf);
  const spreads = sides.map(({ low, high }, i) => ({
    parts: [shown[i], make("span", { className: "range" }, ` [${rangeOf(low, high, show, medians)}]`)],
  }));
  if (!figure.b) return spreads;
  if (figure.gain === undefined) return [...spreads, { className: "why alone", colSpan: 2, parts: ["none: each has its own roofline"] }];
  const said = verdict(figure);
  return [
    ...spreads,
    { className: said, parts: [`${times(figure.gain)} ${said}`] },
    { parts: [`${times(figure.low)} to ${times(figure.high)}`] },
  ];
}

/** Return quartiles in the unit of the medians beside them. */
function rangeOf(low, high, show, beside) {
  const [from, to] = [low, high].map((value) => show(value, { beside, isBare: true }));
  return `${from}–${to}`;
}

function captionOf(plan, clock, sides) {
  const what = plan.kind === "quick" ? "The first quick look, not the form above: " : "";
  return `${what}${plan.windows} ${sides.b ? "alternating " : ""}windows of ${plan.requests} requests, ${plan.concurrency} at once, ` +
    `${plan.tokens} tokens an answer; ${plan.warmups} warm-up window${plan.warmups > 1 ? "s" : ""}${sides.b ? " of each" : ""} dropped.` +
    (sides.b ? " A gain is the ratio of the medians, below 1× a loss; a pair is a window of each, one after the other." : "") +
    ` Times are ${clockOf(clock)}. ${clock === "server" || !sides.b ? "" : overHop(sides.b)}`.trimEnd();
}
