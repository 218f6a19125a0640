// The server, called with the key that this tab keeps.

const KEY = "bitwatt-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const keepKey = (key) => sessionStorage.setItem(KEY, key);

/** Return the headers with the key, unless they have one. */
export function withKey(headers) {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}`, ...headers } : { ...headers };
}

async function call(path, options = {}) {
  const headers = withKey(options.headers);
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error?.message ?? `The server answered ${response.status}.`);
}

/** Return where a model is asked: of another server's, this one asks it with its own key. */
export const pathOf = (model, path) => (model.is_remote ? `/bitwatt/v1/twin${path}` : path);

export async function getJson(path) {
  return (await call(path)).json();
}

/**
 * Yield the events of a streamed completion, each with the time it was read at.
 * Throws ApiError for an error among them.
 */
export async function* streamEvents(path, body, signal) {
  const response = await call(path, {
    method: "POST",
    // Mirrors would disturb what is measured.
    headers: { "Content-Type": "application/json", "X-Bitwatt-Shadow": "0" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const at = performance.now();
    if (done) throw new ApiError(0, "The stream broke off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(0, event.error.message);
      yield { event, at };
    }
  }
}
