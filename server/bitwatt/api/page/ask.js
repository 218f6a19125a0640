// One prompt to every model in turn, each warmed up before, the streams side by side. Then the same
// again, with nothing drawn: where the browser is on the server's machine, drawing an answer takes the
// cores that decode it, and of a small model's speed more than half.

import { pathOf, streamEvents } from "./api.js";
import { byId, make, markOf, setDisabled } from "./dom.js";
import { digits, rate, seconds } from "./format.js";
import { overHop } from "./pair.js";
import { median } from "./statistics.js";
import { clockOf, newReading, timesOf, whyNoDecode } from "./timing.js";

// The first request after a rest finds caches cold.
const WARM_UP = { max_tokens: 1, temperature: 0 };
const PATH = "/v1/chat/completions";

// On the server's own machine, what this page still paints would take the engine's cores.
const PAINTED_MS = 200; // a panel
const SETTLED_MS = 1000; // all that an answer has changed; decoding beside it is slower
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Answers that aren't drawn, in rounds of all models, where the drawn ones took no longer than this. Those
// of the first second after a rest are often slower, and don't count; nor does a load's warm-up window.
const MOST_DRAWN_MS = 1000;
const WARM_UP_ROUNDS = { least: 1, most: 10, ms: 1000 };
const TIMED_ROUNDS = { least: 5, most: 15, ms: 1500 };

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
    const startedAt = performance.now();
    const said = [];
    const drawn = {};
    for (const [side] of asked) {
      // In turn: models that share a machine would slow each other.
      const { words, answers } = await panels[side].run(body, stop.signal);
      said.push(words);
      if (answers) drawn[side] = answers;
      byId("ask-status").textContent = said.join(" ");
    }
    const isComplete = asked.every(([side]) => drawn[side]);
    if (isComplete && performance.now() - startedAt <= asked.length * (MOST_DRAWN_MS + PAINTED_MS)) {
      await timeUndrawn(asked, drawn, body, stop.signal);
    }
    stop = null;
    setDisabled(byId("ask-stop"), true);
    onChange();
  }

  /** Warm up, ask all in turns, and show the medians; a stop, or a failure, leaves what is shown. */
  async function timeUndrawn(asked, drawn, body, signal) {
    let answers;
    for (const [side] of asked) panels[side].sayTimed();
    try {
      await pause(SETTLED_MS);
      await askInTurns(asked, body, signal, WARM_UP_ROUNDS);
      answers = await askInTurns(asked, body, signal, TIMED_ROUNDS);
    } catch {
      for (const [side] of asked) panels[side].showTimes(drawn[side]);
      return;
    }
    const words = asked.map(([side], j) => panels[side].showTimes(answers[j]));
    byId("ask-status").textContent = words.join(" ");
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

/** Ask all in turns until so much time has passed, A B A B; return each one's answers. */
async function askInTurns(asked, body, signal, { least, most, ms }) {
  const answers = asked.map(() => []);
  const startedAt = performance.now();
  for (let i = 0; i < most && (i < least || performance.now() - startedAt < ms); i += 1) {
    for (const [j, [, model]] of asked.entries()) answers[j].push(await answerOf(model, body, signal));
  }
  return answers;
}

/** Ask a model once; onChoice is called with each piece. Return the answer's tokens and times. */
async function answerOf(model, body, signal, onChoice = () => {}) {
  const reading = newReading(performance.now());
  // The salt keeps an earlier answer's prefix cache from sparing one of the models its prefill.
  const salted = { ...body, model: model.name, cache_salt: `page-${reading.startedAt}` };
  let numChunks = 0;
  let usage = null;
  for await (const { event, at } of streamEvents(pathOf(model, PATH), salted, signal)) {
    usage = event.usage ?? usage;
    const [choice] = event.choices;
    if (!choice || (!choice.delta.content && !choice.finish_reason)) continue;
    reading.take(at);
    numChunks += 1;
    onChoice(choice, numChunks);
  }
  const numTokens = usage?.completion_tokens ?? numChunks;
  const [told] = usage?.bitwatt?.times ?? [];
  return { numTokens, reading, told, ...timesOf(numTokens, reading, told) };
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

  /** Draw an answer as it comes; return what is said of it, and it alone in a list, null if it failed. */
  async function run(body, signal) {
    root.classList.add("running");
    state.textContent = "warms up";
    let answer;
    try {
      await answerOf(model, { ...body, ...WARM_UP }, signal);
      state.textContent = "running";
      await pause(PAINTED_MS);
      answer = await answerOf(model, body, signal, (choice, numChunks) => {
        if (choice.delta.content) append(choice.delta.content);
        show(figures.tokens, digits(numChunks));
        if (choice.finish_reason === "length") state.textContent = "at the token limit";
        else if (choice.finish_reason) state.textContent = "complete";
      });
    } catch (error) {
      const isStopped = error.name === "AbortError";
      state.textContent = isStopped ? "stopped" : "failed";
      if (!isStopped) {
        text.classList.add("failed");
        text.textContent += error.message;
      }
      return { words: `${name} ${state.textContent}.`, answers: null };
    } finally {
      root.classList.remove("running");
    }
    return { words: showTimes([answer]), answers: [answer] };
  }

  /** Say that the answer is timed; nothing is drawn until it is. */
  function sayTimed() {
    clock.textContent = "Timed some times more, with nothing drawn…";
  }

  /** Show the medians of answers to the same prompt; return them in words. */
  function showTimes(answers) {
    const { numTokens, reading, told } = answers[0];
    const decodes = answers.map(({ decode }) => decode).filter((decode) => decode !== null);
    const isReadLate = answers.some((answer) => answer.isReadLate);
    show(figures.tokens, digits(numTokens));
    show(figures.ttft, `${isReadLate ? "≤ " : ""}${seconds(median(answers.map(({ ttft }) => ttft)))}`);
    if (decodes.length) show(figures.rate, rate(median(decodes)));
    else show(figures.rate, whyNoDecode(numTokens, reading, told), "why");
    const what = answers.length > 1 ? `Median of ${answers.length} more answers, not drawn` : "One answer, drawn as it came";
    const byClock = clockOf(answers.every((answer) => answer.told) ? "server" : "browser");
    clock.textContent = `${what}; times ${byClock}. ${told ? "" : overHop(model)}`.trimEnd();
    return `${name}: ${numTokens} tokens${decodes.length ? ` at ${rate(median(decodes))}` : ""}.`;
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

  return { root, wait, run, sayTimed, showTimes };
}
