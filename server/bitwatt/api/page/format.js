// Numbers as people read them.

const UNITS = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]];

/** Return a number with three significant digits. */
export function digits(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size < 0.001) return value.toExponential(2);
  return String(Number(value.toPrecision(3)));
}

export function bytes(value) {
  const [name, scale] = UNITS.find(([, least]) => value >= least) ?? ["B", 1];
  return `${digits(value / scale)} ${name}`;
}

export function seconds(value) {
  return value < 1 ? `${digits(value * 1000)} ms` : `${digits(value)} s`;
}

export const millions = (value) => (value < 1e9 ? `${digits(value / 1e6)}M` : `${digits(value / 1e9)}B`);

/** Return a time of today as "14:32", another day's with its date. */
export function when(at, now = Date.now()) {
  const [time, today] = [new Date(at), new Date(now)];
  const clock = time.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  const date = time.toLocaleDateString("en-GB", { day: "numeric", month: "short", year: "numeric" });
  return time.toDateString() === today.toDateString() ? clock : `${date}, ${clock}`;
}

export const rate = (value) => `${digits(value)} tok/s`;

export function joules(value) {
  if (value < 1e-6) return `${digits(value * 1e9)} nJ`;
  if (value < 1e-3) return `${digits(value * 1e6)} µJ`;
  return value < 1 ? `${digits(value * 1e3)} mJ` : `${digits(value)} J`;
}

export const dollars = (value) => `$${value < 0.01 ? digits(value) : value.toFixed(2)}`;

/** Return a ratio as "2.4×". */
export const times = (value) => `${value < 0.995 || value >= 10 ? digits(value) : value.toFixed(2)}×`;
