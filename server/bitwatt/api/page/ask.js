// One prompt to every model at once, the streams side by side.

import { pathOf, streamEvents } from "./api.js";
import { byId, make, markOf, setDisabled } from "./dom.js";
import { digits, rate, seconds } from "./format.js";
import { decodeRate } from "./statistics.js";

/** Return the panels and what runs them. */
export function makeAsk() {
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
    if (stop) return;
    stop = new AbortController();
    setRunning(true);
    byId("ask-status").textContent = sides.b ? "Both models answer." : "The model answers.";
    const body = {
      messages: [{ role: "user", content: byId("prompt").value }],
      max_tokens: byId("ask-tokens").valueAsNumber,
      temperature: byId("ask-temperature").valueAsNumber,
      seed: byId("ask-seed").valueAsNumber,
    };
    const ran = Object.entries(sides).map(async ([side, model]) => [
      side,
      await panels[side].run(pathOf(model, "/v1/chat/completions"), { ...body, model: model.name }, stop.signal),
    ]);
    const answers = Object.fromEntries(await Promise.all(ran));
    byId("ask-status").textContent = Object.values(answers).map((a) => a.said).join(" ");
    stop = null;
    setRunning(false);
  }

  function setRunning(isRunning) {
    setDisabled(byId("ask-run"), isRunning);
    setDisabled(byId("ask-stop"), !isRunning);
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
    ["ttft", "TTFT", "Time to first token"],
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

  async function run(path, body, signal) {
    text.textContent = "";
    text.classList.remove("failed");
    root.classList.add("running");
    state.textContent = "running";
    for (const figure of Object.values(figures)) figure.textContent = "–";
    const startedAt = performance.now();
    let firstAt = null;
    let lastAt = null;
    let numChunks = 0;
    let numPieces = 0;
    let numTokens = null;
    try {
      for await (const { event, at } of streamEvents(path, body, signal)) {
        if (event.usage) numTokens = event.usage.completion_tokens;
        const [choice] = event.choices;
        if (!choice || (!choice.delta.content && !choice.finish_reason)) continue;
        numPieces += at === lastAt ? 0 : 1;
        lastAt = at;
        if (firstAt === null) {
          firstAt = lastAt;
          figures.ttft.textContent = seconds((firstAt - startedAt) / 1000);
        }
        if (choice.delta.content) append(choice.delta.content);
        numChunks += 1;
        figures.tokens.textContent = digits(numChunks);
        showDecode(decodeRate(numChunks, numPieces, firstAt, lastAt));
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
      return { said: `${name} ${state.textContent}.` };
    } finally {
      root.classList.remove("running");
    }
    figures.tokens.textContent = digits(numTokens);
    const decode = decodeRate(numTokens, numPieces, firstAt, lastAt);
    showDecode(decode);
    return { said: `${name}: ${numTokens} tokens${decode === null ? "" : ` at ${rate(decode)}`}.` };
  }

  function showDecode(decode) {
    figures.rate.textContent = decode === null ? "–" : rate(decode);
  }

  function append(piece) {
    const isAtEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 8;
    text.append(piece);
    if (isAtEnd) text.scrollTop = text.scrollHeight;
  }

  return { root, run };
}
