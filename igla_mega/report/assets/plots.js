// Line plots over the run, drawn with uPlot: the lines of a plot, the plot itself, and the marks of events on it.

const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [14, 4], [4, 2, 2, 2, 2, 2]];
const ROUND = [-3, -2, -1, 0, 1, 2, 3].flatMap((p) => [1, 2, 5].map((v) => v * 10 ** p));
const CLOCK = [
  0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400, 172800, 432000, 864000, 2592000,
];

// ---- lines of a plot
function matches(pattern, name) {
  // Return the part of the name that the pattern leaves open; null if the name does not match.
  const star = pattern.indexOf("*");
  if (star >= 0) {
    const [head, tail] = [pattern.slice(0, star), pattern.slice(star + 1)];
    return name.startsWith(head) && name.endsWith(tail)
      ? name.slice(head.length, -tail.length || undefined).replace(/[/]$/, "")
      : null;
  }
  if (pattern.endsWith("/")) return name.startsWith(pattern) ? name.slice(pattern.length) : null;
  return name === pattern ? "" : null;
}
function linesOf(spec) {
  const found = [];
  for (const run of runs) {
    for (const [key, label] of Object.entries(spec.rows ?? {}))
      if (run.rows?.[key]) found.push({ run, key, label, dense: true, plain: spec.plain });
    for (const [pattern, label] of Object.entries(spec.points ?? {}))
      for (const name of Object.keys(run.series ?? {})) {
        const rest = matches(pattern, name);
        if (rest !== null) found.push({ run, key: name, label: label + rest, dense: false });
      }
  }
  const kinds = [...new Set(found.map((line) => line.label))];
  for (const line of found) {
    const place = kinds.indexOf(line.label);
    line.color = comparing() ? line.run.index : place;
    line.dash = (comparing() ? place + line.run.index : place) % DASHES.length;
    line.name = comparing() ? `${line.run.name}: ${line.label}` : line.label;
  }
  return found;
}
function pointsOf(line) {
  if (line.dense) return [axis(line.run), line.run.rows[line.key] ?? new Float32Array(0)];
  const [steps, values] = line.run.series[line.key] ?? [[], []];
  const xs = state.mode === "step" ? steps : steps.map((step) => toAxis(line.run, step));
  // A single value for the whole run is drawn as a horizontal line.
  return values.length === 1 && line.key === "unigram_entropy" ? [extent(), [values[0], values[0]]] : [xs, values];
}
function valueAt(line, x) {
  const [xs, ys] = pointsOf(line);
  if (!xs.length) return null;
  if (x === null) {
    let i = xs.length - 1;
    while (i > 0 && ys[i] !== ys[i]) i--;
    return [xs[i], ys[i]];
  }
  const i = nearest(xs, x);
  return [xs[i], ys[i]];
}
const smoothing = (line) => state.smooth > 0 && line.dense && !line.plain && line.run.rows[line.key]?.length > 2;
const colorOf = (line) => ink.lines[line.color % ink.lines.length];

