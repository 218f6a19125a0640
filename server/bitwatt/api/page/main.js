// Polls the server's figures and hands them to the page's parts.

import { getJson, keepKey } from "./api.js";
import { makeAsk } from "./ask.js";
import { makeCharts } from "./charts.js";
import { byId, make, markOf, setDisabled, withFlags } from "./dom.js";
import { bytes } from "./format.js";
import { makeHeadline } from "./headline.js";
import { makeLoad, showResult, showTable } from "./load.js";
import { identityOf, keep, kept } from "./measured.js";
import { showMemory, weightBytes } from "./memory.js";
import { machineOf, weightsOf, whatTwin, whyOfItsSize } from "./pair.js";
import { summaryOf } from "./summary.js";

const POLL_MS = 1000;
const TRY_AGAIN_MS = 3000;

const HOW_TO_COMPARE = {
  ternary: "bitwatt serve MODEL --compare sets the same model in 16 bits beside it, --twin another one, --twin-url one of another server, and shows what ternary weights save",
  dense: "--twin-url of the server that has the ternary model sets it beside this one and shows what ternary weights save",
};

const UNDRAWN =
  "Drawing an answer takes cores from a server on this machine: the times of short answers are the median of more that aren't drawn, after a second of warm-up. It is a glimpse; the load below measures.";

let sides = {};
let identity = null;
let result = null;
let failure = null;
let quickNotBefore = 0;
let since = 0;
let ratesShown = null;

const runLoad = () => isBusy() || loader.runForm(sides);
const headline = makeHeadline(runLoad);
const charts = makeCharts();
const ask = makeAsk({ onChange: () => showBusy() });
const loader = makeLoad({
  onChange: () => showBusy(),
  onDone(found) {
    result = found;
    keep(identity, found);
  },
});
const isBusy = () => ask.isRunning || loader.kind === "load";

function showHeadline() {
  setText(byId("summary"), summaryOf(sides, result));
  headline.show(sides, result, loader.kind, failure, isBusy());
}


/** One at a time: a prompt beside a load would slow both, and neither's figures were true. */
function showBusy() {
  for (const id of ["ask-run", "load-run"]) setDisabled(byId(id), isBusy());
  showHeadline();
}

/** Return the two that are compared: the ternary model is a, the other b. */
function pick(models) {
  const a = models.find((model) => model.weights === "ternary") ?? models[0];
  const b = models.find((model) => model !== a);
  return b ? { a, b } : { a };
}

function showModels(models) {
  const beside = models.map(weightBytes);
  const items = models.map((model) => {
    const side = Object.keys(sides).find((key) => sides[key].name === model.name);
    const what = [
      model.state,
      model.dtype && weightsOf(model),
      model.backend && `${model.backend} kernels`,
      model.memory && bytes(weightBytes(model), { beside }),
      model.is_remote && "another server",
    ];
    return make(
      "li",
      {},
      ...(side ? [markOf(side)] : []),
      make("strong", {}, model.name),
      make("span", { className: "what" }, ` ${what.filter(Boolean).join(" · ")}`),
    );
  });
  byId("models").replaceChildren(...items);
}

/** Say in a sentence what is compared with what. */
function showCompared({ a, b }) {
  const said = !a.dtype || (b && !b.dtype)
    ? ""
    : b
      ? `${a.name} (${weightsOf(a)}) against ${b.name}, ${whatTwin(a, b)}: above 1× ${
          a.weights === "ternary" ? "ternary" : a.name
        } saves, below it loses.`
      : `${a.name} is served with ${weightsOf(a)}, alone; ${HOW_TO_COMPARE[a.weights]}.`;
  setText(byId("compared"), said);
  setText(byId("machine"), machineOf(b ? [a, b] : [a]));
  setText(byId("size"), said && b ? whyOfItsSize(a, b) : "");
  setText(byId("tagline"), b ? "What ternary weights save, measured on this server" : "A model and what it takes, measured on this server");
  setText(byId("ask-title"), b ? "Ask both" : "Ask");
  setText(byId("ask-run"), b ? "Ask both" : "Ask");
  setText(byId("ask-hint"), b
    ? `One prompt, one seed, asked in turn: ${b.name} starts when ${a.name} has ended, so neither slows the other. ${UNDRAWN}`
    : `One prompt, one seed. ${UNDRAWN}`);
  setText(byId("load-windows-label"), b ? "Windows of each" : "Windows");
  setText(byId("load-hint"), b
    ? `The same prompts to each model in alternating windows, A B A B; warm-up windows are dropped. Every answer is as long as is set, so equal work is compared.`
    : "Prompts in windows; warm-up windows are dropped. Every answer is as long as is set.");
  setText(byId("terminal"), b ? "More windows, intervals and a picture:" : "The same from a terminal:");
  const { origin } = location;
  const urls = b?.is_remote ? "URL-A URL-B" : `${origin} ${origin}`;
  setPlain(byId("terminal-command"), b ? `bitwatt compare ${urls}` : `bitwatt bench ${origin}`);
}

