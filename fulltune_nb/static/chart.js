// The chart's page side: fulltune_nb/chart.py puts uPlot before this file and says what is sent. Foreign text goes through `text` alone.

const PANES = [
  { name: "Loss", fields: ["loss"], smooths: true, evals: true },
  { name: "Learning rate", fields: ["learning_rate"] },
  { name: "Gradient norm", fields: ["grad_norm"], smooths: true },
  { name: "Tokens/s", fields: ["tokens_per_second"], smooths: true },
  { name: "Memory", fields: ["peak_memory", "active_memory", "cache_memory"], bytes: true },
];
const LABELS = {
  loss: "training", learning_rate: "learning rate", grad_norm: "gradient norm", tokens_per_second: "tokens/s",
  peak_memory: "peak", active_memory: "in use after it", cache_memory: "MLX's cache",
};
const SPLITS = { valid: "validation", test: "test", train: "train split" };
// Colours that stand out (3:1 and more) from a light page, and from a dark one; runs differ in dashes besides.
const LIGHT = ["#0072B2", "#D55E00", "#00805D", "#B0528A", "#7A5C00", "#5A5A5A"];
const DARK = ["#56B4E9", "#FF8A3D", "#2BD19B", "#EF9FCB", "#F0E442", "#BBBBBB"];
const DASHES = [[], [7, 4], [2, 3]];
const MOST_RUNS = LIGHT.length * DASHES.length; // with looks of their own; further ones are grey
const EVENTS_LISTED = 100, EVENTS_DRAWN = 300, TABLE_ROWS = 60, HEIGHT = 300, SMOOTHEST = 200;

// -- what was sent ------------------------------------------------------------------------------------------------------

const numbers = (view) => {
  if (view instanceof ArrayBuffer) return new Float64Array(view.slice(0));
  return new Float64Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
};
const widthOf = (size) => (size === 1 ? 2 : 7); // numbers of a stretch; see `stretches` in chart.py

function appended(old, keep, more) {
  const all = new Float64Array(keep + more.length);
  all.set(old.subarray(0, keep));
  all.set(more, keep);
  return all;
}

function extend(list, more) { // rows that both have are the same
  if (more.from < list.from || more.from > list.from + list.rows.length) list = { from: more.from, rows: [] };
  return { from: list.from, rows: [...list.rows.slice(0, more.from - list.from), ...more.rows] };
}

class Run {
  constructor(name) {
    Object.assign(this, { name, size: 0, count: 0, fields: {}, last: [], evals: { from: 0, rows: [] }, events: { from: 0, rows: [] } });
  }

  // Whether it fits to what is there; else something was missed.
  take(message, fields) {
    const keep = message.from * widthOf(message.size);
    if (message.from > 0 && (message.size !== this.size || !(keep <= (this.fields.loss?.length ?? -1)))) return false;
    for (const [field, more] of Object.entries(fields)) {
      this.fields[field] = appended(this.fields[field] ?? new Float64Array(0), keep, numbers(more));
    }
    Object.assign(this, { size: message.size, count: message.count, first: message.first, last: message.last });
    this.evals = extend(this.evals, message.evals);
    this.events = extend(this.events, message.events);
    return true;
  }
}

// A curve as [steps, values], null where it breaks; and how many of its steps are not finite, with where they are.
function points({ size, count, fields }, field, last) {
  const flat = fields[field] ?? [], width = widthOf(size), x = [], y = [], broken = [];
  let missing = 0;
  for (let i = 0; i < flat.length; i += width) {
    for (let j = i; j < i + Math.min(width, 4); j += 2) {
      if (j > i && flat[j] === flat[i]) continue; // least and greatest are one step
      x.push(flat[j]);
      y.push(Number.isNaN(flat[j + 1]) ? null : flat[j + 1]);
    }
    const holes = size === 1 ? +Number.isNaN(flat[i + 1]) : Math.min(size, count - (i / width) * size) - flat[i + 6];
    if (holes > 0) broken.push(flat[i]);
    missing += Math.max(0, holes);
  }
  if (last && x.length && last[0] > x[x.length - 1]) {
    x.push(last[0]);
    y.push(last[1]);
  }
  return { x, y, broken, missing };
}

