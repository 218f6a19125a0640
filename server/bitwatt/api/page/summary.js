// In one sentence, what the first model saves beside the other, and what it costs.

import { amountOf, percent, times } from "./format.js";
import { processBytes, weightBytes } from "./memory.js";
import { whyNoQuality } from "./pair.js";
import { verdict } from "./statistics.js";

/** Return the sentence; "" where there are no two models to compare. result: of a measurement, or null. */
export function summaryOf({ a, b }, result) {
  if (!a?.memory || !b?.memory) return "";
  const parts = [memoryOf(a, b), speedOf(result), qualityOf(a, b, result), energyOf(a, b, result)];
  const known = parts.map(({ is }) => is).filter(Boolean);
  const others = parts.map(({ lacks }) => lacks).filter(Boolean);
  return [`${a.weights === "ternary" ? "Ternary weights" : a.name}: ${known.join(", ")}.`, ...others].join(" ");
}

/** Return by how much less or more, in percent or as a multiple; "as much" of a gain of 1. */
function amountLess(gain) {
  const amount = amountOf(gain, "lower");
  if (times(gain) === times(1)) return "as much";
  return `${amount || times(gain)} ${gain > 1 ? "less" : "more"}`;
}

function memoryOf(a, b) {
  const weights = amountLess(weightBytes(b) / weightBytes(a));
  const [ofA, ofB] = [processBytes(a), processBytes(b)];
  const whole = ofA === null || ofB === null ? "" : ` (${amountLess(ofB / ofA)} in all)`;
  return { is: `${weights} memory for weights${whole}` };
}

function speedOf(result) {
  const figure = result?.figures.throughput;
  if (!figure) return { lacks: "Speed is not measured yet." };
  const said = verdict(figure);
  if (said === "unclear") return { is: "speed unclear" };
  if (said === "equal") return { is: "the same speed" };
  const amount = amountOf(figure.gain, "higher");
  if (!amount) return { is: `${times(figure.gain)} the tokens a second` };
  return { is: `${amount} ${figure.gain > 1 ? "more" : "fewer"} tokens a second` };
}

function qualityOf(a, b, result) {
  if (whyNoQuality([a, b])) {
    if (!result?.agreement) return { lacks: "Quality is unknown." };
    return { is: `answers that agree by ${percent(result.agreement.share)}` };
  }
  const [ofA, ofB] = [a, b].map((model) => model.quality.bits_per_byte);
  if (ofA === ofB) return { is: "the same quality" };
  return { is: `quality ${percent(Math.abs(ofA / ofB - 1))} ${ofA > ofB ? "worse" : "better"}` };
}

function energyOf(a, b, result) {
  const figure = result?.figures.energy;
  if (!figure) {
    const isImpossible = [a, b].some((model) => model.energy.reason);
    return { lacks: isImpossible ? "Energy can't be measured here." : "Energy is not measured yet." };
  }
  if (verdict(figure) === "unclear") return { is: "energy unclear" };
  return { is: `${amountLess(figure.gain)} energy` };
}
