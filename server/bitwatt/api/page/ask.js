// One prompt to every model in turn, each warmed up before, the streams side by side.

import { pathOf, streamEvents } from "./api.js";
import { byId, make, markOf, setDisabled } from "./dom.js";
import { digits, rate, seconds } from "./format.js";
import { overHop } from "./pair.js";
import { clockOf, newReading, timesOf, whyNoDecode } from "./timing.js";

// The first request after a rest finds caches cold.
const WARM_UP = { max_tokens: 1, temperature: 0 };

// On the server's own machine, what this page still paints would take the engine's cores.
const PAINTED_MS = 200;
const painted = () => new Promise((resolve) => setTimeout(resolve, PAINTED_MS));

/** Return the panels and what runs them. onChange is called when asking begins and ends. */
export function makeAsk({ onChange }) {
  const panels = {};
  let stop = null;

  function show(sides) {
    for (const [side, model] of Object.entries(sides)) {
      if (panels[side]) continue;
      panels[side] = makePanel(side, model);
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

function makePanel(side, model) {
  const { name } = model;
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
    ["ttft", "Time to first token", "From the request to its first token"],
    ["rate", "Decode", "Tokens a second after the first"],
    ["tokens", "Tokens", "Tokens generated"],
  ]) {
    figures[key] = make("dd", {}, "–");
    list.append(make("div", { title }, make("dt", {}, label), figures[key]));
  }
  const clock = make("p", { className: "clock" });
  const root = make(
    "article",
    { className: `side ${side}`, "aria-label": name },
    make("header", {}, make("h3", {}, markOf(side), name), state),
    text,
    list,
    clock,
  );

  /** Empty the panel before its turn. */
  function wait(said) {
    text.textContent = "";
    text.classList.remove("failed");
    state.textContent = said;
    for (const figure of Object.values(figures)) show(figure, "–");
    clock.textContent = "";
  }

  async function run(path, body, signal) {
    root.classList.add("running");
    state.textContent = "warms up";
    let reading;
    let numChunks = 0;
    let usage = null;
    try {
      for await (const _ of streamEvents(path, { ...body, ...WARM_UP, cache_salt: `page-${performance.now()}` }, signal));
      state.textContent = "running";
      await painted();
      reading = newReading(performance.now());
      // The salt keeps an earlier answer's prefix cache from sparing one of the models its prefill.
      const salted = { ...body, cache_salt: `page-${reading.startedAt}` };
      for await (const { event, at } of streamEvents(path, salted, signal)) {
        usage = event.usage ?? usage;
        const [choice] = event.choices;
        if (!choice || (!choice.delta.content && !choice.finish_reason)) continue;
        reading.take(at);
        if (choice.delta.content) append(choice.delta.content);
        numChunks += 1;
        show(figures.tokens, digits(numChunks));
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
    const numTokens = usage?.completion_tokens ?? numChunks;
    const [told] = usage?.bitwatt?.times ?? [];
    const { ttft, decode, isReadLate } = timesOf(numTokens, reading, told);
    show(figures.tokens, digits(numTokens));
    show(figures.ttft, `${isReadLate ? "≤ " : ""}${seconds(ttft)}`);
    if (decode === null) show(figures.rate, whyNoDecode(numTokens, reading, told), "why");
    else show(figures.rate, rate(decode));
    clock.textContent = `Times ${clockOf(told ? "server" : "browser")}. ${told ? "" : overHop(model)}`.trimEnd();
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