// The mean over `window` steps around each, by the means of stretches: never across a break.
function smoothed({ size, fields }, field, window) {
  const flat = fields[field] ?? [], width = widthOf(size), at = size === 1 ? [0, 1] : [4, 5];
  const n = flat.length / width, half = Math.max(1, Math.round(window / size / 2)), x = [], y = [];
  const sums = new Float64Array(n + 1), weights = new Float64Array(n + 1), start = new Int32Array(n);
  for (let i = 0; i < n; i++) {
    const value = flat[i * width + at[1]], weight = Number.isNaN(value) ? 0 : size === 1 ? 1 : flat[i * width + 6];
    sums[i + 1] = sums[i] + (weight ? value * weight : 0);
    weights[i + 1] = weights[i] + weight;
    start[i] = weight ? (i && weights[i] > weights[i - 1] ? start[i - 1] : i) : i + 1;
  }
  let end = n;
  for (let i = n - 1; i >= 0; i--) {
    if (weights[i + 1] === weights[i]) end = i;
    else if (i + 1 < n && weights[i + 2] === weights[i + 1]) end = i + 1;
    const low = Math.max(start[i], i - half), high = Math.min(end, i + half + 1), weight = weights[high] - weights[low];
    x[i] = flat[i * width + at[0]];
    y[i] = weights[i + 1] > weights[i] && weight > 0 ? (sums[high] - sums[low]) / weight : null;
  }
  return { x, y };
}

// Where a value has no neighbour that a line could go to: it is drawn as a point. What is undefined are steps of other curves.
function alone(plot, series) {
  const y = plot.data[series], found = [];
  let before = null, last = -1; // the value before the last one, and where the last one is
  for (let i = 0; i <= y.length; i++) {
    if (y[i] === undefined && i < y.length) continue;
    if (last >= 0 && y[last] !== null && before === null && (y[i] ?? null) === null) found.push(last);
    before = last >= 0 ? y[last] : null;
    last = i;
  }
  return found.length ? found : null;
}

function nearest(x, value) {
  let low = 0, high = x.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] <= value) low = middle;
    else high = middle;
  }
  return high < 0 ? -1 : Math.abs(x[low] - value) <= Math.abs(x[high] - value) ? low : high;
}

// -- words ----------------------------------------------------------------------------------------------------------------

const step = (value) => Math.round(value).toLocaleString("en-US");
function figure(value, pane) {
  if (value === null || value === undefined || Number.isNaN(value)) return "not finite";
  if (pane.bytes) return value >= 1e8 ? `${(value / 1e9).toFixed(2)} GB` : `${(value / 1e6).toFixed(2)} MB`;
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size && (size < 1e-3)) return value.toExponential(3);
  return value.toFixed(4);
}
function tick(value, pane, increment) {
  if (pane.bytes) return value >= 1e8 ? `${+(value / 1e9).toPrecision(4)} GB` : `${+(value / 1e6).toPrecision(4)} MB`;
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return (+value.toPrecision(3)).toExponential();
  return value.toLocaleString("en-US", { maximumFractionDigits: increment && increment < 1 ? 6 : 4 });
}

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children); // texts stay texts
  return element;
}

// -- the view -------------------------------------------------------------------------------------------------------------

class View {
  constructor(store, el) {
    Object.assign(this, { store, el, pane: PANES[0], smoothing: 0, log: false, zoom: null, part: null, hidden: new Set(), at: null });
    this.plot = null;
    this.build();
    this.resizing = new ResizeObserver(() => this.resize()); // told of the first size too, when the page has placed it
    this.resizing.observe(this.box);
  }

  remove() {
    this.resizing.disconnect();
    clearTimeout(this.asking);
    this.plot?.destroy();
  }

