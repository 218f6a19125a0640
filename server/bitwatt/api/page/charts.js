// Live charts of the engines' figures. Sides differ by colour and by dashes.

import uPlot from "./vendor/uPlot.js";
import { byId, make, markOf } from "./dom.js";
import { digits } from "./format.js";

const KEEP_S = 300;
const MINUTE_S = 60;
const HEIGHT = 180;
const whole = (value) => digits(Math.round(value));
const percent = (value) => `${digits(value * 100)}%`;

const CHARTS = [
  { title: "Tokens generated a second", series: ["generation_tokens_per_s"], show: whole, least: 10 },
  { title: "KV cache in use", series: ["kv_cache_usage"], show: percent, least: 0.01 },
  { title: "Requests running (thin dots: waiting)", series: ["num_running", "num_waiting"], show: whole, least: 4 },
];

const clock = (time) => new Date(time * 1000).toLocaleTimeString("en-GB");
const colorOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Return charts that take in the points of each poll. */
export function makeCharts() {
  const times = [];
  const columns = {};
  const views = CHARTS.map((chart) => makeView(chart));
  byId("charts").append(...views.map((view) => view.root));
  let sides = {};

  function take(state, sidesNow) {
    sides = sidesNow;
    times.push(...state.time_s);
    for (const [side, model] of Object.entries(sides)) {
      for (const key of CHARTS.flatMap((chart) => chart.series)) {
        (columns[side + key] ??= []).push(...model.history[key]);
      }
    }
    const numOld = times.findIndex((time) => time >= times.at(-1) - KEEP_S);
    for (const column of [times, ...Object.values(columns)]) column.splice(0, Math.max(numOld, 0));
    showSpan(times.at(-1) - times[0]);
    for (const view of views) view.draw(times, columns, sides);
  }

  const redraw = () => views.forEach((view) => view.rebuild(times, columns, sides));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  return { take };
}

function showSpan(lengthS) {
  const said = lengthS < 2 * MINUTE_S ? `${Math.round(lengthS)} s` : `${Math.round(lengthS / MINUTE_S)} min`;
  byId("live-span").textContent = `the last ${said}`;
}

function makeView({ title, series, show, least }) {
  const now = make("p", { className: "now" });
  const plot = make("div", { className: "plot", role: "img" });
  const root = make("div", { className: "chart" }, make("h3", {}, title), now, plot);
  let chart = null;

  const keysOf = (sides) => Object.keys(sides).flatMap((side) => series.map((key) => side + key));

  function build(data, sides) {
    const axis = {
      stroke: colorOf("--quiet"),
      grid: { stroke: colorOf("--line"), width: 1 },
      ticks: { show: false },
    };
    const lines = Object.keys(sides).flatMap((side) =>
      series.map((key, index) => ({
        stroke: colorOf(`--${side}`),
        width: index === 0 ? 2 : 1,
        dash: index ? [2, 3] : side === "b" ? [6, 4] : undefined,
        fill: side === "a" && series.length === 1 ? colorOf("--a-area") : undefined,
        points: { show: false },
        label: key,
      })),
    );
    chart = new uPlot(
      {
        width: plot.clientWidth,
        height: HEIGHT,
        series: [{}, ...lines],
        axes: [
          { ...axis, size: 28, space: 70, values: (_, ticks) => ticks.map(clock) },
          { ...axis, size: 52, values: (_, ticks) => ticks.map(show) },
        ],
        scales: { y: { range: (_, low, high) => [0, Math.max(high ?? 0, least) * 1.1] } },
        cursor: { show: false },
        legend: { show: false },
      },
      data,
      plot,
    );
  }

  function draw(times, columns, sides) {
    const data = [times, ...keysOf(sides).map((key) => columns[key])];
    if (chart === null) build(data, sides);
    else chart.setData(data);
    const said = Object.entries(sides).map(([side, model]) => {
      const values = series.map((key) => columns[side + key].at(-1));
      const shown = values.map((value) => (value == null ? "–" : show(value)));
      return { side, name: model.name, text: series.length === 2 ? `${shown[0]} + ${shown[1]} waiting` : shown[0] };
    });
    now.replaceChildren(
      ...said.map(({ side, text }) => make("span", {}, markOf(side), text)),
    );
    const described = said.map(({ name, text }) => `${name} ${text}`).join(", ");
    plot.setAttribute("aria-label", `${title}, line chart. Now: ${described}.`);
  }

  function rebuild(times, columns, sides) {
    if (chart === null) return;
    chart.destroy();
    chart = null;
    draw(times, columns, sides);
  }

  new ResizeObserver(() => {
    if (chart !== null && plot.clientWidth !== chart.width) {
      chart.setSize({ width: plot.clientWidth, height: HEIGHT });
    }
  }).observe(plot);
  return { root, draw, rebuild };
}