function setPlain(element, said) {
  if (element.textContent !== said) element.textContent = said;
}

function setText(element, said) {
  if (element.textContent !== said) element.replaceChildren(...withFlags(said));
}

async function poll() {
  const state = await getJson(`/bitwatt/v1/comparison?since=${since}`);
  since = state.time_s.at(-1) ?? since;
  const models = state.models.map((model) => ({ ...model.engine, ...model }));
  sides = pick(models);
  const isUp = models.every((model) => model.state === "ready");
  if (isUp) {
    recall(identityOf(state.version, sides));
    renewTable();
  }
  setText(byId("version"), state.version);
  showModels(models);
  showMemory(sides);
  showCompared(sides);
  ask.show(sides);
  if (state.time_s.length) charts.take(state, sides);
  const problems = models.filter((model) => model.fallback).map((model) => `${model.name}: ${model.fallback}.`);
  problems.push(...models.filter((model) => model.quantized).map((model) => `${model.name}: ${model.quantized}.`));
  if (state.twin?.problem) problems.push(`The twin at ${state.twin.url}: ${state.twin.problem}.`);
  showProblem(problems.join(" "));
  showHeadline();
  if (isUp && state.measures_first) lookOnce(models);
}

/** Take up what was measured of these models before. */
function recall(now) {
  if (now === identity) return;
  identity = now;
  failure = null;
  result = kept(identity);
  byId("load-result").hidden = !result;
  if (result) showResult(result, sides);
}

/** Show the table anew once memory's rates are known, or others. */
function renewTable() {
  const now = JSON.stringify(Object.values(sides).map((model) => model.read_bytes_per_s));
  if (now !== ratesShown && result) showTable(result, sides);
  ratesShown = now;
}

/** Measure quickly while nobody calls, if nothing is measured yet; give way to callers. */
async function lookOnce(models) {
  if (loader.kind === "quick") {
    if (loader.isDisturbed(models)) loader.giveWay();
    return;
  }
  const isIdle = models.every((model) => model.num_open === 0) && !ask.isRunning;
  if (result || failure || loader.kind || !isIdle || performance.now() < quickNotBefore) return;
  const error = await loader.runQuick(sides);
  // Two pages that began together don't begin together again.
  quickNotBefore = performance.now() + TRY_AGAIN_MS * (1 + Math.random());
  if (error && error.name !== "AbortError") failure = error.message;
  showHeadline();
}

function showProblem(said) {
  setText(byId("problem"), said);
  byId("problem").hidden = !said;
}

async function pollForever() {
  for (;;) {
    // What draws the figures would slow the model that is asked; the server keeps them meanwhile.
    if ((!document.hidden || since === 0) && !ask.isRunning) {
      try {
        await poll();
      } catch (error) {
        if (error.status === 401) {
          askForKey();
          return;
        }
        showProblem(error.message);
      }
    }
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

function askForKey() {
  byId("key-form").hidden = false;
  byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(byId("key").value);
  byId("key").value = "";
  byId("savings-title").focus();
  byId("key-form").hidden = true;
  pollForever();
});

byId("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (isBusy()) return;
  await loader.giveWay();
  if (!isBusy()) ask.run(sides);
});

byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});

byId("load").addEventListener("submit", (event) => {
  event.preventDefault();
  runLoad();
});

pollForever();
