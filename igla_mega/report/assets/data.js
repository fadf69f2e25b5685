// The page's data as columns, the state of the view, and the formatting of numbers.

const byId = (id) => document.getElementById(id);
const DATA = JSON.parse(byId("data").textContent);
const MODES = { step: "step", tokens: "tokens", seconds: "training time" };

// ---- formatting
const rate = (v) => (v ? v.toExponential(2).replace(/[.]?0*e/, "e") : "0");
const percent = (v) => `${short(100 * v)} %`;
const gib = (v) => `${short(v / 2 ** 30)} GiB`;
const secs = (v) => `${short(v)} s`;
function short(v) {
  if (v === null || v === undefined || !Number.isFinite(v)) return "–";
  const a = Math.abs(v);
  if (a !== 0 && (a < 1e-3 || a >= 1e15)) return rate(v);
  for (const [size, unit] of [
    [1e12, "T"],
    [1e9, "B"],
    [1e6, "M"],
    [1e4, "k"],
  ])
    if (a >= size) return `${+(v / (unit === "k" ? 1e3 : size)).toPrecision(4)}${unit}`;
  return String(+v.toPrecision(4));
}
const whole = (v) => Math.round(v).toLocaleString("en-US");
function clock(s) {
  const d = Math.floor(s / 86400),
    h = Math.floor((s % 86400) / 3600),
    m = Math.floor((s % 3600) / 60);
  if (d) return `${d} d ${h} h`;
  if (h) return `${h}:${String(m).padStart(2, "0")} h`;
  if (m) return `${m}:${String(Math.floor(s % 60)).padStart(2, "0")} min`;
  return `${+s.toPrecision(3)} s`;
}
const sayX = (v) => (state.mode === "step" ? whole(v) : state.mode === "tokens" ? short(v) : clock(v));
const when = (t) => (t ? new Date(t * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" }) : "");
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null && value !== undefined)
      node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// ---- unpacking: the inverse of page.py's _pack_rows (bytes grouped by significance, deflate, base64)
async function unpack(packed) {
  const text = atob(packed.blob),
    bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
function unshuffle(bytes, at, count, size) {
  const out = new Uint8Array(count * size);
  for (let b = 0; b < size; b++)
    for (let i = 0, from = at + b * count; i < count; i++) out[i * size + b] = bytes[from + i];
  return out.buffer;
}
async function columns(packed) {
  const found = Object.create(null), // no prototype: a column may be named __proto__
    bytes = await unpack(packed),
    n = packed.rows;
  let at = 0;
  for (const [name, kind, scale] of packed.names) {
    if (kind === "d") {
      // ascending integers, stored as differences
      const values = new Float64Array(unshuffle(bytes, at, n, 8));
      for (let i = 1; i < n; i++) values[i] += values[i - 1];
      if (scale !== 1) for (let i = 0; i < n; i++) values[i] *= scale;
      found[name] = values;
      at += 8 * n;
    } else {
      found[name] = new Float32Array(unshuffle(bytes, at, n, 4));
      at += 4 * n;
    }
  }
  return found;
}
async function heat(packed) {
  const bytes = await unpack(packed),
    count = packed.steps.length * packed.rows;
  const raw = new Uint16Array(unshuffle(bytes, 0, count, 2)),
    values = new Float32Array(count);
  for (let i = 0; i < count; i++) values[i] = raw[i] * packed.scale;
  return { key: packed.key, steps: packed.steps, shape: packed.shape, rows: packed.rows, values };
}
async function take(run, news) {
  run.summary = news.summary;
  if (news.rows) {
    const rows = await columns(news.rows);
    if (news.first === 0 || !run.rows) run.rows = rows;
    else {
      const before = run.rows.step.length,
        after = rows.step.length;
      for (const name of new Set([...Object.keys(run.rows), ...Object.keys(rows)])) {
        const kind = name === "step" || name === "tokens" || name === "seconds" ? Float64Array : Float32Array;
        const joined = new kind(before + after).fill(NaN);
        if (run.rows[name]) joined.set(run.rows[name], 0);
        if (rows[name]) joined.set(rows[name], before);
        run.rows[name] = joined;
      }
    }
    run.smooth = new Map();
  }
  const { heats, ...rest } = news.rest;
  Object.assign(run, rest);
  if (heats) run.heats = await Promise.all(heats.map(heat));
  run.since = news.since;
}

// ---- state
const runs = DATA.runs.map((news, index) => ({
  index,
  name: news.name,
  title: news.title,
  shown: true,
  smooth: new Map(),
  heats: [],
}));
const state = { mode: "step", view: null, smooth: 0, marks: true, cursor: null, theme: "auto" };
const shownRuns = () => runs.filter((run) => run.shown);
const comparing = () => runs.length > 1;
const allEvents = () => shownRuns().flatMap((run) => (run.events ?? []).map((event) => ({ ...event, run })));

// ---- search and interpolation
function lower(xs, x) {
  // Return the first index whose value is not below x.
  let a = 0,
    b = xs.length;
  while (a < b) {
    const m = (a + b) >> 1;
    if (xs[m] < x) a = m + 1;
    else b = m;
  }
  return a;
}
function nearest(xs, x) {
  const i = lower(xs, x);
  return i > 0 && (i === xs.length || x - xs[i - 1] <= xs[i] - x) ? i - 1 : i;
}
function between(xs, ys, x) {
  // Interpolate ys linearly at x; outside of xs the end values continue.
  if (!xs.length) return x;
  const i = Math.min(Math.max(lower(xs, x), 1), xs.length - 1);
  if (xs.length === 1 || xs[i] === xs[i - 1]) return ys[Math.min(i, ys.length - 1)];
  return (
    ys[i - 1] +
    ((ys[i] - ys[i - 1]) * (Math.min(Math.max(x, xs[0]), xs[xs.length - 1]) - xs[i - 1])) / (xs[i] - xs[i - 1])
  );
}
const axis = (run) => run.rows?.[state.mode] ?? run.rows?.step ?? new Float64Array(0);
const toAxis = (run, step) => (state.mode === "step" || !run.rows ? step : between(run.rows.step, axis(run), step));
function extent() {
  let low = Infinity,
    high = -Infinity;
  for (const run of shownRuns()) {
    const xs = axis(run);
    if (xs.length) {
      low = Math.min(low, xs[0]);
      high = Math.max(high, xs[xs.length - 1]);
    }
    for (const [steps] of Object.values(run.series ?? {})) {
      if (steps.length) {
        low = Math.min(low, toAxis(run, steps[0]));
        high = Math.max(high, toAxis(run, steps[steps.length - 1]));
      }
    }
  }
  if (!Number.isFinite(low)) return [0, 1];
  return high > low ? [low, high] : [low - 0.5, high + 0.5];
}
const view = () => state.view ?? extent();

// ---- smoothing and reduction of lines
// Exponential moving average with bias correction (Kingma and Ba 2014, section 3).
function smoothed(run, key) {
  const window = 2 ** state.smooth,
    id = `${key} ${window}`;
  if (!run.smooth.has(id)) {
    const values = run.rows[key],
      out = new Float32Array(values.length),
      decay = 1 - 1 / window;
    let mean = 0,
      weight = 0;
    for (let i = 0; i < values.length; i++) {
      const v = values[i];
      // NaN: this step has no value.
      if (v === v) {
        mean = decay * mean + (1 - decay) * v;
        weight = decay * weight + (1 - decay);
        out[i] = mean / weight;
      } else out[i] = NaN;
    }
    run.smooth.set(id, out);
  }
  return run.smooth.get(id);
}
// Return the points of a line between two x: all of them, or the minimum and maximum of each interval of about a pixel.
function visible(xs, ys, from, to, pixels) {
  const first = Math.max(lower(xs, from) - 1, 0),
    end = Math.min(lower(xs, to) + 2, xs.length),
    x = [],
    y = [];
  const size = Math.ceil((end - first) / (2 * pixels));
  if (size <= 2) {
    for (let i = first; i < end; i++)
      if (ys[i] === ys[i]) {
        x.push(xs[i]);
        y.push(ys[i]);
      }
    return [x, y];
  }
  for (let i = first; i < end; i += 2 * size) {
    let low = -1,
      high = -1;
    for (let j = i, stop = Math.min(i + 2 * size, end); j < stop; j++) {
      const v = ys[j];
      if (v !== v) continue;
      if (low < 0 || v < ys[low]) low = j;
      if (high < 0 || v > ys[high]) high = j;
    }
    if (low < 0) continue;
    const a = Math.min(low, high),
      b = Math.max(low, high);
    x.push(xs[a]);
    y.push(ys[a]);
    if (b !== a) {
      x.push(xs[b]);
      y.push(ys[b]);
    }
  }
  return [x, y];
}
