// How near decoding comes to the least time a step could take: its weights, read from memory.

import { bytes, seconds } from "./format.js";
import { weightBytes } from "./memory.js";

const NOT_YET = "memory is timed in some idle seconds after the start, which there were none of yet";

/** Return why a model's decoding can't be held against memory; null where it can. */
export function rooflineReason(model) {
  if (!model.roofline) return `${model.name} doesn't say what a decode step reads`;
  const reason = model.roofline.unavailable ?? (model.read_bytes_per_s ? null : NOT_YET);
  return reason && `${model.name}: ${reason}`;
}

/**
 * Return the share of its own roofline that each model decodes at, or null.
 * decode: {a, b}, spreads of tokens a second of a request. Each step brings a request one token.
 */
export function rooflineShares(decode, sides) {
  if (!decode || Object.values(sides).some(rooflineReason)) return null;
  const shares = Object.entries(sides).map(([side, model]) => {
    const { median, low, high } = decode[side];
    const share = (rate) => (rate * model.roofline.step_bytes) / model.read_bytes_per_s;
    return [side, { median: share(median), low: share(low), high: share(high) }];
  });
  return Object.fromEntries(shares);
}

/** Return in words what the roofline of each is, and what a share of it tells. */
export function aboutRoofline(sides) {
  const floors = Object.values(sides).map((model) => {
    const { name, roofline, read_bytes_per_s: rate } = model;
    const held = weightBytes(model);
    const read = bytes(roofline.step_bytes, { beside: [held], isBare: true });
    return `${name} ${read} of ${bytes(held)} at ${bytes(rate)}/s, ${seconds(roofline.step_bytes / rate)}`;
  });
  return `Roofline: a decode step reads the weights once, but for tables of which a token takes a row (the rotary one; an embedding too, unless it is the head as well), at best as fast as its engine measured memory to be read, each by itself in idle seconds after the start: ${floors.join(
    "; ")}. The rest of a step is attention, sampling and the server, most of a small model's step: a low share tells of slow kernels only where the reading takes milliseconds.`;
}
