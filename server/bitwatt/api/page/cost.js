// What tokens cost: the machine's rent, and the electricity that it takes.

const JOULES_PER_KWH = 3.6e6;

/**
 * Return US dollars per million output tokens; null without a price or without tokens.
 * tokensPerS: over wall-clock time, for a machine is paid for while it waits.
 */
export function usdOfRentPerMillionTokens(usdPerHour, tokensPerS) {
  if (usdPerHour === null || tokensPerS <= 0) return null;
  return (usdPerHour / (tokensPerS * 3600)) * 1e6;
}

/** Return US dollars per million output tokens; null without price, PUE or joules a token. */
export function usdOfElectricityPerMillionTokens({ usd_per_kwh: usdPerKwh, pue }, joulesPerToken) {
  if (usdPerKwh === null || pue === null || joulesPerToken === null) return null;
  return ((joulesPerToken * 1e6) / JOULES_PER_KWH) * pue * usdPerKwh;
}

const pricesOf = (sides) => Object.values(sides).map((model) => model.prices);

/** Return why the rent of a million tokens isn't calculated; null where it is only not measured yet. */
export const costReason = (sides) =>
  pricesOf(sides).every((prices) => prices.usd_per_hour) ? null : "set --usd-per-hour";

/** Return why electricity's cost isn't calculated; null where it is only not measured yet. */
export function electricityReason(sides) {
  const prices = pricesOf(sides);
  if (prices.some((price) => price.usd_per_kwh === null)) return "set --usd-per-kwh";
  if (prices.some((price) => price.pue === null)) return "set --pue, its overhead in the building";
  const reason = Object.values(sides).map((model) => model.energy.reason).find(Boolean);
  return reason ? `joules can't be measured, because ${reason}` : null;
}
