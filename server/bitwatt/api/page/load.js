// Equal work to each model in alternating windows, timed from the streams themselves.

import { getJson, streamEvents } from "./api.js";
import { usdOfRentPerMillionTokens } from "./cost.js";
import { byId, make, markOf } from "./dom.js";
import { dollars, joules, rate, seconds, times } from "./format.js";
import { compare, decodeRate, median, verdict } from "./statistics.js";

const NUM_WARMUPS = 1;
const COUNTERS_SETTLE_MS = 400;

export const FIGURES = [
  { key: "throughput", label: "Output tokens/s, all requests", better: "higher", show: rate },
  { key: "decode", label: "Decode tokens/s a request", better: "higher", show: rate },
  { key: "ttft", label: "Time to first token", better: "lower", show: seconds },
  { key: "latency", label: "Latency of a request", better: "lower", show: seconds },
  { key: "energy", label: "Energy a token", better: "lower", show: joules },
  { key: "cost", label: "Rent a million tokens", better: "lower", show: dollars },
];

/** Return what runs the load. onDone gets the result, once it is complete. */
export function makeLoad(onDone) {
  let stop = null;

  async function run(sides) {
    if (stop) return;
    stop = new AbortController();
    setRunning(true);
    const plan = {
      concurrency: byId("load-concurrency").valueAsNumber,
      requests: byId("load-requests").valueAsNumber,
      tokens: byId("load-tokens").valueAsNumber,
      windows: byId("load-windows").valueAsNumber,
      prompts: await getJson("/page/prompts.json"),
    };
    try {
      const result = await measure(sides, plan, stop.signal, report);
      byId("load-result").replaceChildren(makeTable(result, sides));
      byId("load-result").hidden = false;
      byId("load-status").textContent =
        `Done: ${plan.windows} windows of each model, ${plan.concurrency} requests at once.`;
      onDone(result);
    } catch (error) {
      byId("load-status").textContent =
        error.name === "AbortError" ? "Stopped; nothing is concluded." : `Failed: ${error.message}`;
    } finally {
      stop = null;
      setRunning(false);
    }
  }

  function report(share, said) {
    byId("load-progress").value = share;
    byId("load-status").textContent = said;
  }

  function setRunning(isRunning) {
    byId("load-run").disabled = isRunning;
    byId("load-stop").disabled = !isRunning;
  }

  byId("load-stop").addEventListener("click", () => stop?.abort());
  return { run };
}

async function measure(sides, plan, signal, report) {
  const measured = Object.fromEntries(Object.keys(sides).map((side) => [side, []]));
  const numRounds = plan.windows + NUM_WARMUPS;
  for (let round = 0; round < numRounds; round += 1) {
    for (const [index, [side, model]] of Object.entries(sides).entries()) {
      const isWarmup = round < NUM_WARMUPS;
      const done = round * Object.keys(sides).length + index;
      report(
        done / (numRounds * Object.keys(sides).length),
        `${model.name}: ${isWarmup ? "warm-up" : `window ${round - NUM_WARMUPS + 1} of ${plan.windows}`}`,
      );
      const window = await runWindow(model.name, plan, round, signal);
      if (!isWarmup) measured[side].push(window);
    }
  }
  report(1, "Done.");
  const { prices, models } = await getJson(`/bitwatt/v1/comparison?since=${Date.now() / 1000}`);
  const figures = {};
  for (const figure of FIGURES) {
    const of = (side) => (measured[side] ?? []).map((w) => valueOf(figure.key, w, prices));
    figures[figure.key] = compare(of("a"), of("b"), figure.better);
  }
  const reasonOf = (name) => models.find((model) => model.name === name)?.energy.reason;
  return {
    plan,
    figures,
    unavailable: {
      decode: "the answers came in too few pieces to be timed; ask for more tokens",
      energy: Object.values(sides).map((s) => reasonOf(s.name)).find(Boolean)
        ?? "the counters did not move within a window; run longer ones",
      cost: "no rent is set (--usd-per-hour)",
    },
  };
}

function valueOf(key, window, prices) {
  if (key === "energy") return window.joules === null ? null : window.joules / window.numTokens;
  if (key === "cost") return usdOfRentPerMillionTokens(prices.usd_per_hour, window.throughput);
  return window[key];
}

