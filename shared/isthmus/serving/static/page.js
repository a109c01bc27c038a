// The page's own behaviour beside htmx: the photo's preview, what a request asks for, errors, live rates.
"use strict";

const byId = (id) => document.getElementById(id);
const message = byId("message");
const drop = byId("drop");
const file = byId("file");

function say(text) {
  message.textContent = text;
  message.hidden = !text;
}

// The photo

let shown = "";
function preview() {
  URL.revokeObjectURL(shown);
  const chosen = file.files[0];
  shown = chosen ? URL.createObjectURL(chosen) : "";
  byId("preview").src = shown;
  byId("preview").hidden = !chosen;
  // An explanation sends the photo again, and this is another photo now.
  for (const button of document.querySelectorAll("button.why[hx-include='#photo']")) button.disabled = true;
  drop.querySelector("span").textContent = chosen ? chosen.name : "Drop a photo here, or choose one";
}
file.addEventListener("change", preview);
byId("preview").addEventListener("error", () => { byId("preview").hidden = true; });
for (const kind of ["dragenter", "dragover"]) {
  drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  if (!event.dataTransfer.files.length) return;
  file.files = event.dataTransfer.files;
  preview();
  byId("photo").requestSubmit();
});

// What htmx sends, and what it is told

document.addEventListener("htmx:configRequest", (event) => {
  if (event.detail.verb !== "post") return;
  say("");
  if (event.detail.path.includes("?")) return; // an explanation names its model and route
  const query = new URLSearchParams();
  for (const name of ["model", "beside"]) {
    const select = document.querySelector(`select[name=${name}]`);
    if (select && select.value) query.set(name, select.value);
  }
  event.detail.path += `?${query}`;
});
document.addEventListener("htmx:afterSwap", (event) => {
  for (const image of event.target.querySelectorAll("img[data-photo]")) image.src = shown;
});
document.addEventListener("htmx:responseError", (event) => {
  let text = event.detail.xhr.responseText;
  try {
    const error = JSON.parse(text);
    text = error.hint ? `${error.error}: ${error.hint}` : error.error;
  } catch { /* a gateway's own error is plain text */ }
  say(`${event.detail.xhr.status}: ${text.slice(0, 500)}`);
});
document.addEventListener("htmx:sendError", () => say("the function cannot be reached"));

// Live rates, from the difference of two readings of /metrics

const PERIOD_S = 2;
const KEPT = 90;
const WORK = /^(answer|infer|infer_version|explain|explain_model|explain_version|page_prediction|page_why)$/;
let before = null;
const series = [[], [], []];

function read(text) {
  const sums = { at: performance.now() / 1000, requests: 0, seconds: 0, timed: 0, sent: 0, flight: 0 };
  for (const line of text.split("\n")) {
    const match = /^(\w+)(\{[^}]*\})? ([\d.e+-]+)$/.exec(line);
    if (!match) continue;
    const [, name, labels = "", value] = match;
    const endpoint = /endpoint="([^"]*)"/.exec(labels);
    const works = endpoint && WORK.test(endpoint[1]);
    if (name === "isthmus_requests_total" && works) sums.requests += Number(value);
    if (name === "isthmus_request_seconds_sum" && works) sums.seconds += Number(value);
    if (name === "isthmus_request_seconds_count" && works) sums.timed += Number(value);
    if (name === "isthmus_hop_sent_bytes_total") sums.sent += Number(value);
    if (name === "isthmus_requests_in_flight") sums.flight = Number(value);
  }
  return sums;
}

function put(name, value) {
  document.querySelector(`[data-rate=${name}]`).textContent = value;
}

let chart = null;
function draw() {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  if (chart) chart.destroy();
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line") }, ticks: { stroke: colour("--line") } };
  const clock = (u, times) => times.map((at) => new Date(at * 1000).toTimeString().slice(0, 8));
  chart = new uPlot({
    width: byId("chart").clientWidth, height: 170, cursor: { drag: { x: false } }, legend: { live: false },
    scales: { requests: { range: (u, min, max) => [0, max || 1] }, sent: { range: (u, min, max) => [0, max || 1] } },
    axes: [{ ...axis, values: clock, space: 80 }, { ...axis, scale: "requests" }, { ...axis, scale: "sent", side: 1, grid: { show: false } }],
    series: [
      {},
      { label: "requests/s", scale: "requests", stroke: colour("--run"), width: 2 },
      { label: "kB/s to hops", scale: "sent", stroke: colour("--pack"), width: 2 },
    ],
  }, series, byId("chart"));
}

async function measure() {
  if (document.hidden) return;
  try {
    const response = await fetch("metrics", { headers: { Accept: "text/plain" } });
    if (!response.ok) return;
    const now = read(await response.text());
    if (before && now.requests >= before.requests && now.at > before.at) {
      const took = now.at - before.at;
      const timed = now.timed - before.timed;
      const requests = (now.requests - before.requests) / took;
      const sent = Math.max(0, now.sent - before.sent) / took / 1000;
      put("requests", requests.toFixed(1));
      if (timed > 0) put("ms", ((now.seconds - before.seconds) / timed * 1000).toFixed(1)); // else the last one stays
      put("sent", sent.toFixed(1));
      put("flight", String(now.flight));
      [Date.now() / 1000, requests, sent].forEach((value, i) => {
        series[i].push(value);
        if (series[i].length > KEPT) series[i].shift();
      });
      chart.setData(series);
    }
    before = now;
  } catch { /* the next reading tries again */ }
}

draw();
measure();
setInterval(measure, PERIOD_S * 1000);
window.addEventListener("resize", () => chart.setSize({ width: byId("chart").clientWidth, height: 170 }));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
