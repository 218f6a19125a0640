// Numbers as people read them.

const LEAST_SHOWN = 0.01; // of a unit, beside a larger value
const MOST_DIGITS = 8;

/** Return a number with so many significant digits, its whole part never cut. */
export function digits(value, count = 3) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) {
    const numWhole = Math.floor(Math.log10(size)) + 1;
    return value.toLocaleString("en", { maximumFractionDigits: Math.max(0, count - numWhole) });
  }
  if (size < 0.001) return value.toExponential(count - 1);
  return String(Number(value.toPrecision(count)));
}

/**
 * Return what shows values of these units, [name, size], the largest first.
 * beside: values that it stands next to, so that all have one unit; isBare: without the unit.
 */
const quantity = (...units) => (value, { beside = [], count, isBare } = {}) => {
  const [name, size] = unitOf(units, [value, ...beside]);
  const said = digits(value / size, count);
  return isBare ? said : `${said} ${name}`;
};

/** Return the largest value's unit; the smallest's where that would leave too little of it. */
function unitOf(units, values) {
  const known = values.filter((value) => value > 0);
  const unitFor = (value) => units.find(([, size]) => value >= size) ?? units.at(-1);
  const unit = unitFor(Math.max(...known, 0));
  return known.some((value) => value / unit[1] < LEAST_SHOWN) ? unitFor(Math.min(...known)) : unit;
}

export const bytes = quantity(["GB", 1e9], ["MB", 1e6], ["kB", 1e3], ["B", 1]);
export const seconds = quantity(["s", 1], ["ms", 1e-3]);
export const joules = quantity(["J", 1], ["mJ", 1e-3], ["µJ", 1e-6], ["nJ", 1e-9]);
export const rate = quantity(["tok/s", 1]);

export const millions = (value) => (value < 1e9 ? `${digits(value / 1e6)}M` : `${digits(value / 1e9)}B`);

/** Return a time of today as "14:32", another day's with its date. */
export function when(at, now = Date.now()) {
  const [time, today] = [new Date(at), new Date(now)];
  const clock = time.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  const date = time.toLocaleDateString("en-GB", { day: "numeric", month: "short", year: "numeric" });
  return time.toDateString() === today.toDateString() ? clock : `${date}, ${clock}`;
}

export const dollars = (value, { count = 3 } = {}) =>
  `$${value < 0.01 ? digits(value, count) : value.toFixed(count - 1)}`;

/** Return a share in percent, with two significant digits. */
export const percent = (share) => `${digits(Number((share * 100).toPrecision(2)))}%`;

/** Return a ratio as "2.40×". */
export function times(value) {
  if (value < 0.995) return `${Number(value.toPrecision(2))}×`;
  return `${value < 10 ? value.toFixed(2) : digits(value)}×`;
}

/** Return by how much more or less in percent; "" where the gain says it in an easier way. */
export function amountOf(gain, better) {
  const change = better === "lower" ? 1 - 1 / gain : gain - 1;
  return change >= 0.99 ? "" : percent(Math.abs(change));
}

const numberIn = (shown) => Number.parseFloat(shown.replace(/[$,]/g, ""));

/**
 * Return both values in one unit, with as many digits as it takes for what is said of the two to
 * follow from what is shown. said: returns the words, of two values.
 */
export function inOneUnit(a, b, show, said) {
  for (let count = 3; ; count += 1) {
    const shown = [a, b].map((value) => show(value, { beside: [a, b], count }));
    if (count === MOST_DIGITS || said(...shown.map(numberIn)) === said(a, b)) return shown;
  }
}
