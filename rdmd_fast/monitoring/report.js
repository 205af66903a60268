"use strict";
/* Draws the plots of the data in #data and moves the pictures. Text from the data is set as text, never as HTML. */
const data = JSON.parse(document.getElementById("data").textContent);
const WIDTH = 520, HEIGHT = 220, LEFT = 58, RIGHT = 14, TOP = 8, BOTTOM = 24;
const svgSpace = document.createRange().createContextualFragment("<svg></svg>").firstChild.namespaceURI;

function make(name, attributes, parent, text) {
  const element = parent.namespaceURI === svgSpace || name === "svg"
    ? document.createElementNS(svgSpace, name) : document.createElement(name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

/* Four significant digits. */
function number(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(3).replace(/\.?0*e\+?/, "e");
  return String(Number(value.toPrecision(4)));
}

/* About `count` round numbers between two. */
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((each) => each * power >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

function logTicks(low, high) {
  const decades = Math.log10(high / low), every = Math.ceil(decades / 5);
  const parts = decades > 2.5 ? [1] : [1, 2, 5], found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const part of parts)
      if (e % every === 0 && part * 10 ** e >= low && part * 10 ** e <= high) found.push(part * 10 ** e);
  return found.length > 1 ? found : ticks(low, high, 4);
}

/* Place of the value in sorted `steps` that is nearest to `step`. */
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
}

function extent(lists) {
  let low = Infinity, high = -Infinity;
  for (const list of lists) for (const value of list) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

function drawPlot(plot, parent) {
  const box = make("div", {class: "plot"}, parent);
  const title = make("h4", {}, box);
  make("span", {}, title, plot.name);
  const readout = make("p", {}, box);
  const svg = make("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img",
    "aria-label": `${plot.name} by iteration; arrow keys read it out`}, box);
  const [smallest, largest] = extent(plot.curves.map((curve) => curve.y));
  const [first, last] = extent(plot.curves.map((curve) => curve.x));
  const longest = plot.curves.reduce((a, b) => (b.x.length > a.x.length ? b : a)).x;
  let logarithmic = smallest > 0 && largest > 100 * smallest, y, cursor;
  const x = (step) => LEFT + (WIDTH - LEFT - RIGHT) * (last > first ? (step - first) / (last - first) : 0.5);
  if (smallest > 0) {
    const label = make("label", {}, title);
    const box = make("input", {type: "checkbox"}, label);
    label.append(" log");
    box.checked = logarithmic;
    box.addEventListener("change", () => { logarithmic = box.checked; draw(); read(); });
  }

  function draw() {
    svg.replaceChildren();
    const f = logarithmic ? Math.log : Number;
    let low = f(smallest), high = f(largest);
    const margin = high > low ? (high - low) * 0.05 : 0.5;
    low -= margin; high += margin;
    y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (high - f(value)) / (high - low);
    const marks = logarithmic ? logTicks(Math.exp(low), Math.exp(high)) : ticks(low, high, 5);
    for (const mark of marks) {
      make("line", {class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(mark), y2: y(mark)}, svg);
      make("text", {x: LEFT - 6, y: y(mark) + 4, "text-anchor": "end"}, svg, number(mark));
    }
    for (const mark of last > first ? ticks(first, last, 6) : [first])
      if (Number.isInteger(mark))
        make("text", {x: x(mark), y: HEIGHT - 7, "text-anchor": x(mark) > WIDTH - 40 ? "end" : "middle"}, svg,
          mark.toLocaleString("en"));
    for (const curve of plot.curves) {
      const group = make("g", {class: `run-${curve.run % 8}`}, svg);
      let path = "";
      for (let k = 0; k < curve.x.length; k++)
        path += `${k ? "L" : "M"}${x(curve.x[k]).toFixed(1)} ${y(curve.y[k]).toFixed(1)}`;
      make("path", {d: path, class: curve.truth ? "truth" : ""}, group);
      if (!curve.truth && longest.length <= 40)
        curve.x.forEach((step, k) => make("circle", {cx: x(step), cy: y(curve.y[k]), r: 2.4}, group));
    }
    cursor = make("g", {}, svg);
  }

  /* Values at the points nearest to a step; the last ones without one. */
  function read(step) {
    readout.replaceChildren();
    cursor.replaceChildren();
    if (step !== undefined) {
      make("span", {}, readout, `at ${Math.round(step).toLocaleString("en")}: `);
      make("line", {class: "cursor", x1: x(step), x2: x(step), y1: TOP, y2: HEIGHT - BOTTOM}, cursor);
    }
    for (const curve of plot.curves.filter((each) => !each.truth)) {
      const at = (each) => (step === undefined ? each.x.length - 1 : nearest(each.x, step));
      const k = at(curve), truth = plot.curves.find((each) => each.truth && each.run === curve.run);
      let text = `${data.runs.length > 1 ? data.runs[curve.run] : ""} ${number(curve.y[k])}`;
      if (step !== undefined && curve.x[k] !== step) text += ` at ${curve.x[k].toLocaleString("en")}`;
      if (truth) text += ` (should be ${number(truth.y[at(truth)])})`;
      make("span", {class: `run-${curve.run % 8}`}, readout, `${text} `);
      if (step !== undefined)
        make("circle", {cx: x(curve.x[k]), cy: y(curve.y[k]), r: 4}, make("g", {class: `run-${curve.run % 8}`}, cursor));
    }
  }

  let place = longest.length - 1;
  svg.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect();
    const inside = ((event.clientX - area.left) / area.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    place = nearest(longest, first + Math.min(1, Math.max(0, inside)) * (last - first));
    read(longest[place]);
  });
  for (const name of ["pointerleave", "blur"]) svg.addEventListener(name, () => read());
  svg.addEventListener("keydown", (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!move) return;
    event.preventDefault();
    place = Math.min(longest.length - 1, Math.max(0, place + move));
    read(longest[place]);
  });
  draw();
  read();
}

function scrubPictures() {
  const input = document.getElementById("scrubber");
  if (!input) return;
  const figures = [...document.querySelectorAll(".pictures figure")];
  const step = (picture) => Number(picture.dataset.step);
  const steps = [...new Set([...document.querySelectorAll(".pictures img")].map(step))].sort((a, b) => a - b);
  input.max = steps.length - 1;
  function show() {
    const chosen = steps[input.value];
    input.nextElementSibling.textContent = chosen.toLocaleString("en");
    input.setAttribute("aria-valuetext", `iteration ${chosen}`);
    for (const figure of figures) {
      const pictures = [...figure.querySelectorAll("img")];
      if (!pictures.length) continue;
      const now = pictures.filter((picture) => step(picture) <= chosen).pop() || pictures[0];
      for (const picture of pictures) picture.hidden = picture !== now;
      figure.querySelector(".shown").textContent = `${now.dataset.name}, iteration ${step(now).toLocaleString("en")}`;
    }
  }
  input.value = steps.length - 1;
  input.addEventListener("input", show);
  show();
  input.parentElement.hidden = steps.length < 2;
}

for (const section of document.querySelectorAll(".plots"))
  for (const plot of data.plots[section.dataset.section]) drawPlot(plot, section);
scrubPictures();
