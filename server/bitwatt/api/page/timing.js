// An answer's times: by the server's clocks where it tells of them, else as this browser read them.
//
// A browser beside a fast model is the slower of the two: it reads the first token late, and many at
// once. By its clock the faster model can look the slower one.

const MIN_PIECES = 8;

/** Begin to note when an answer's pieces are read, in milliseconds. */
export function newReading(startedAt) {
  return {
    startedAt,
    firstAt: null,
    lastAt: null,
    numPieces: 0,
    take(at) {
      this.firstAt ??= at;
      this.numPieces += at === this.lastAt ? 0 : 1;
      this.lastAt = at;
    },
  };
}

/**
 * Return {ttft, latency, decode} of an answer, in seconds and tokens a second after the first.
 * told: what the server measured of it; undefined where it says nothing. Then isReadLate says that
 * the first token had waited for a browser that read many at once, and ttft is what it took at most.
 * decode is null where nothing tells of it.
 */
export function timesOf(numTokens, reading, told) {
  if (told) {
    const { time_to_first_token_s: ttft, decode_s: decodeS } = told;
    const decode = numTokens > 1 && decodeS > 0 ? (numTokens - 1) / decodeS : null;
    return { ttft, latency: ttft + decodeS, decode, isReadLate: false };
  }
  const { startedAt, firstAt, lastAt, numPieces } = reading;
  const isTimed = numPieces >= MIN_PIECES && lastAt > firstAt;
  return {
    ttft: (firstAt - startedAt) / 1000,
    latency: (lastAt - startedAt) / 1000,
    decode: isTimed ? ((numTokens - 1) * 1000) / (lastAt - firstAt) : null,
    isReadLate: numPieces < Math.min(MIN_PIECES, numTokens),
  };
}

/** Return in words why timesOf has no decode rate of an answer. */
export function whyNoDecode(numTokens, { numPieces }, told) {
  if (numTokens < 2) return "one token: no time between tokens";
  if (told) return "all in one step: no time between tokens";
  if (numPieces < 2) return "all in one chunk: no time between tokens";
  return `too few chunks to time: ${numPieces}, ${MIN_PIECES} needed`;
}

/** Return in words whose clock times are by: "server" or "browser". */
export const clockOf = (clock) => (clock === "server" ? "by the server's clock" : "as this browser read them");
