// How near decoding comes to the least time a step could take: its weights, read from memory.

import { bytes, digits } from "./format.js";

export const percent = (value) => `${digits(value * 100)}%`;

/** Return why a model's decoding can't be held against memory; null where it can. */
export function rooflineReason(model) {
  if (!model.roofline) return `${model.name} doesn't say what a decode step reads`;
  return model.roofline.unavailable && `${model.name}: ${model.roofline.unavailable}`;
}

/**
 * Return the share of its own roofline that each model decodes at, or null.
 * decode: {a, b}, spreads of tokens a second of a request. Each step brings a request one token.
 */
export function rooflineShares(decode, sides) {
  if (!decode || Object.values(sides).some(rooflineReason)) return null;
  const shares = Object.entries(sides).map(([side, { roofline }]) => {
    const { median, low, high } = decode[side];
    const share = (rate) => (rate * roofline.step_bytes) / roofline.read_bytes_per_s;
    return [side, { median: share(median), low: share(low), high: share(high) }];
  });
  return Object.fromEntries(shares);
}

/** Return in words what the roofline of each is. */
export function aboutRoofline(sides) {
  const floors = Object.values(sides).map(({ name, roofline }) =>
    `${name} ${bytes(roofline.step_bytes)} at ${bytes(roofline.read_bytes_per_s)}/s`);
  return `Roofline: a decode step reads the model's weights once, at best as fast as memory was read when its engine started (${floors.join(
    ", ")}). A model with a low share is no strong baseline; small ones are bound by a step's other work.`;
}