// ---- a plot
class Plot {
  constructor(spec) {
    this.spec = spec;
    this.off = new Set();
    this.log = false;
    this.legend = el("div", { class: "legend" });
    this.box = el("div", { class: "plot", tabindex: "0", role: "figure" });
    this.logButton = el(
      "button",
      {
        class: "small",
        type: "button",
        "aria-pressed": "false",
        title: "logarithmic axis",
        onclick: () => this.toggleLog(),
      },
      "log",
    );
    this.node = el(
      "section",
      { class: spec.wide ? "wide" : "half", id: `plot-${spec.id}` },
      el("div", { class: "head" }, el("h3", {}, spec.title), el("p", {}, spec.note ?? ""), this.logButton),
      this.legend,
      this.box,
    );
    this.box.addEventListener("keydown", (event) => keys(event, this));
  }
  toggleLog() {
    this.log = !this.log;
    this.draw();
  }
  sayValue(v) {
    return (this.spec.format ?? short)(v);
  }
  measure() {
    const width = Math.max(this.box.clientWidth, 200);
    return [width, this.spec.wide ? Math.max(240, Math.min(380, width * 0.42)) : 210];
  }
  draw() {
    this.lines = linesOf(this.spec).filter((line) => line.run.shown);
    const live = this.lines.filter((line) => !this.off.has(line.label)),
      [from, to] = view(),
      [width, height] = this.measure();
    const series = [],
      parts = [];
    for (const line of live) {
      const [xs, ys] = pointsOf(line),
        color = colorOf(line),
        both = smoothing(line);
      parts.push(visible(xs, ys, from, to, width));
      const few = parts[parts.length - 1][0].length <= 60;
      const crowd = comparing() ? "30" : "55";
      series.push({
        stroke: both ? color + crowd : color,
        width: both ? 1 : line.dense ? 1.75 : 2,
        dash: both ? [] : DASHES[line.dash],
        points: { show: few && !both, size: line.dense ? 4 : 6, fill: color, stroke: color },
      });
      if (both) {
        parts.push(visible(xs, smoothed(line.run, line.key), from, to, width));
        series.push({ stroke: color, width: 2, dash: DASHES[line.dash], points: { show: false } });
      }
    }
    let low = Infinity,
      high = -Infinity,
      least = Infinity;
    for (const [x, ys] of parts)
      for (let i = 0; i < ys.length; i++)
        if (x[i] >= from && x[i] <= to) {
          const v = ys[i];
          if (v < low) low = v;
          if (v > high) high = v;
          if (v > 0 && v < least) least = v;
        }
    const log = this.log && least < Infinity;
    const all = Float64Array.from(parts.flatMap(([x]) => x)).sort(),
      x = [];
    for (let i = 0; i < all.length; i++) if (i === 0 || all[i] !== all[i - 1]) x.push(all[i]);
    const data = [x];
    for (const [xs, ys] of parts) {
      // Both x and xs ascend, so one pass aligns them.
      const column = new Array(x.length).fill(null);
      for (let i = 0, at = 0; i < xs.length; i++) {
        while (x[at] < xs[i]) at++;
        column[at] = log && ys[i] <= 0 ? null : ys[i];
      }
      data.push(column);
    }
    this.range = this.rangeOf(low, high, least, log);
    this.live = live;
    const shape = JSON.stringify([
      series.map((one) => [one.stroke, one.width, one.dash, one.points.show]),
      log,
      ink.name,
      state.mode === "seconds",
    ]);
    if (this.chart && shape === this.shape && this.chart.width === width && this.chart.height === height) {
      // `quiet`: uPlot reports the cursor again when data changes, which is not a move of the reader's.
      this.quiet = true;
      this.chart.batch(() => {
        this.chart.setData(data, false);
        this.chart.setScale("x", { min: from, max: to });
        this.chart.setScale("y", { min: this.range[0], max: this.range[1] });
      });
      this.quiet = false;
    } else {
      this.chart?.destroy();
      this.shape = shape;
      this.chart = new uPlot(this.options(width, height, series, log), data, this.box);
    }
    this.logButton.setAttribute("aria-pressed", String(log));
    this.writeLegend();
    this.describe();
  }
  rangeOf(low, high, least, log) {
    if (!Number.isFinite(low)) return [0, 1];
    if (log) return uPlot.rangeLog(Math.min(least, high), high > 0 ? high : 1, 10, false);
    if (this.spec.zero && low >= 0) return [0, high > 0 ? high * 1.06 : 1];
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [low - room, high + room];
  }
  options(width, height, series, log) {
    const small = `12px ${ink.font}`,
      grid = { stroke: ink.grid, width: 1 },
      ticks = { show: false };
    return {
      width,
      height,
      legend: { show: false },
      padding: [10, 26, 0, 0],
      scales: { x: { time: false, range: () => view() }, y: { distr: log ? 3 : 1, range: () => this.range } },
      axes: [
        {
          stroke: ink.muted,
          font: small,
          grid,
          ticks,
          size: 28,
          gap: 4,
          space: 70,
          ...(state.mode === "seconds" ? { incrs: CLOCK } : {}),
          values: (_, vs) => vs.map((v) => (state.mode === "step" && !Number.isInteger(v) ? "" : sayX(v))),
        },
        {
          stroke: ink.muted,
          font: small,
          grid,
          ticks,
          gap: 4,
          ...(this.spec.unit ? { incrs: ROUND.map((v) => v * this.spec.unit) } : {}),
          values: (_, vs) => vs.map((v) => (v === null ? "" : this.sayValue(v))),
          size: (u, vs) => 14 + 6.6 * Math.max(3, ...(vs ?? []).map((v) => String(v).length)),
        },
      ],
      series: [{}, ...series.map((one) => ({ ...one, spanGaps: true }))],
      cursor: { y: false, drag: { x: true, y: false, setScale: false }, points: { show: false } },
      hooks: {
        setSelect: [
          (u) => {
            if (u.select.width > 4)
              zoom(u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"));
            u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          },
        ],
        setCursor: [
          (u) => {
            if (!this.quiet && !moving) point(u.cursor.left < 0 ? null : u.posToVal(u.cursor.left, "x"), this);
          },
        ],
        draw: [(u) => marks(u)],
        ready: [(u) => u.over.addEventListener("dblclick", reset)],
      },
    };
  }
  writeLegend() {
    this.values = [];
    this.legend.replaceChildren(
      ...this.lines.map((line) => {
        const value = el("b");
        this.values.push([line, value]);
        return el(
          "button",
          {
            type: "button",
            "aria-pressed": String(!this.off.has(line.label)),
            title: "show or hide",
            onclick: () => {
              if (!this.off.delete(line.label)) this.off.add(line.label);
              this.draw();
            },
          },
          sample(colorOf(line), DASHES[line.dash]),
          el("span", {}, line.name),
          value,
        );
      }),
    );
    this.read();
  }
  read() {
    for (const [line, node] of this.values) {
      const found = valueAt(line, state.cursor);
      node.textContent = found ? this.sayValue(found[1]) : "–";
    }
  }
  describe() {
    const words = this.lines.map((line) => {
      const found = valueAt(line, null);
      return found ? `${line.name} ${this.sayValue(found[1])}` : line.name;
    });
    this.box.setAttribute(
      "aria-label",
      `${this.spec.title}, ${this.spec.note ?? ""}. Last: ${words.join(", ")}. Arrow keys read values.`,
    );
  }
  follow(x) {
    if (!this.chart) return;
    const left = x === null ? -10 : this.chart.valToPos(x, "x");
    this.quiet = true;
    this.chart.setCursor({ left, top: x === null ? -10 : 10 }, false);
    this.quiet = false;
    this.read();
  }
}
// ---- line samples and marks
function sample(color, dash) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"),
    line = document.createElementNS(svg.namespaceURI, "line");
  for (const [k, v] of Object.entries({ width: 26, height: 8, "aria-hidden": "true" })) svg.setAttribute(k, v);
  for (const [k, v] of Object.entries({
    x1: 1,
    x2: 25,
    y1: 4,
    y2: 4,
    stroke: color,
    "stroke-width": 2.5,
    "stroke-dasharray": dash.join(" ") || "none",
  }))
    line.setAttribute(k, v);
  svg.append(line);
  return svg;
}
function marks(u) {
  if (!state.marks) return;
  const { ctx, bbox } = u,
    [from, to] = view(),
    pixel = devicePixelRatio,
    last = new Map();
  ctx.save();
  ctx.font = `${11 * pixel}px ${ink.font}`;
  ctx.textAlign = "center";
  for (const event of allEvents()) {
    const x = toAxis(event.run, event.step);
    if (x < from || x > to) continue;
    const at = Math.round(u.valToPos(x, "x", true)),
      { glyph, quiet, alarm } = looks(event.event);
    if (at - (last.get(event.event) ?? -Infinity) < 7 * pixel) continue;
    last.set(event.event, at);
    ctx.fillStyle = ctx.strokeStyle = alarm ? ink.alarm : ink.muted;
    if (quiet) {
      ctx.fillRect(at, bbox.top + bbox.height - 5 * pixel, pixel, 5 * pixel);
      continue;
    }
    ctx.globalAlpha = 0.55;
    ctx.setLineDash([3 * pixel, 3 * pixel]);
    ctx.beginPath();
    ctx.moveTo(at, bbox.top + 6 * pixel);
    ctx.lineTo(at, bbox.top + bbox.height);
    ctx.stroke();
    ctx.globalAlpha = 1;
    ctx.fillText(glyph, at, bbox.top + 4 * pixel);
  }
  ctx.restore();
}