  build() {
    this.panes = PANES.map((pane) => make("button", { type: "button", onclick: () => this.choose(pane) }, pane.name));
    this.slider = make("input", { type: "range", min: 0, max: 20, step: 1, value: 0, oninput: () => this.smooth() });
    this.window = make("span", { class: "ft-window" }, "off");
    this.scale = make("input", { type: "checkbox", onchange: () => ((this.log = this.scale.checked), this.show()) });
    this.back = make("button", { type: "button", hidden: "", onclick: () => this.zoomTo(null) }, "Whole run");
    const bar = make("div", { class: "ft-bar" },
      make("div", { class: "ft-panes", role: "group", "aria-label": "what is shown" }, ...this.panes),
      make("label", {}, "smoothing ", this.slider, this.window),
      make("label", {}, this.scale, " log"), this.back);
    this.box = make("div", {
      class: "ft-plot", tabindex: 0, role: "img", "data-lm-suppress-shortcuts": "true", onkeydown: (event) => this.key(event),
      title: "Drag to zoom, double click back. Keys: arrows move, + and − zoom, Escape shows all.",
    });
    this.legend = make("div", { class: "ft-legend" });
    this.said = make("div", { class: "ft-hidden", "aria-live": "polite" });
    this.list = make("div");
    this.events = make("details", { class: "ft-events", hidden: "", ontoggle: () => this.showEvents() }, make("summary"), this.list);
    this.rows = make("div", { class: "ft-scroll", tabindex: 0, role: "region", "aria-label": "values" });
    this.table = make("details", { class: "ft-table", ontoggle: () => this.fillTable() }, make("summary", {}, "Table"), this.rows);
    this.el.classList.add("ft-chart");
    // Its colour follows the page's theme, however that is set; a transition ends, or is broken off, when it has changed.
    for (const ending of ["transitionend", "transitioncancel"]) {
      this.el.addEventListener(ending, (event) => {
        if (event.target !== this.el) return;
        clearTimeout(this.recolouring);
        this.recolouring = setTimeout(() => this.show(), 50);
      });
    }
    this.el.append(bar, this.box, this.legend, this.said, this.events, this.table);
  }

  // -- what the user does

  choose(pane) {
    this.pane = pane;
    this.show();
  }

  smooth() {
    this.smoothing = +this.slider.value && Math.round(SMOOTHEST ** (this.slider.value / 20)) * 2 + 1;
    this.slider.ariaValueText = this.window.textContent = this.smoothing ? `${this.smoothing} steps` : "off";
    this.show();
  }

  zoomTo(range) {
    this.zoom = range;
    this.part = null;
    this.ask();
    this.show();
  }

  // The steps of the part that is looked at, where the page has not all of them.
  ask() {
    clearTimeout(this.asking);
    if (this.zoom && this.store.runs.some((run) => run.size > 1)) {
      this.asking = setTimeout(() => this.store.ask(this, this.zoom), 60);
    }
  }

