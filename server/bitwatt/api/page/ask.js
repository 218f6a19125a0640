// One prompt to every model in turn, each warmed up before, the streams side by side.

import { pathOf, streamEvents } from "./api.js";
import { byId, make, markOf, setDisabled } from "./dom.js";
import { digits, rate, seconds } from "./format.js";
import { decodeRate, whyNoDecodeRate } from "./statistics.js";

// The first request of a process, or after a rest, finds caches cold.
const WARM_UP = { messages: [{ role: "user", content: "Hi" }], max_tokens: 1, temperature: 0 };

/** Return the panels and what runs them. onChange is called when asking begins and ends. */
export function makeAsk({ onChange }) {
  const panels = {};
  let stop = null;

  function show(sides) {
    for (const [side, model] of Object.entries(sides)) {
      if (panels[side]) continue;
      panels[side] = makePanel(side, model.name);
      byId("answers").append(panels[side].root);
    }
  }

  async function run(sides) {
    if (stop || !sides.a) return; // nothing is known of the models yet
    stop = new AbortController();
    setDisabled(byId("ask-stop"), false);
    onChange();
    byId("ask-status").textContent = `${sides.a.name} answers.`;
    const body = {
      messages: [{ role: "user", content: byId("prompt").value }],
      max_tokens: byId("ask-tokens").valueAsNumber,
      temperature: byId("ask-temperature").valueAsNumber,
      seed: byId("ask-seed").valueAsNumber,
    };
    const asked = Object.entries(sides);
    for (const [side] of asked) panels[side].wait(side === "a" ? "" : `waits for ${sides.a.name}`);
    const said = [];
    for (const [side, model] of asked) {
      // In turn: models that share a machine would slow each other.
      said.push(await panels[side].run(pathOf(model, "/v1/chat/completions"), { ...body, model: model.name }, stop.signal));
      byId("ask-status").textContent = said.join(" ");
    }
    stop = null;
    setDisabled(byId("ask-stop"), true);
    onChange();
  }

  byId("ask-stop").addEventListener("click", () => stop?.abort());
  return {
    show,
    run,
    get isRunning() {
      return stop !== null;
    },
  };
}

function makePanel(side, name) {
  const state = make("span", { className: "state" }, "ready");
  const text = make("pre", {
    className: "text",
    tabIndex: 0,
    role: "region",
    "aria-label": `Answer of ${name}`,
  });
  const figures = {};
  const list = make("dl", { className: "figures" });
  for (const [key, label, title] of [
    ["ttft", "Time to first token", "From the request to its first token, at this browser"],
    ["rate", "Decode", "Tokens a second after the first, from the stream's own times"],
    ["tokens", "Tokens", "Tokens generated"],
  ]) {
    figures[key] = make("dd", {}, "–");
    list.append(make("div", { title }, make("dt", {}, label), figures[key]));
  }
  const root = make(
    "article",
    { className: `side ${side}`, "aria-label": name },
    make("header", {}, make("h3", {}, markOf(side), name), state),
    text,
    list,
  );

  /** Empty the panel before its turn. */
  function wait(said) {
    text.textContent = "";
    text.classList.remove("failed");
    state.textContent = said;
    for (const figure of Object.values(figures)) show(figure, "–");
  }

  async function run(path, body, signal) {
    root.classList.add("running");
    state.textContent = "warms up";
    let startedAt;
    let firstAt = null;
    let lastAt = null;
    let numChunks = 0;
    let numPieces = 0;
    let numTokens = null;
    try {
      for await (const _ of streamEvents(path, { ...WARM_UP, model: body.model }, signal));
      state.textContent = "running";
      startedAt = performance.now();
      // The salt keeps an earlier answer's prefix cache from sparing one of the models its prefill.
      const salted = { ...body, cache_salt: `page-${startedAt}` };
      for await (const { event, at } of streamEvents(path, salted, signal)) {
        if (event.usage) numTokens = event.usage.completion_tokens;
        const [choice] = event.choices;
        if (!choice || (!choice.delta.content && !choice.finish_reason)) continue;
        numPieces += at === lastAt ? 0 : 1;
        lastAt = at;
        if (firstAt === null) {
          firstAt = lastAt;
          show(figures.ttft, seconds((firstAt - startedAt) / 1000));
        }
        if (choice.delta.content) append(choice.delta.content);
        numChunks += 1;
        show(figures.tokens, digits(numChunks));
        const decodeSoFar = decodeRate(numChunks, numPieces, firstAt, lastAt);
        if (decodeSoFar !== null) show(figures.rate, rate(decodeSoFar));
        if (choice.finish_reason === "length") state.textContent = "at the token limit";
        else if (choice.finish_reason) state.textContent = "complete";
      }
    } catch (error) {
      const isStopped = error.name === "AbortError";
      state.textContent = isStopped ? "stopped" : "failed";
      if (!isStopped) {
        text.classList.add("failed");
        text.textContent += error.message;
      }
      return `${name} ${state.textContent}.`;
    } finally {
      root.classList.remove("running");
    }
    show(figures.tokens, digits(numTokens));
    // Read in one chunk, the first token may have waited for the last.
    if (numTokens > 1 && numPieces === 1) show(figures.ttft, `≤ ${seconds((firstAt - startedAt) / 1000)}`);
    const decode = decodeRate(numTokens, numPieces, firstAt, lastAt);
    if (decode === null) show(figures.rate, whyNoDecodeRate(numTokens, numPieces), "why");
    else show(figures.rate, rate(decode));
    return `${name}: ${numTokens} tokens${decode === null ? "" : ` at ${rate(decode)}`}.`;
  }

  function show(figure, said, className = "") {
    figure.textContent = said;
    figure.className = className;
  }

  function append(piece) {
    const isAtEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 8;
    text.append(piece);
    if (isAtEnd) text.scrollTop = text.scrollHeight;
  }

  return { root, wait, run };
}
