// Five ratios, each with where it comes from; a loss is shown as a loss. Of one model alone, figures.

import { costReason, electricityReason } from "./cost.js";
import { byId, make, setDisabled, withFlags } from "./dom.js";
import { amountOf, bytes, dollars, inOneUnit, joules, percent, rate, times, when } from "./format.js";
import { processBytes, weightBytes } from "./memory.js";
import { isCostTwin, whyNoQuality } from "./pair.js";
import { gainOf, verdict } from "./statistics.js";
import { clockOf } from "./timing.js";
import { FIGURES } from "./windows.js";

const TILES = [
  { key: "memory", title: "Memory", of: memoryOf, more: "more", less: "less", better: "lower" },
  { key: "speed", title: "Speed", of: speedOf, more: "more tokens a second", less: "fewer tokens a second", better: "higher" },
  { key: "quality", title: "Quality", of: qualityOf },
  { key: "energy", title: "Energy", of: energyOf, more: "more energy", less: "less energy", better: "lower" },
  { key: "cost", title: "Cost", of: costOf, more: "more expensive", less: "cheaper", better: "lower" },
];
const LOADING = { badge: "loading", why: "an engine still loads" };

/** Return the tiles; each show replaces what changed. onMeasure is called when one is to be. */
export function makeHeadline(onMeasure) {
  const tiles = TILES.map((tile) => ({ ...makeTile(tile, onMeasure), of: tile.of }));
  byId("headline").append(...tiles.map((tile) => tile.root));
  return {
    /** measuring: the kind of measurement that runs, or null; failure: of the quick look. */
    show(sides, result, measuring, failure, isBusy) {
      for (const tile of tiles) tile.show({ ...tile.of(sides, result, failure), measuring, isBusy });
    },
  };
}

const single = (gain) => ({ gain, low: gain, high: gain });
const nbsp = "\u00a0";

/** Return both values, so shown that what is said of them follows. */
const against = (a, b, show, better) =>
  inOneUnit(a, b, show, (x, y) => times(gainOf(x, y, better)) + amountOf(gainOf(x, y, better), better)).join(" against ");

/** Return a gain of b's value over a's, or a's own value where there is no b. */
const ratio = (a, b, show, label) =>
  b === undefined
    ? { text: show(a), label }
    : { figure: single(b / a), values: against(a, b, show, "lower"), label };

function memoryOf({ a, b }) {
  const both = b ? [a, b] : [a];
  if (both.some((model) => !model?.memory)) return LOADING;
  const isOnGpu = both.some((model) => model.device.startsWith("cuda"));
  const [weightsOfA, weightsOfB] = both.map(weightBytes);
  const [wholeOfA, wholeOfB] = both.map(processBytes);
  const gains = [ratio(weightsOfA, weightsOfB, bytes, weightsOfB > weightsOfA ? "smaller weights" : "Weights")];
  if (wholeOfA !== null && wholeOfB !== null) {
    gains.push(ratio(wholeOfA, wholeOfB, bytes, wholeOfB > wholeOfA ? `smaller ${isOnGpu ? "with KV cache" : "process"}` : isOnGpu ? "With KV cache" : "Whole process"));
  }
  return {
    gains,
    badge: "measured",
    foot: isOnGpu
      ? "As held on the GPU; the KV cache is as large as it is set to be."
      : "The process adds the KV cache, as large as it is set to be, and Python with its libraries.",
  };
}

function footOf({ plan, at, clock }, figure, show) {
  const spread = figure.b
    ? `pairs from ${times(figure.low)} to ${times(figure.high)}`
    : `quartiles ${show(figure.a.low)} to ${show(figure.a.high)}`;
  const look = plan.kind === "quick" ? "First quick look" : "Load";
  return `${look}, ${when(at)}: n${nbsp}=${nbsp}${plan.windows} windows of ${plan.requests} requests, ${plan.concurrency} at once, ${plan.tokens} tokens each; ${spread}, ${clockOf(clock)}.`;
}