/** Run one window: its requests in batches of the concurrency, one batch after the other. */
async function runWindow(name, plan, round, signal) {
  const before = await joulesOf(name);
  const answers = [];
  let tookS = 0;
  for (let first = 0; first < plan.requests; first += plan.concurrency) {
    const size = Math.min(plan.concurrency, plan.requests - first);
    const batch = await runBatch(name, plan, round * plan.requests + first, size, signal);
    answers.push(...batch.answers);
    tookS += batch.tookS;
  }
  if (before !== null) await new Promise((resolve) => setTimeout(resolve, COUNTERS_SETTLE_MS));
  const after = await joulesOf(name);
  const decodes = answers.map((answer) => answer.decode).filter((decode) => decode !== null);
  const numTokens = answers.length * plan.tokens;
  return {
    numTokens,
    throughput: numTokens / tookS,
    ttft: median(answers.map((answer) => answer.ttft)),
    latency: median(answers.map((answer) => answer.latency)),
    decode: decodes.length < answers.length / 2 ? null : median(decodes),
    joules: before === null || after === null || after <= before ? null : after - before,
  };
}

/**
 * Ask so many requests at once, on one connection, each with its own prompt.
 * The salt keeps one batch's prefix cache from answering for another's prefill.
 */
async function runBatch(name, plan, first, size, signal) {
  const prompts = Array.from({ length: size }, (_, i) => plan.prompts[(first + i) % plan.prompts.length]);
  const answers = prompts.map(() => ({ firstAt: null, lastAt: null, numPieces: 0, reason: null }));
  const startedAt = performance.now();
  const body = {
    model: name,
    prompt: prompts,
    max_tokens: plan.tokens,
    temperature: 0,
    seed: first,
    ignore_eos: true,
    cache_salt: `page-${startedAt}`,
  };
  for await (const { event, at } of streamEvents("/v1/completions", body, signal)) {
    for (const { index, text, finish_reason: reason } of event.choices) {
      if (!text && !reason) continue;
      const answer = answers[index];
      answer.firstAt ??= at;
      answer.numPieces += at === answer.lastAt ? 0 : 1;
      answer.lastAt = at;
      answer.reason = reason;
    }
  }
  if (answers.some(({ reason }) => reason !== "length")) throw new Error("An answer ended early: the work is not equal.");
  return {
    tookS: (Math.max(...answers.map(({ lastAt }) => lastAt)) - startedAt) / 1000,
    answers: answers.map(({ firstAt, lastAt, numPieces }) => ({
      ttft: (firstAt - startedAt) / 1000,
      latency: (lastAt - startedAt) / 1000,
      decode: decodeRate(plan.tokens, numPieces, firstAt, lastAt),
    })),
  };
}

async function joulesOf(name) {
  const { models } = await getJson(`/bitwatt/v1/comparison?since=${Date.now() / 1000}`);
  return models.find((model) => model.name === name)?.energy.joules ?? null;
}

function makeTable({ plan, figures, unavailable }, sides) {
  const head = make("tr", {}, make("th", { scope: "col" }, "Median [quartiles]"));
  for (const [side, model] of Object.entries(sides)) {
    head.append(make("th", { scope: "col" }, markOf(side), model.name));
  }
  head.append(make("th", { scope: "col" }, "Gain"), make("th", { scope: "col" }, "Pairs ranged"));
  const rows = FIGURES.map(({ key, label, show }) => {
    const row = make("tr", {}, make("th", { scope: "row" }, label));
    const figure = figures[key];
    if (!figure) {
      row.append(make("td", { className: "why", colSpan: 4 }, `Unavailable: ${unavailable[key]}`));
      return row;
    }
    const shown = ({ median: value, low, high }) =>
      make("td", {}, show(value), make("span", { className: "range" }, ` [${show(low)}, ${show(high)}]`));
    const said = verdict(figure);
    row.append(
      shown(figure.a),
      shown(figure.b),
      make("td", { className: said }, `${times(figure.gain)} ${said}`),
      make("td", {}, `${times(figure.low)} to ${times(figure.high)}`),
    );
    return row;
  });
  const caption =
    `${plan.windows} alternating windows of ${plan.requests} requests, ${plan.concurrency} at once, ` +
    `${plan.tokens} tokens an answer; ${NUM_WARMUPS} warm-up of each dropped. A gain below 1× is a loss.`;
  return make(
    "table",
    {},
    make("caption", {}, caption),
    make("thead", {}, head),
    make("tbody", {}, ...rows),
  );
}
