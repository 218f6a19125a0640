// Medians and spreads of a handful of windows.

export function quantile(values, share) {
  const ordered = [...values].sort((x, y) => x - y);
  const position = share * (ordered.length - 1);
  const below = Math.floor(position);
  const above = Math.min(below + 1, ordered.length - 1);
  return ordered[below] + (position - below) * (ordered[above] - ordered[below]);
}

export const median = (values) => quantile(values, 0.5);

const MOST_FITTING_TOKENS = 128;

/**
 * Return how many tokens an answer may have for a plan's windows to end within fitS seconds.
 * roundTookS: what a window of each model took with answers of plan.tokens, which are the fewest.
 */
export function fittingTokens({ tokens, windows, fitS }, roundTookS) {
  const fitting = Math.floor((tokens * fitS) / (windows * roundTookS));
  return Math.max(tokens, Math.min(fitting, MOST_FITTING_TOKENS));
}

/** Return the median and the quartiles. */
export const spread = (values) => ({
  median: median(values),
  low: quantile(values, 0.25),
  high: quantile(values, 0.75),
  n: values.length,
});

/** Return how many times better a is than b. */
export const gainOf = (a, b, better) => (better === "higher" ? a / b : b / a);

/**
 * Compare pairs of windows; null where there is none.
 * gain: how many times better a is; low and high: of the single pairs, the worst and the best.
 */
export function compare(a, b, better) {
  const pairs = a.map((value, i) => [value, b[i]]).filter(([x, y]) => x > 0 && y > 0);
  if (pairs.length === 0) return null;
  const [ofA, ofB] = [pairs.map(([x]) => x), pairs.map(([, y]) => y)];
  const gains = pairs.map(([x, y]) => gainOf(x, y, better));
  return {
    a: spread(ofA),
    b: spread(ofB),
    gain: gainOf(median(ofA), median(ofB), better),
    low: Math.min(...gains),
    high: Math.max(...gains),
  };
}

/** Return how far two texts agree: the share of the longer before the two part. */
export function agreement(one, other) {
  const [short, long] = [[...one], [...other]].sort((x, y) => x.length - y.length);
  const parting = short.findIndex((character, i) => character !== long[i]);
  return long.length ? (parting < 0 ? short.length : parting) / long.length : 1;
}

/** Return in a word what a comparison says of a: it decides where all pairs agree. */
export function verdict({ low, high }) {
  if (low > 1) return "better";
  if (high < 1) return "worse";
  return low === high ? "equal" : "unclear";
}
