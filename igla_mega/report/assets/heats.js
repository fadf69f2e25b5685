// Heat maps over the run (experts, layers, ranks), each on a separate canvas.

class HeatMap {
  constructor(spec, run) {
    this.spec = spec;
    this.run = run;
    this.layer = -1;
    this.canvas = el("canvas", { role: "img", tabindex: "0" });
    this.reading = el("output", { class: "reading" });
    this.choice = el("select", {
      "aria-label": "layer",
      onchange: () => {
        this.layer = +this.choice.value;
        this.draw();
      },
    });
    this.node = el(
      "section",
      {
        class: spec.key === "expert_load" ? "wide" : "half",
        id: `heat-${spec.key.replace("/", "-")}${comparing() ? `-${run.index}` : ""}`,
      },
      el("div", { class: "head" }, el("h3", {}, named(spec.title, run)), el("p", {}, spec.note), this.choice),
      this.canvas,
      this.reading,
    );
    this.canvas.addEventListener("pointermove", (event) => this.hover(event.offsetX, event.offsetY));
    this.canvas.addEventListener("pointerleave", () => {
      point(null);
      this.idle();
    });
    this.canvas.addEventListener("keydown", (event) => keys(event, this));
  }
  get data() {
    return heatOf(this.run, this.spec);
  }
  rowsOf(data) {
    // Return [first row, names of the rows] of the chosen layer, or of all.
    if (!this.spec.fair) return [0, Array.from({ length: data.rows }, (_, i) => `${this.spec.rows} ${i}`)];
    const names = data.shape.flatMap((count, layer) =>
      Array.from({ length: count }, (_, expert) => `${layer}.${expert}`),
    );
    if (this.layer < 0) return [0, names];
    const first = data.shape.slice(0, this.layer).reduce((a, b) => a + b, 0);
    return [first, names.slice(first, first + data.shape[this.layer])];
  }
  draw() {
    const data = this.data;
    this.node.hidden = !data || !this.run.shown;
    if (this.node.hidden) return;
    const many = this.spec.fair && data.rows > 96;
    if (many && this.layer < 0) this.layer = 0;
    this.choice.hidden = !many;
    if (many && this.choice.length !== data.shape.length)
      this.choice.replaceChildren(...data.shape.map((_, i) => el("option", { value: i }, `layer ${i}`)));
    const [first, names] = this.rowsOf(data),
      columns = data.steps.length,
      ratio = devicePixelRatio;
    const width = Math.max(this.node.clientWidth, 200),
      tall = Math.max(3, Math.min(this.spec.fair ? 13 : 18, 320 / names.length));
    const left = 62,
      right = 8,
      top = 4,
      foot = 22,
      height = Math.ceil(top + tall * names.length + foot);
    const context = this.canvas.getContext("2d");
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    context.scale(ratio, ratio);
    let most = 0;
    for (let i = 0; i < columns * names.length; i++) most = Math.max(most, data.values[first * columns + i]);
    const median = this.spec.relative ? medians(data) : null;
    const xs = data.steps.map((step) => toAxis(this.run, step)),
      [from, to] = view(),
      across = width - left - right;
    const place = (x) => left + ((Math.min(Math.max(x, from), to) - from) / (to - from || 1)) * across;
    this.scale = { left, top, tall, across, xs, first, names, columns, from, to, median };
    for (let c = 0; c < columns; c++) {
      const a = place(c ? xs[c - 1] : 2 * xs[0] - (xs[1] ?? xs[0] + 1)),
        b = place(xs[c]);
      if (b <= a) continue;
      for (let r = 0; r < names.length; r++) {
        const v = data.values[(first + r) * columns + c];
        context.fillStyle = this.spec.fair
          ? ink.diverging(v - 1)
          : this.spec.relative
            ? ink.diverging(5 * (v / median[c] - 1))
            : ink.rising(most ? v / most : 0);
        context.fillRect(a, top + r * tall, b - a + 0.5, tall - (tall > 6 ? 1 : 0));
      }
    }
    context.fillStyle = ink.muted;
    context.font = `11px ${ink.font}`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    const every = Math.ceil(13 / tall);
    names.forEach((name, r) => {
      if (r % every === 0) context.fillText(name, left - 6, top + (r + 0.5) * tall);
    });
    context.textBaseline = "top";
    for (const share of [0, 0.5, 1]) {
      context.textAlign = ["left", "center", "right"][2 * share];
      context.fillText(sayX(from + share * (to - from)), left + share * across, height - foot + 6);
    }
    this.canvas.setAttribute(
      "aria-label",
      `${this.spec.title}: ${names.length} rows, ${columns} columns. ${this.spec.note}.`,
    );
    this.idle();
  }
  at(row, column) {
    const { first, columns, median, names } = this.scale,
      v = this.data.values[(first + row) * columns + column];
    return `${names[row]} at step ${whole(this.data.steps[column])}: ${this.spec.say(median ? v / median[column] : v)}`;
  }
  idle() {
    if (!this.scale?.columns) return;
    const { names, columns, first } = this.scale,
      value = (row) => this.data.values[(first + row) * columns + columns - 1];
    let best = 0;
    for (let r = 0; r < names.length; r++) if (value(r) > value(best)) best = r;
    this.reading.textContent = `maximum of the last column: ${this.at(best, columns - 1)}`;
  }
  hover(x, y) {
    const { left, top, tall, across, xs, from, to, names } = this.scale;
    const row = Math.floor((y - top) / tall),
      at = from + ((x - left) / across) * (to - from);
    if (row < 0 || row >= names.length || x < left) return;
    point(at, this);
    this.reading.textContent = this.at(row, Math.min(lower(xs, at), xs.length - 1));
  }
}
function heatOf(run, spec) {
  const found = run.heats.find((one) => one.key === spec.key);
  return found && spec.onlyAboveZero && !found.values.some((v) => v > 0) ? undefined : found;
}
function medians(data) {
  const columns = data.steps.length;
  return Array.from({ length: columns }, (_, c) => {
    const values = Array.from({ length: data.rows }, (_, r) => data.values[r * columns + c]).sort((a, b) => a - b);
    return (values[(data.rows - 1) >> 1] + values[data.rows >> 1]) / 2 || 1;
  });
}
