// Windows of equal work to each model in turns.

import { getJson, pathOf, streamEvents } from "./api.js";
import { usdOfElectricityPerMillionTokens, usdOfRentPerMillionTokens } from "./cost.js";
import { agreement, compare, fittingTokens, median, spread } from "./statistics.js";
import { newReading, timesOf } from "./timing.js";

const MIN_WINDOWS = 2;
const COUNTERS_SETTLE_MS = 400;
const NOT_TIMED = {
  server: "the engine drew the answers' tokens in one step; ask for more tokens an answer",
  browser: "this browser read the answers in too few chunks to time; ask for more tokens an answer",
};

/** What is worked out of the windows, and which way is better. */
export const FIGURES = {
  throughput: "higher",
  decode: "higher",
  ttft: "lower",
  latency: "lower",
  energy: "lower",
  cost: "lower",
  electricity: "lower",
};

/**
 * Run the plan and return its figures; of one model alone, figures have no gain. clock: "server" where
 * the servers told the times of all answers, else "browser"; all figures are by one.
 * asked: {kind, concurrency, requests, tokens, warmups, windows, prompts, fitS}. With fitS, a number
 * of seconds, the last warm-up decides how long answers are, never shorter than asked, and no round
 * begins after it, once each model has two windows.
 */
export async function measure(sides, asked, signal, report) {
  let plan = asked;
  const measured = Object.fromEntries(Object.keys(sides).map((side) => [side, []]));
  const numSides = Object.keys(sides).length;
  const numRounds = plan.windows + plan.warmups;
  const startedAt = performance.now();
  for (let round = 0; round < numRounds; round += 1) {
    const isLong = plan.fitS && performance.now() - startedAt > plan.fitS * 1000;
    if (isLong && round >= plan.warmups + MIN_WINDOWS) break;
    let roundTookS = 0;
    for (const [index, [side, model]] of Object.entries(sides).entries()) {
      const isWarmup = round < plan.warmups;
      report(
        (round * numSides + index) / (numRounds * numSides),
        `${model.name}: ${isWarmup ? "warm-up" : `window ${round - plan.warmups + 1} of ${plan.windows}`}`,
      );
      const window = await runWindow(model, plan, round, signal);
      roundTookS += window.tookS;
      if (!isWarmup) measured[side].push(window);
    }
    if (plan.fitS && round === plan.warmups - 1) plan = { ...plan, tokens: fittingTokens(plan, roundTookS) };
  }
  report(1, "Done.");
  const figures = {};
  const answers = Object.values(measured).flat().flatMap(({ batches }) => batches.flat());
  const clock = answers.every(({ told }) => told) ? "server" : "browser";
  const timed = (window) => ({ ...window, ...timesOfWindow(window, plan.tokens, clock) });
  for (const [key, better] of Object.entries(FIGURES)) {
    const of = (side) => measured[side].map((window) => valueOf(key, timed(window), sides[side].prices));
    figures[key] = sides.b ? compare(of("a"), of("b"), better) : alone(of("a"));
  }
  const { prompts: _, ...ran } = plan;
  return {
    plan: { ...ran, windows: measured.a.length },
    at: Date.now(),
    clock,
    figures,
    agreement: sides.b ? agreementOf(measured.a, measured.b) : null,
    unavailable: {
      decode: NOT_TIMED[clock],
      ttft: NOT_TIMED[clock],
      energy: Object.values(sides).map((model) => model.energy.reason).find(Boolean)
        ?? "the counters did not move within a window; run longer ones",
    },
  };
}

/** Return how far the answers to the same prompts agree, on average, and of how many. */
function agreementOf(ofA, ofB) {
  const shares = ofA.flatMap(({ texts }, i) => texts.map((text, j) => agreement(text, ofB[i].texts[j])));
  return { share: shares.reduce((sum, share) => sum + share, 0) / shares.length, n: shares.length };
}

function alone(values) {
  const known = values.filter((value) => value > 0);
  return known.length ? { a: spread(known) } : null;
}

function valueOf(key, window, prices) {
  const joules = window.joules === null ? null : window.joules / window.numTokens;
  if (key === "energy") return joules;
  if (key === "cost") return usdOfRentPerMillionTokens(prices.usd_per_hour, window.throughput);
  if (key === "electricity") return usdOfElectricityPerMillionTokens(prices, joules);
  return window[key];
}

/** Run one window: its requests in batches of the concurrency, one batch after the other. */
async function runWindow(model, plan, round, signal) {
  const before = await joulesOf(model.name);
  const batches = [];
  const startedAt = performance.now();
  for (let first = 0; first < plan.requests; first += plan.concurrency) {
    const size = Math.min(plan.concurrency, plan.requests - first);
    batches.push(await runBatch(model, plan, round * plan.requests + first, size, signal));
  }
  const tookS = (performance.now() - startedAt) / 1000;
  if (before !== null) await new Promise((resolve) => setTimeout(resolve, COUNTERS_SETTLE_MS));
  const after = await joulesOf(model.name);
  return {
    batches,
    tookS,
    numTokens: plan.requests * plan.tokens,
    texts: batches.flat().map(({ text }) => text),
    joules: before === null || after === null || after <= before ? null : after - before,
  };
}

/** Return a window's figures that are made of its answers' times. */
function timesOfWindow({ batches, numTokens }, tokens, clock) {
  const timed = batches.map((answers) =>
    answers.map(({ reading, told }) => timesOf(tokens, reading, clock === "server" ? told : undefined)));
  const all = timed.flat();
  const tookS = timed.reduce((sum, batch) => sum + Math.max(...batch.map(({ latency }) => latency)), 0);
  return {
    throughput: numTokens / tookS,
    ttft: medianOfMost(all.map(({ ttft, isReadLate }) => (isReadLate ? null : ttft))),
    latency: median(all.map(({ latency }) => latency)),
    decode: medianOfMost(all.map(({ decode }) => decode)),
  };
}

/** Return the median of the values that are known; null where most aren't. */
function medianOfMost(values) {
  const known = values.filter((value) => value !== null);
  return known.length < values.length / 2 ? null : median(known);
}

/**
 * Ask so many requests at once, on one connection, each with its own prompt; return the answers.
 * The salt keeps one batch's prefix cache from answering for another's prefill.
 */
async function runBatch(model, plan, first, size, signal) {
  const prompts = Array.from({ length: size }, (_, i) => plan.prompts[(first + i) % plan.prompts.length]);
  const startedAt = performance.now();
  const answers = prompts.map(() => ({ reading: newReading(startedAt), text: "", reason: null }));
  const body = {
    model: model.name,
    prompt: prompts,
    max_tokens: plan.tokens,
    temperature: 0,
    seed: first,
    ignore_eos: true,
    cache_salt: `page-${startedAt}`,
  };
  for await (const { event, at } of streamEvents(pathOf(model, "/v1/completions"), body, signal)) {
    event.usage?.bitwatt?.times?.forEach((told, index) => { answers[index].told = told; });
    for (const { index, text, finish_reason: reason } of event.choices) {
      if (!text && !reason) continue;
      const answer = answers[index];
      answer.reading.take(at);
      answer.text += text;
      answer.reason = reason;
    }
  }
  if (answers.some(({ reason }) => reason !== "length")) throw new Error("An answer ended early: the work is not equal.");
  return answers;
}

async function joulesOf(name) {
  const { models } = await getJson(`/bitwatt/v1/comparison?since=${Date.now() / 1000}`);
  return models.find((model) => model.name === name)?.energy.joules ?? null;
}
