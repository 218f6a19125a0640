// Polls the server's figures and hands them to the page's parts.

import { getJson, keepKey } from "./api.js";
import { makeAsk } from "./ask.js";
import { makeCharts } from "./charts.js";
import { byId, make, markOf } from "./dom.js";
import { bytes } from "./format.js";
import { makeHeadline } from "./headline.js";
import { makeLoad } from "./load.js";
import { showMemory, weightBytes } from "./memory.js";

const POLL_MS = 1000;

let sides = {};
let asked = null;
let load = null;
let since = 0;

const headline = makeHeadline();
const charts = makeCharts();
const ask = makeAsk((answers) => {
  asked = answers;
  headline.show(sides, asked, load);
});
const loader = makeLoad((result) => {
  load = result;
  headline.show(sides, asked, load);
});

/** Return the two that are compared: the ternary model is a, the other b. */
function pick(models) {
  const a = models.find((model) => model.weights === "ternary") ?? models[0];
  const b = models.find((model) => model !== a);
  return b ? { a, b } : { a };
}

function showModels(models) {
  const items = models.map((model) => {
    const side = Object.keys(sides).find((key) => sides[key].name === model.name);
    const what = [
      model.state,
      model.dtype && (model.weights === "ternary" ? "2-bit weights" : model.dtype),
      model.backend,
      model.device_name,
      model.memory && bytes(weightBytes(model)),
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

async function poll() {
  const state = await getJson(`/bitwatt/v1/comparison?since=${since}`);
  since = state.time_s.at(-1) ?? since;
  const hasRent = Boolean(state.prices.usd_per_hour);
  state.models = state.models.map((model) => ({ ...model.engine, ...model, hasRent }));
  sides = pick(state.models);
  byId("version").textContent = state.version;
  showModels(state.models);
  showMemory(sides);
  headline.show(sides, asked, load);
  ask.show(sides);
  if (state.time_s.length) charts.take(state, sides);
  const isAlone = state.models.length < 2;
  showProblem(isAlone ? "One model is served. bitwatt serve --compare serves its 16-bit twin beside it." : "");
  byId("load-run").hidden = isAlone;
}

function showProblem(said) {
  if (byId("problem").textContent !== said) byId("problem").textContent = said;
  byId("problem").hidden = !said;
}

async function pollForever() {
  for (;;) {
    if (!document.hidden || since === 0) {
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
  byId("key-form").hidden = true;
  pollForever();
});

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask.run(sides);
});

byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});

byId("load").addEventListener("submit", (event) => {
  event.preventDefault();
  loader.run(sides);
});

pollForever();
