// What the two are to each other, in words.

import { millions } from "./format.js";

const BITS = { bfloat16: 16, float16: 16, float32: 32 };
const SMALL = 1e9; // parameters
const SAME_SIZE = 0.01; // of the parameters; norms are not the same ones

export const weightsOf = (model) => `${model.weights === "ternary" ? "ternary" : model.dtype} weights`;

const inBits = (model) => `${BITS[model.dtype]} bits (${model.dtype})`;

/** Return whether b has a's weights in 16 bits, as the server's name for it says. */
export const isCostTwin = (a, b) => b?.weights === "dense" && b.name === `${a.name}-fp16`;

/** Return what b is beside a, as far as the server and the models' cards tell. */
export function whatTwin(a, b) {
  const where = b.is_remote ? "on another server" : "on the same machine";
  if (isCostTwin(a, b)) return `the same weights in ${inBits(b)}, ${where}`;
  const weights = b.weights === "dense" ? `weights of ${inBits(b)}` : weightsOf(b);
  const isSameSize = Math.abs(a.num_parameters / b.num_parameters - 1) < SAME_SIZE;
  const size = isSameSize
    ? `the same size (${millions(b.num_parameters)} parameters)`
    : `${millions(b.num_parameters)} parameters (${a.name} has ${millions(a.num_parameters)})`;
  if (isTrainedAlike(a, b)) {
    return `a twin of ${size}, trained on the same ${millions(b.quality.num_tokens)} tokens, with ${weights}, ${where}`;
  }
  const root = b.root && b.root !== b.name ? ` (${b.root})` : "";
  return `another model${root} of ${size} with ${weights}, ${where}`;
}

/** Return in words what the models run on; "" before their engines have said. */
export function machineOf(models) {
  if (models.some((model) => !model.device_name)) return "";
  const described = models.map((model) => {
    const kernels = `${model.backend} kernels${model.instruction_set ? ` for ${model.instruction_set}` : ""}`;
    const threads = model.num_threads && `${model.num_threads} thread${model.num_threads > 1 ? "s" : ""}`;
    return [model.device_name, threads, kernels].filter(Boolean).join(", ");
  });
  const [first] = models;
  const isOne = described.every((words) => words === described[0]) && models.every((model) => model.is_remote === first.is_remote);
  return isOne ? `Runs on ${described[0]}.` : `Runs on: ${models.map(({ name }, i) => `${name}, ${described[i]}`).join("; ")}.`;
}

function isTrainedAlike(a, b) {
  const [ofA, ofB] = [a.quality, b.quality];
  return Boolean(
    ofA && ofB && ofB.has_same_tokens && ofA.evaluation === ofB.evaluation &&
      ofB.num_tokens && ofA.num_tokens === ofB.num_tokens,
  );
}

/** Return why the pair's ratios may not be a larger model's; "" of a pair that isn't small. */
export function whyOfItsSize(a, b) {
  const size = Math.min(a.num_parameters, b.num_parameters);
  if (!size || size >= SMALL) return "";
  return `At ${millions(size)} parameters fixed costs weigh more than in a model of billions, whose ratios may differ: measure your own by bitwatt serve MODEL --compare.`;
}

/** Return what b's times include that a's don't; "" where both are served here. */
export const overHop = (b) =>
  b.is_remote ? `The times of ${b.name} include the way to its server and back. ` : "";

/** Return why the cards give no comparison; null where they do. */
export function whyNoQuality([a, b]) {
  const without = [a, b].find((model) => model && !model.quality);
  if (!a || without) return `the card of ${without?.name ?? "the model"} (README.md) has no bits/byte`;
  if (b && a.quality.evaluation !== b.quality.evaluation) return "the models' cards have figures of different text";
  return null;
}