  key(event) {
    const x = this.plot?.data[0] ?? [], [low, high] = this.zoom ?? this.range(), span = high - low;
    const middle = this.at ?? (low + high) / 2;
    const jump = event.shiftKey ? 10 : 1;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const here = this.at === null ? x.length : nearest(x, this.at);
      const next = x[Math.min(x.length - 1, Math.max(0, here + (event.key === "ArrowLeft" ? -jump : jump)))];
      if (next !== undefined) {
        this.plot.setCursor({ left: this.plot.valToPos(next, "x"), top: 10 });
        this.read(next);
        this.said.textContent = this.legend.textContent;
      }
    } else if (event.key === "+" || event.key === "=") this.zoomTo([middle - span / 4, middle + span / 4]);
    else if (event.key === "-") this.zoomTo(span * 2 >= this.range()[1] - this.range()[0] ? null : [middle - span, middle + span]);
    else if (event.key === "Escape") this.zoomTo(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // -- what is drawn

  range() {
    const { runs } = this.store, evals = runs.flatMap((run) => run.evals.rows.map((row) => row[1]));
    const last = Math.max(1, ...runs.map((run) => run.last[0] ?? 1), ...evals);
    const first = Math.min(last - 1, ...runs.map((run) => run.first ?? last), ...evals);
    return [first, last];
  }

  curves() {
    const { runs } = this.store, many = runs.length > 1, found = [];
    const fields = many ? this.pane.fields.slice(0, 1) : this.pane.fields, smoothing = this.pane.smooths ? this.smoothing : 0;
    runs.forEach((run, number) => {
      const source = this.part?.[number] ?? run;
      fields.forEach((field, which) => {
        const look = many ? number : which, label = many ? run.name : LABELS[field];
        const last = this.part ? null : [run.last[0], run.last[1 + Object.keys(LABELS).indexOf(field)] ?? null];
        const raw = points(source, field, last);
        found.push({ key: `${number} ${field}`, label, look, faint: smoothing > 0, ...raw });
        if (raw.missing) {
          found.push({ key: `${number} ${field} broken`, label: `${label}, not finite`, look: many ? number : 1, marks: raw.broken, count: raw.missing });
        }
        if (smoothing) found.push({ key: `${number} ${field} mean`, label: `${label}, mean`, look, thick: true, ...smoothed(source, field, smoothing) });
      });
      if (this.pane.evals) {
        const splits = [...new Set(run.evals.rows.map((row) => row[0]))];
        splits.forEach((split, which) => {
          const rows = run.evals.rows.filter((row) => row[0] === split).sort((a, b) => a[1] - b[1]);
          const label = SPLITS[split] ?? split;
          found.push({
            key: `${number} eval ${split}`, label: many ? `${run.name}, ${label}` : label, look: many ? number : 1 + which, dots: true,
            x: rows.map((row) => row[1]), y: rows.map((row) => row[2]),
          });
        });
      }
    });
    const { limit } = this.store, highest = found.reduce((most, curve) => curve.y?.reduce((a, b) => Math.max(a, b), most) ?? most, 0);
    if (this.pane.bytes && limit && highest) { // far above, its line would press the curves to the ground
      const near = highest > limit / 4, x = near ? this.range() : [];
      found.push({ key: "limit", label: `limit of this machine ${figure(limit, this.pane)}`, look: 5, thick: true, x, y: x.map(() => limit) });
    }
    return found;
  }

  show() {
    if (!this.box.isConnected) return;
    const drawn = this.curves();
    this.drawn = drawn;
    this.panes.forEach((button, number) => button.setAttribute("aria-pressed", String(PANES[number] === this.pane)));
    this.back.hidden = !this.zoom;
    this.slider.disabled = !this.pane.smooths;
    const style = getComputedStyle(this.el);
    this.ink = style.color;
    this.paper = style.getPropertyValue("--ft-paper").trim() || "#fff";
    const [red, green, blue] = this.ink.match(/[\d.]+/g).map(Number);
    this.dark = 0.3 * red + 0.59 * green + 0.11 * blue > 128;
    const lines = drawn.filter((curve) => curve.x);
    const made = JSON.stringify([lines.map((curve) => [curve.key, curve.faint]), this.pane.name, this.log, this.dark, this.ink]);
    const data = this.data(lines);
    if (made !== this.made) {
      this.made = made;
      this.plot?.destroy();
      this.plot = new uPlot(this.options(lines), data, this.box);
    } else this.plot.setData(data, false);
    const [low, high] = this.zoom ?? this.range();
    this.plot.batch(() => {
      lines.forEach((curve, i) => this.plot.setSeries(i + 1, { show: !this.hidden.has(curve.key) }));
      this.plot.setScale("x", { min: low, max: high });
    });
    this.showLegend();
    this.showEvents();
    this.describe();
    this.fillTable();
  }

  data(lines) {
    const positive = (values) => (this.log ? values.map((value) => (value > 0 ? value : null)) : values);
    return lines.length ? uPlot.join(lines.map((curve) => [curve.x, positive(curve.y)])) : [[]];
  }

  colour(curve) {
    return curve.look >= MOST_RUNS ? (this.dark ? "#777" : "#aaa") : (this.dark ? DARK : LIGHT)[curve.look % LIGHT.length];
  }

  options(lines) {
    const pane = this.pane, grid = { stroke: this.dark ? "#ffffff22" : "#00000018", width: 1 }, axis = { stroke: this.ink, grid, ticks: grid };
    const series = lines.map((curve) => ({
      stroke: this.colour(curve), width: curve.thick ? 2.4 : curve.faint ? 0.8 : 1.6, alpha: curve.faint ? 0.45 : 1,
      dash: curve.dots && this.store.runs.length > 1 ? [4, 4] : DASHES[Math.floor(curve.look / LIGHT.length) % DASHES.length],
      points: { show: !!curve.dots, size: curve.dots ? 7 : 5, fill: this.colour(curve), ...(curve.dots ? {} : { filter: alone }) },
      spanGaps: false,
    }));
    return {
      width: this.width(), height: HEIGHT, padding: [12, 28, 0, 0], legend: { show: false },
      cursor: { drag: { x: true, y: false, setScale: false }, points: { size: 7 }, y: false },
      scales: { x: { time: false }, y: { distr: this.log ? 3 : 1, range: (_, low, high) => this.room(low, high) } },
      axes: [
        { ...axis, values: (_, ticks) => ticks.map((value) => (Number.isInteger(value) ? step(value) : "")), label: "optimizer step", labelSize: 22, size: 34, labelFont: "12px system-ui, sans-serif", font: "12px system-ui, sans-serif" },
        { ...axis, size: 68, values: (_, ticks, __, ___, increment) => ticks.map((value) => (value === null ? "" : tick(value, pane, increment))), font: "12px system-ui, sans-serif" },
      ],
      series: [{}, ...series],
      hooks: {
        setSelect: [(plot) => this.selected(plot)],
        setCursor: [(plot) => this.read(plot.cursor.left >= 0 ? plot.posToVal(plot.cursor.left, "x") : null)],
        draw: [(plot) => this.drawMarks(plot)],
        ready: [(plot) => plot.over.addEventListener("dblclick", () => this.zoomTo(null))],
      },
    };
  }

  // Limits of the upright axis.
  room(low, high) {
    if (low === null || low === undefined) return this.log ? [0.1, 10] : [0, 1];
    if (this.log) return low === high ? [low / 2, high * 2] : [low / 1.1, high * 1.1];
    const edge = (high - low || Math.abs(high) || 1) * 0.06;
    return [low >= 0 && low < edge * 4 ? 0 : low - edge, high + edge];
  }

  selected(plot) {
    const { left, width } = plot.select;
    if (width > 3) this.zoomTo([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  }

  width() {
    return Math.max(120, Math.floor(this.box.clientWidth || 600));
  }

  // Also when the page takes the chart in again, which may have another theme since: out of the page no transition is told.
  resize() {
    if (!this.plot || getComputedStyle(this.el).color !== this.ink) this.show();
    if (this.plot && this.width() !== this.plot.width) this.plot.setSize({ width: this.width(), height: HEIGHT });
  }

  // Dotted lines where something happened, with their numbers in the list; crosses at the bottom where the loss was not finite.
  drawMarks(plot) {
    const { ctx, bbox } = plot, ratio = devicePixelRatio || 1;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left - 8 * ratio, 0, bbox.width + 16 * ratio, bbox.top + bbox.height);
    ctx.clip();
    ctx.strokeStyle = ctx.fillStyle = this.ink;
    ctx.font = `${10 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    let free = -Infinity;
    ctx.globalAlpha = 0.6;
    ctx.lineWidth = ratio;
    ctx.setLineDash([2 * ratio, 3 * ratio]);
    for (const event of this.allEvents().slice(-EVENTS_DRAWN)) {
      const x = Math.round(plot.valToPos(event.step, "x", true));
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      if (x > free) {
        ctx.fillText(String(event.number), x, bbox.top - 2 * ratio);
        free = x + 16 * ratio;
      }
    }
    ctx.setLineDash([]);
    ctx.globalAlpha = 1;
    ctx.lineWidth = 1.5 * ratio;
    for (const curve of this.drawn.filter((curve) => curve.marks && !this.hidden.has(curve.key))) {
      ctx.strokeStyle = this.colour(curve);
      for (const at of curve.marks) {
        const x = plot.valToPos(at, "x", true), y = bbox.top + bbox.height - 8 * ratio, arm = 3.5 * ratio;
        ctx.beginPath();
        ctx.moveTo(x - arm, y - arm); ctx.lineTo(x + arm, y + arm);
        ctx.moveTo(x + arm, y - arm); ctx.lineTo(x - arm, y + arm);
        ctx.stroke();
      }
    }
    ctx.restore();
  }

  // -- words beside it

  // Elements are made anew only where they change: the keyboard's focus may stand on them.
  showLegend() {
    const made = JSON.stringify(this.drawn.map((curve) => [curve.key, curve.label, this.colour(curve), this.hidden.has(curve.key)]));
    if (made !== this.legendMade) this.makeLegend();
    this.legendMade = made;
    this.read(this.at);
  }

  makeLegend() {
    const focused = [...this.legend.children].indexOf(this.legend.getRootNode().activeElement);
    this.where = make("span", { class: "ft-step" });
    this.values = new Map();
    const items = this.drawn.map((curve) => {
      const value = make("span", { class: "ft-value" });
      this.values.set(curve.key, value);
      const swatch = make("span", { class: curve.marks ? "ft-cross" : curve.dots ? "ft-dot" : "ft-line", "aria-hidden": "true" }, curve.marks ? "×" : "");
      swatch.style.color = this.colour(curve);
      return make("button", {
        type: "button", "aria-pressed": String(!this.hidden.has(curve.key)), title: "show or hide",
        onclick: () => (this.hidden.has(curve.key) ? this.hidden.delete(curve.key) : this.hidden.add(curve.key), this.show()),
      }, swatch, make("span", {}, curve.label), value);
    });
    this.legend.replaceChildren(this.where, ...items);
    this.legend.children[focused]?.focus();
  }

  // The values at a step, or the last ones.
  read(at) {
    this.at = at;
    if (!this.values) return;
    const curves = this.drawn.filter((curve) => curve.x?.length && !curve.thick && !this.hidden.has(curve.key));
    const steps = curves.map((curve) => curve.x[at === null ? curve.x.length - 1 : nearest(curve.x, at)]);
    const near = at === null ? Math.max(...steps) : steps.reduce((a, b) => (Math.abs(b - at) < Math.abs(a - at) ? b : a), Infinity);
    this.where.textContent = !steps.length ? "nothing recorded yet" : at === null ? `last step ${step(near)}` : `step ${step(near)}`;
    for (const curve of this.drawn) {
      const value = this.values.get(curve.key);
      if (!value) continue; // the legend is not made yet
      if (curve.key === "limit") value.textContent = "";
      else if (curve.marks) value.textContent = `${curve.count.toLocaleString("en-US")}`;
      else if (!curve.x.length) value.textContent = "";
      else {
        const i = nearest(curve.x, near);
        value.textContent = figure(curve.y[i], this.pane) + (Math.abs(curve.x[i] - near) >= 1 ? ` at ${step(curve.x[i])}` : "");
      }
    }
  }

  allEvents() {
    const { runs } = this.store, many = runs.length > 1;
    let number = 0;
    return runs.flatMap((run) => run.events.rows.map(([at, kind, message]) => ({ step: at, kind, message, run: many ? `${run.name}: ` : "" })))
      .sort((a, b) => a.step - b.step).map((event) => ({ ...event, number: ++number }));
  }

  showEvents() {
    const events = this.allEvents(), before = this.store.runs.reduce((sum, run) => sum + run.events.from, 0), { open } = this.events;
    const made = JSON.stringify([before, events.length, events.at(-1), open]);
    if (made === this.eventsMade) return;
    this.eventsMade = made;
    this.events.hidden = !events.length;
    this.events.firstChild.textContent = `Events (${(before + events.length).toLocaleString("en-US")})`;
    const listed = open ? events.slice(-EVENTS_LISTED) : [], more = before + events.length - listed.length;
    const items = listed.map((event) => make("li", { value: event.number },
      make("b", {}, `${event.run}step ${step(event.step)}, ${event.kind}`), ` ${event.message}`));
    this.list.replaceChildren(make("ol", {}, ...items), more ? `… and ${more.toLocaleString("en-US")} before them` : "");
  }

  describe() {
    const said = this.drawn.filter((curve) => curve.x?.length).slice(0, 8).map((curve) => {
      const finite = curve.y.filter((value) => value !== null), last = curve.x.length - 1;
      if (!finite.length) return `${curve.label}: nothing finite`;
      const least = finite.reduce((a, b) => Math.min(a, b));
      return `${curve.label} from ${figure(finite[0], this.pane)} to ${figure(finite[finite.length - 1], this.pane)} at step ${step(curve.x[last])}, ` +
        `smallest ${figure(least, this.pane)} at step ${step(curve.x[curve.y.indexOf(least)])}`;
    });
    const [low, high] = this.zoom ?? this.range();
    this.box.setAttribute("aria-label", `${this.pane.name} over optimizer steps ${step(low)} to ${step(high)}. ${said.join("; ") || "Nothing recorded yet."}`);
  }

  fillTable() {
    if (!this.table.open) return;
    const [low, high] = this.zoom ?? this.range(), curves = this.drawn.filter((curve) => curve.x?.length);
    const steps = [...new Set(curves.flatMap((curve) => curve.x))].filter((x) => x >= low && x <= high).sort((a, b) => a - b);
    const every = Math.ceil(steps.length / TABLE_ROWS) || 1, shown = steps.filter((_, i) => i % every === 0 || i === steps.length - 1);
    const head = make("tr", {}, make("th", { scope: "col" }, "step"), ...curves.map((curve) => make("th", { scope: "col" }, curve.label)));
    const rows = shown.map((at) => make("tr", {}, make("th", { scope: "row" }, step(at)), ...curves.map((curve) => {
      const i = nearest(curve.x, at);
      return make("td", {}, curve.x[i] === at ? figure(curve.y[i], this.pane) : "");
    })));
    const told = every > 1 ? [make("div", {}, `${shown.length} of ${steps.length.toLocaleString("en-US")} steps; zoom in for more`)] : [];
    this.rows.replaceChildren(...told, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  }
}

// -- the model --------------------------------------------------------------------------------------------------------------

export default () => {
  const store = { runs: [], views: new Set(), waiting: false };
  let asked = 0;
  return {
    initialize({ model }) {
      const all = model.get("_whole");
      store.limit = all.limit;
      store.runs = (all.names ?? []).map((name) => new Run(name));
      (all.runs ?? []).forEach((message, number) => store.runs[number].take(message, message.fields));
      store.ask = (view, [low, high]) => {
        view.asked = ++asked;
        model.send({ kind: "part", low, high, id: asked });
      };
      const redraw = () => {
        if (store.waiting) return; // however many messages come between two pictures of the page
        store.waiting = true;
        requestAnimationFrame(() => {
          store.waiting = false;
          for (const view of store.views) view.show();
        });
      };
      model.on("msg:custom", (message, buffers) => {
        const fields = (i, names) => Object.fromEntries(names.map((name, j) => [name, buffers[i * names.length + j]]));
        if (message.kind === "news") {
          const fits = message.runs.map((run, i) => store.runs[run.run].take(run, fields(i, run.fields)));
          if (fits.includes(false)) model.send({ kind: "whole" });
          for (const view of store.views) if (view.zoom && view.zoom[1] >= view.range()[1]) view.ask();
        } else if (message.kind === "part") {
          for (const view of store.views) {
            if (view.asked === message.id && view.zoom) {
              view.part = message.runs.map((run, i) => ({ size: run.size, count: run.count, fields: Object.fromEntries(Object.entries(fields(i, run.fields)).map(([name, flat]) => [name, numbers(flat)])) }));
            }
          }
        }
        redraw();
      });
    },
    render({ el }) {
      const view = new View(store, el);
      store.views.add(view);
      return () => {
        store.views.delete(view);
        view.remove();
      };
    },
  };
};