function measuredTile(result, key, show) {
  const figure = result.figures[key];
  const { a, b } = figure;
  const gain = b
    ? { figure, values: against(a.median, b.median, show, FIGURES[key]) }
    : { text: show(a.median) };
  return {
    gains: [gain],
    badge: result.plan.kind === "quick" ? "quick look" : "measured",
    canMeasure: true,
    foot: footOf(result, figure, show),
  };
}

const unmeasured = (why, foot) => ({ badge: "not measured yet", why, foot, canMeasure: true });
const unavailable = (why, foot) => ({ badge: "unavailable", why, foot });

function speedOf(sides, result, failure) {
  if (result?.figures.throughput) return measuredTile(result, "throughput", rate);
  const work = sides.b ? "equal work to each model in turns" : "tokens a second under load";
  return unmeasured(failure ? `the first quick look failed: ${failure}` : work);
}

function qualityOf({ a, b }, result) {
  const both = b ? [a, b] : [a];
  const reason = whyNoQuality(both);
  if (reason) return agreementOf(b, result, reason);
  const show = (value) => `${value} bits/byte`;
  const [ofA, ofB] = both.map((model) => model.quality.bits_per_byte);
  return {
    gains: [b ? lossOf(ofA, ofB, show) : { text: show(ofA) }],
    badge: `from the model card${b ? "s" : ""}`,
    foot: `Of held-out text, fewer is better. Source: ${b ? "the models' cards" : "its card"}, README.md.${
      isCostTwin(a, b) ? " The twin has the same weights: rounding apart, it answers the same." : ""
    }`,
  };
}

/** Return in percent how much worse a's loss is than b's: a ratio of losses reads as a share kept. */
function lossOf(a, b, show) {
  const values = `${show(a)} against ${show(b)}`;
  if (a === b) return { text: "no difference", values };
  const isWorse = a > b;
  return {
    text: `${percent(Math.abs(a / b - 1))} ${isWorse ? "worse" : "better"}`,
    word: isWorse ? "worse" : "better",
    said: `${isWorse ? "more" : "fewer"} bits for the same text`,
    values,
  };
}

/** Return the tile of how far the answers agree, where nothing is known of either's quality. */
function agreementOf(b, result, reason) {
  const foot = `Bits/byte are unknown: ${reason}.`;
  if (!b) return { badge: "unknown", why: `unknown: ${reason}` };
  if (!result?.agreement) return unmeasured("how far the answers to the same prompts agree", foot);
  const { share, n } = result.agreement;
  return {
    gains: [{ text: percent(share), said: "agreement of the answers" }],
    badge: result.plan.kind === "quick" ? "quick look" : "measured",
    canMeasure: true,
    foot: `Of the text until the greedy answers to the same prompts part, ${when(result.at)}: n${nbsp}=${nbsp}${n} answers. ${foot}`,
  };
}

function energyOf(sides, result) {
  if (result?.figures.energy) return measuredTile(result, "energy", joules);
  const both = Object.values(sides);
  const [ofA, ofB] = both.map((model) => model.energy.estimated_arithmetic_joules_per_token);
  const [shownA, shownB] = ofA && ofB ? inOneUnit(ofA, ofB, joules, (x, y) => times(y / x)) : [];
  const amount = ofA && (ofB ? `${times(ofB / ofA)}${ofB > ofA ? " less" : ""} (${shownA} against ${shownB} a token)` : `${joules(ofA)} a token`);
  const foot = amount && (ofB || both.length === 1)
    ? `${amount} by the papers' joules of an operation at 7 nm, not this machine's; memory traffic, which takes most, is left out.`
    : "";
  const reason = both.map((model) => model.energy.reason).find(Boolean);
  const tile = reason
    ? unavailable(`can't be measured, because ${reason}`, foot)
    : unmeasured(result?.unavailable.energy ?? `joules a token, ${sides.b ? "over equal work" : "under load"}`, foot);
  return { ...tile, isEstimate: Boolean(foot) };
}

