// One prompt to both models at once, both streams side by side.

import { streamEvents } from "./api.js";
import { byId, make, markOf } from "./dom.js";
import { digits, rate, seconds } from "./format.js";
import { decodeRate } from "./statistics.js";

/** Return the panels and what runs them. onDone gets the finished answers, by side. */
export function makeAsk(onDone) {
  const panels = {};
  let stop = null;

  function show(sides) {
    if (Object.keys(panels).length) return;
    for (const [side, model] of Object.entries(sides)) {
      panels[side] = makePanel(side, model.name);
      byId("answers").append(panels[side].root);
    }
  }

  async function run(sides) {
    if (stop) return;
    stop = new AbortController();
    setRunning(true);
    byId("ask-status").textContent = "Both models answer.";
    const body = {
      messages: [{ role: "user", content: byId("prompt").value }],
      max_tokens: byId("ask-tokens").valueAsNumber,
      temperature: byId("ask-temperature").valueAsNumber,
      seed: byId("ask-seed").valueAsNumber,
    };
    const ran = Object.entries(sides).map(async ([side, model]) => [
      side,
      await panels[side].run({ ...body, model: model.name }, stop.signal),
    ]);
    const answers = Object.fromEntries(await Promise.all(ran));
    byId("ask-status").textContent = Object.values(answers).map((a) => a.said).join(" ");
    stop = null;
    setRunning(false);
    onDone(answers);
  }

  function setRunning(isRunning) {
    byId("ask-run").disabled = isRunning;
    byId("ask-stop").disabled = !isRunning;
  }

  byId("ask-stop").addEventListener("click", () => stop?.abort());
  return { show, run };
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

  async function run(body, signal) {
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
      for await (const { event, at } of streamEvents("/v1/chat/completions", body, signal)) {
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
    return {
      decode,
      numTokens,
      said: `${name}: ${numTokens} tokens${decode === null ? "" : ` at ${rate(decode)}`}.`,
    };
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
