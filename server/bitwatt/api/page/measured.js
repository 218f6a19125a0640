// What was measured, kept in this browser until another pair is served or other weights are.

const KEY = "bitwatt-measured";

/** Return what a result holds for: the version, and each side's model, weights, kernels and device. */
export function identityOf(version, sides) {
  const parts = Object.values(sides).map((model) => [
    model.name, model.weights, model.dtype, model.backend, model.device_name, model.instruction_set, model.num_threads, model.num_parameters,
  ]);
  return JSON.stringify([version, ...parts]);
}

/** Keep a result. A browser that keeps nothing shows it until the page is left. */
export function keep(identity, result) {
  try {
    localStorage.setItem(KEY, JSON.stringify({ identity, result }));
  } catch {
    // Storage is full, or forbidden.
  }
}

/** Return the result that is kept for this identity, or null. */
export function kept(identity) {
  try {
    const found = JSON.parse(localStorage.getItem(KEY));
    return found?.identity === identity ? found.result : null;
  } catch {
    return null;
  }
}