function costOf(sides, result) {
  const rent = result?.figures.cost;
  const electricity = result?.figures.electricity;
  const kwh = Object.values(sides).map((model) => model.prices.usd_per_kwh).find((price) => price !== null);
  const reason = electricityReason(sides);
  let more = "";
  if (electricity) {
    const { a, b } = electricity;
    const shown = b ? against(a.median, b.median, dollars, "lower") : dollars(a.median);
    more = `Electricity at ${dollars(kwh)} a kWh: ${shown}.`;
  } else if (kwh !== undefined && reason) {
    more = `Electricity at ${dollars(kwh)} a kWh is unknown: ${reason}.`;
  }
  if (rent) {
    const tile = measuredTile(result, "cost", dollars);
    return { ...tile, foot: `Rent per million tokens, as it is set. ${more} ${tile.foot}` };
  }
  if (electricity) {
    const tile = measuredTile(result, "electricity", dollars);
    return { ...tile, foot: `Electricity per million tokens, without rent: ${costReason(sides) ?? "rent is not measured"}. ${tile.foot}` };
  }
  const unset = costReason(sides);
  if (unset && !(kwh !== undefined && !reason)) return unavailable(`Not calculated: ${unset}`, more);
  return unmeasured("dollars per million tokens at the prices that are set", more);
}

function makeTile({ key, title, more, less, better }, onMeasure) {
  const badge = make("span", { className: "badge" });
  const gains = make("div", { className: "gains" });
  const why = make("p", { className: "why" });
  const button = make("button", { type: "button", className: "measure", hidden: true });
  const foot = make("p", { className: "foot" });
  button.addEventListener("click", () => onMeasure());
  const root = make(
    "article",
    { className: "card tile", id: `tile-${key}` },
    make("div", { className: "tile-head" }, make("h3", {}, title), badge),
    gains,
    why,
    button,
    foot,
  );
  let shown = null;

  /** Show {gains, badge, foot}, or {why, badge, foot} where there is no figure. A gain: see ratio. */
  function show(now) {
    const next = JSON.stringify(now);
    if (next === shown) return;
    shown = next;
    const isFirst = now.canMeasure && now.measuring && !now.gains;
    badge.textContent = isFirst ? "measuring" : now.badge;
    badge.className = `badge ${now.gains ? "figure" : "none"}`;
    gains.replaceChildren(...(now.gains ?? [{ text: "–", isNone: true }]).map(makeGain));
    const isQuick = isFirst && now.measuring === "quick";
    why.replaceChildren(...withFlags(isQuick ? "a first quick look, a few seconds" : now.why ?? ""));
    button.hidden = !now.canMeasure;
    button.textContent = now.measuring ? "Measuring…" : now.gains ? "Measure again" : "Measure";
    button.setAttribute("aria-label", `${button.textContent}: ${title}`);
    setDisabled(button, now.isBusy);
    foot.replaceChildren(
      ...(now.isEstimate ? [make("span", { className: "badge" }, "arithmetic, estimated")] : []),
      ...withFlags(now.foot ?? ""),
    );
  }

  function makeGain({ figure, text, word = "alone", values, label, said, isNone }) {
    const mark = isNone ? "none" : figure ? verdict(figure) : word;
    const words = figure ? inWords(figure) : said;
    return make(
      "div",
      {},
      make("p", { className: `gain ${mark}` }, figure ? times(figure.gain) : text),
      ...(label ? [make("p", { className: "label" }, label)] : []),
      ...(words ? [make("p", { className: "said" }, words)] : []),
      // A line ends before "against", and not between a number and its unit.
      ...(values ? [make("p", { className: "values" }, values.replace(/ (?!against)/g, nbsp))] : []),
    );
  }

  function inWords(figure) {
    const word = verdict(figure);
    if (word === "equal") return "no difference";
    const unclear = word === "unclear" ? "; the windows disagree" : "";
    const name = figure.gain > 1 === (better === "lower") ? less : more;
    return `${amountOf(figure.gain, better)} ${name}${unclear}`.trim();
  }

  return { root, show };
}
