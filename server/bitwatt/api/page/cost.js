// What tokens cost to rent the machine for.

/**
 * Return US dollars per million output tokens; null without a price or without tokens.
 * tokensPerS: over wall-clock time, for a machine is paid for while it waits.
 */
export function usdOfRentPerMillionTokens(usdPerHour, tokensPerS) {
  if (usdPerHour === null || tokensPerS <= 0) return null;
  return (usdPerHour / (tokensPerS * 3600)) * 1e6;
}
