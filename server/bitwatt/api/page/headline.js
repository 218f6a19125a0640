// Four ratios, each with where it comes from; a loss is shown as a loss.

import { byId, make } from "./dom.js";
import { bytes, digits, dollars, joules, rate, times } from "./format.js";
import { weightBytes } from "./memory.js";
import { verdict } from "./statistics.js";

const TILES = [
  { key: "memory", title: "Memory", more: "more memory", less: "less memory", better: "lower" },
  { key: "speed", title: "Tokens a second", more: "more tokens", less: "fewer tokens", better: "higher" },
  { key: "energy", title: "Energy a token", more: "more energy", less: "less energy", better: "lower" },
  { key: "cost", title: "$ / 1M tokens", more: "more expensive", less: "cheaper", better: "lower" },
];

/** Return the tiles; each show replaces what changed. */
export function makeHeadline() {
  const tiles = Object.fromEntries(TILES.map((tile) => [tile.key, makeTile(tile)]));
  byId("headline").append(...Object.values(tiles).map((tile) => tile.root));

  return {
    show(sides, asked, load) {
      tiles.memory.show(memoryOf(sides));
      tiles.speed.show(speedOf(asked, load));
      tiles.energy.show(energyOf(sides, load));
      tiles.cost.show(costOf(sides, load));
    },
  };
}

const single = (gain) => ({ gain, low: gain, high: gain });

function memoryOf({ a, b }) {
  if (!a || !b) return { why: "needs two models: bitwatt serve --compare" };
  const [ofA, ofB] = [weightBytes(a), weightBytes(b)];
  if (ofA === null || ofB === null) return { why: "an engine still loads" };
  return {
    figure: single(ofB / ofA),
    source: "measured",
    values: `${bytes(ofA)} against ${bytes(ofB)}`,
    foot: "Weights as the engines hold them, without the KV cache.",
  };
}

function loadFoot({ plan }) {
  return `n\u00a0=\u00a0${plan.windows} windows of ${plan.requests} requests, ${plan.concurrency} at once.`;
}

function against(figure, show) {
  return `${show(figure.a.median)} against ${show(figure.b.median)}`;
}

function speedOf(asked, load) {
  const figure = load?.figures.throughput;
  if (figure) {
    return { figure, source: "measured", values: against(figure, rate), foot: loadFoot(load) };
  }
  if (asked?.a?.decode && asked?.b?.decode) {
    return {
      figure: single(asked.a.decode / asked.b.decode),
      source: "measured",
      values: `${rate(asked.a.decode)} against ${rate(asked.b.decode)}, decode`,
      foot: "n\u00a0=\u00a01 prompt, both models at once on this machine. The load measures them apart.",
    };
  }
  const isTooQuick = asked?.a?.numTokens && asked?.b?.numTokens;
  return {
    why: isTooQuick
      ? "the answers came in too few pieces to be timed: run the load"
      : "not measured yet: ask both, or run the load",
  };
}

function energyOf({ a, b }, load) {
  const figure = load?.figures.energy;
  if (figure) {
    return { figure, source: "measured", values: against(figure, joules), foot: loadFoot(load) };
  }
  const [ofA, ofB] = [a, b].map((model) => model?.energy.arithmetic_joules_per_token);
  const why = a?.energy.reason ?? b?.energy.reason ?? load?.unavailable.energy ?? "not measured yet: run the load";
  const foot = ofA && ofB
    ? `${times(ofB / ofA)} by the papers' arithmetic alone (${joules(ofA)} against ${joules(ofB)} a token); memory traffic, which takes most, is left out.`
    : "";
  return { why, foot, isEstimate: Boolean(foot) };
}

function costOf({ a, b }, load) {
  const figure = load?.figures.cost;
  if (figure) {
    return { figure, source: "measured", values: against(figure, dollars), foot: `At the rent that is set, for this load. ${loadFoot(load)}` };
  }
  return { why: load?.unavailable.cost ?? costReason(a, b) };
}

const costReason = (a, b) => (a?.hasRent || b?.hasRent ? "not measured yet: run the load" : "no rent is set (--usd-per-hour)");

function makeTile({ key, title, more, less, better }) {
  const badge = make("span", { className: "badge" });
  const gain = make("p", { className: "gain" });
  const said = make("p", { className: "said" });
  const values = make("p", { className: "values" });
  const foot = make("p", { className: "foot" });
  const root = make(
    "article",
    { className: "card tile", id: `tile-${key}` },
    make("div", { className: "tile-head" }, make("h3", {}, title), badge),
    gain,
    said,
    values,
    foot,
  );
  let shown = null;

  /** Show {figure, source, values, foot}, or {why, foot} where there is no figure. */
  function show(now) {
    const next = JSON.stringify(now);
    if (next === shown) return;
    shown = next;
    const { figure, source } = now;
    const kind = figure ? source : "unavailable";
    badge.className = `badge ${kind}`;
    badge.textContent = kind;
    gain.className = `gain ${figure ? verdict(figure) : "none"}`;
    gain.textContent = figure ? times(figure.gain) : "–";
    said.className = figure ? "said" : "said why";
    said.textContent = figure ? inWords(figure.gain, verdict(figure)) : now.why;
    values.textContent = now.values ?? "";
    foot.replaceChildren(
      ...(now.isEstimate ? [make("span", { className: "badge estimated" }, "estimated")] : []),
      now.foot ?? "",
    );
  }

  function inWords(value, word) {
    if (word === "equal") return "no difference";
    const unclear = word === "unclear" ? "; the windows disagree" : "";
    const change = better === "lower" ? 1 - 1 / value : value - 1;
    const name = change > 0 === (better === "lower") ? less : more;
    return `${digits(Math.abs(change) * 100)}% ${name}${unclear}`;
  }

  return { root, show };
}
