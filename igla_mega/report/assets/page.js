// The page as a whole: its head, its layout, and the handling of mouse and keys.

const STATES = {
  running: "●",
  restarting: "↻",
  finished: "✓",
  stopped: "■",
  failed: "✖",
  dead: "✖",
  stale: "◌",
  empty: "○",
  hung: "‖",
};
const VALIDATION = "validation, ";
const THEMES = { auto: "◐ auto", light: "○ light", dark: "● dark" };
let plots = [],
  heats = [],
  ink = {},
  skeleton = "",
  moving = false;
const tables = new Map();

// ---- the head
function pill(summary) {
  return el("span", { class: `pill ${summary.state}` }, `${STATES[summary.state] ?? ""} ${summary.says}`);
}
// Why a run is not running, and the command that resumes it.
function ending(run) {
  const { state, cause, command } = run.summary;
  if (!cause && !command) return null;
  return el(
    "div",
    { class: `ending ${state}` },
    cause ? el("p", {}, (comparing() ? `${run.name}: ` : "") + cause) : null,
    command ? el("p", { class: "command" }, "resume: ", el("code", {}, command)) : null,
  );
}
// The validation losses of a run in one cell: a column for each source of each run would not fit the screen.
function validation(run) {
  const facts = run.summary.facts.filter(([name]) => name.startsWith(VALIDATION));
  return facts.map(([name, value]) => `${name.slice(VALIDATION.length)} ${value}`).join(", ") || "–";
}
function head() {
  const facts = byId("facts"),
    first = runs[0];
  byId("subtitle").textContent = first.summary.subtitle;
  byId("state").replaceChildren(pill(first.summary));
  byId("note").textContent = first.summary.note;
  const ends = runs.map(ending).filter(Boolean);
  byId("ends").hidden = !ends.length;
  byId("ends").replaceChildren(...ends);
  const bar = byId("progress");
  bar.hidden = !first.summary.total_steps;
  if (!bar.hidden) {
    bar.max = first.summary.total_steps;
    bar.value = first.summary.step;
    bar.setAttribute("aria-label", `step ${first.summary.step} of ${first.summary.total_steps}`);
  }
  if (!comparing())
    facts.replaceChildren(
      el(
        "dl",
        {},
        ...first.summary.facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
      ),
    );
  else {
    const all = [...new Set(runs.flatMap((run) => run.summary.facts.map(([name]) => name)))],
      names = all.filter((name) => !name.startsWith(VALIDATION));
    facts.replaceChildren(
      table(
        ["run", "state", ...names, "validation"],
        runs.map((run) => {
          const facts = new Map(run.summary.facts),
            color = ink.lines[run.index % ink.lines.length];
          return [
            el(
              "th",
              { scope: "row" },
              el(
                "label",
                {},
                el("input", {
                  type: "checkbox",
                  checked: run.shown,
                  onchange: () => {
                    run.shown = !run.shown;
                    render();
                  },
                }),
                sample(color, DASHES[run.index % DASHES.length]),
                ` ${run.name}`,
              ),
            ),
            el("td", {}, pill(run.summary)),
            ...names.map((name) => facts.get(name) ?? "–"),
            validation(run),
          ];
        }),
        "Runs",
      ),
    );
  }
  const problems = runs.flatMap((run) =>
    (run.problems ?? []).map((text) => (comparing() ? `${run.name}: ${text}` : text)),
  );
  const list = byId("problems");
  list.hidden = !problems.length;
  list.replaceChildren(...problems.map((text) => el("li", {}, text)));
}

// ---- layout
// Keys that are not in the catalog get one plot each.
function specsOf() {
  const known = [...PLOTS.flatMap((spec) => Object.keys({ ...spec.rows, ...spec.points })), ...NOT_DRAWN];
  const unknown = (key) => !known.some((pattern) => matches(pattern, key) !== null);
  const rows = new Set(runs.flatMap((run) => Object.keys(run.rows ?? {}).filter(unknown)));
  const points = new Set(
    runs
      .flatMap((run) => Object.keys(run.series ?? {}).filter(unknown))
      .map((key) => (key.includes("/") ? key.slice(0, key.indexOf("/") + 1) : key)),
  );
  const group = "Everything else";
  return [
    ...PLOTS.filter((spec) => linesOf(spec).length),
    ...[...rows].slice(0, 24).map((key) => ({ id: `row-${key}`, group, title: key, note: "", rows: { [key]: key } })),
    ...[...points]
      .slice(0, 24)
      .map((key) => ({
        id: `point-${key}`,
        group,
        title: key.replace(/[/]$/, ""),
        note: "",
        points: { [key]: key.endsWith("/") ? "" : key },
      })),
  ];
}
function layOut() {
  const specs = specsOf();
  const maps = HEATS.flatMap((spec) => runs.filter((run) => heatOf(run, spec)).map((run) => [spec, run]));
  const mapId = (spec, run) => `${spec.key} ${run.index}`;
  const next = JSON.stringify([specs.map((spec) => spec.id), maps.map((one) => mapId(...one))]);
  if (next === skeleton) return;
  skeleton = next;
  const plotBefore = new Map(plots.map((plot) => [plot.spec.id, plot]));
  plots = specs.map((spec) => plotBefore.get(spec.id) ?? new Plot(spec));
  const heatBefore = new Map(heats.map((one) => [mapId(one.spec, one.run), one]));
  heats = maps.map((one) => heatBefore.get(mapId(...one)) ?? new HeatMap(...one));
  const groupOf = (title, ...inside) => {
    const id = `group-${title.split(" ")[0].toLowerCase()}`;
    return el("div", { class: "group" }, el("h2", {}, title), el("div", { class: "grid", id }, ...inside));
  };
  const drawn = [...plots, ...heats];
  byId("plots").replaceChildren(
    ...GROUPS.map((group) => groupOf(group, ...drawn.filter((one) => one.spec.group === group).map((one) => one.node))),
    groupOf("Record"),
  );
}
// Rebuild a table only if its data changed: otherwise it would lose what the reader opened, scrolled or focused.
function once(id, sources, make) {
  const before = tables.get(id);
  if (before && sources.every((one, i) => one === before.sources[i])) return before.node;
  const node = make();
  node.dataset.table = id;
  tables.set(id, { sources, node });
  return node;
}
function fillTables() {
  const put = (group, nodes) => {
    const slot = byId(`group-${group}`),
      now = [...slot.querySelectorAll(":scope > [data-table]")];
    if (now.length === nodes.length && now.every((node, i) => node === nodes[i])) return;
    for (const node of now) node.remove();
    slot.append(...nodes);
  };
  const each = (make, sourceOf) =>
    shownRuns()
      .map((run) => [run, sourceOf(run)])
      .filter(([, source]) => source && source.length !== 0)
      .map(([run, source]) => once(`${make.name} ${run.index}`, [source, ink.name], () => make(run)));
  put(
    "learning",
    each(forgetting, (run) => run.matrix),
  );
  put("evaluation", [...each(needle, (run) => run.needle), ...each(samples, (run) => run.samples)]);
  put("speed", [...each(ranks, (run) => run.ranks), ...each(slowest, (run) => run.slowest)]);
  put(
    "data",
    each(sources, (run) => run.sources),
  );
  const record = [
    once(
      "events",
      runs.map((run) => run.shown && run.events),
      eventList,
    ),
  ];
  if (DATA.difference) record.push(once("difference", [], difference));
  for (const run of runs) {
    if (run.plan) record.push(once(`plan ${run.index}`, [run.plan], () => plan(run)));
    if (run.recipe) record.push(once(`recipe ${run.index}`, [run.recipe], () => recipe(run)));
  }
  put("record", record);
  for (const group of document.querySelectorAll(".group"))
    group.hidden = !group.querySelector(".grid").childElementCount;
}
function redraw() {
  for (const plot of plots) plot.draw();
  for (const one of heats) one.draw();
  cursorNote();
}
function render() {
  head();
  layOut();
  fillTables();
  redraw();
}

// ---- interaction
function zoom(from, to) {
  const [low, high] = extent(),
    room = (high - low) * 1e-6;
  from = Math.max(low, from);
  to = Math.min(high, to);
  if (to - from > room) look(from <= low && to >= high ? null : [from, to]);
}
const reset = () => look(null);
function look(range) {
  state.view = range;
  byId("reset").disabled = !range;
  redraw();
}
function scaleView(factor) {
  const [from, to] = view(),
    center = state.cursor ?? (from + to) / 2,
    share = (center - from) / (to - from),
    width = (to - from) * factor;
  zoom(center - share * width, center + (1 - share) * width);
}
function pan(share) {
  const [from, to] = view(),
    [low, high] = extent(),
    by = Math.min(Math.max((to - from) * share, low - from), high - to);
  zoom(from + by, to + by);
}
function point(x, source) {
  if (moving) return;
  moving = true;
  state.cursor = x;
  for (const plot of plots)
    if (plot !== source) plot.follow(x);
    else plot.read();
  moving = false;
  cursorNote();
}
function cursorNote() {
  const node = byId("cursor"),
    x = state.cursor,
    run = shownRuns().find((one) => one.rows);
  if (x === null || !run) {
    node.textContent = state.view ? `${MODES[state.mode]} ${sayX(view()[0])} to ${sayX(view()[1])}` : "";
    return;
  }
  const i = Math.min(nearest(axis(run), x), run.rows.step.length - 1),
    parts = [`step ${whole(run.rows.step[i])}`];
  if (run.rows.tokens) parts.push(`${short(run.rows.tokens[i])} tokens`);
  if (run.rows.seconds) parts.push(clock(run.rows.seconds[i]));
  const [from, to] = view(),
    near = allEvents().filter((event) => Math.abs(toAxis(event.run, event.step) - x) < (to - from) / 150);
  const loud = near.filter((event) => !looks(event.event).quiet);
  for (const event of (loud.length ? loud : near).slice(0, 2))
    parts.push(`${looks(event.event).glyph} ${event.event}: ${event.message}`);
  node.textContent = parts.join("  ·  ");
}
function setMode(mode) {
  const run = shownRuns().find((one) => one.rows);
  if (!run || !run.rows[mode]) return;
  const steps = state.view?.map((x) => between(axis(run), run.rows.step, x));
  state.mode = mode;
  state.cursor = null;
  state.view = steps ? steps.map((step) => toAxis(run, step)) : null;
  for (const button of document.querySelectorAll("[data-mode]"))
    button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  redraw();
}
function setSmooth(level) {
  state.smooth = Math.min(10, Math.max(0, level));
  const slider = byId("smooth"),
    words = state.smooth ? `over ${2 ** state.smooth} steps` : "off";
  slider.value = state.smooth;
  slider.setAttribute("aria-valuetext", words);
  byId("smooth-says").textContent = words;
  for (const run of runs) run.smooth.clear();
  redraw();
}
function setTheme(theme) {
  state.theme = theme in THEMES ? theme : "auto";
  document.documentElement.dataset.theme = state.theme;
  byId("theme").textContent = THEMES[state.theme];
  recolor();
}
function chooseTheme() {
  setTheme(turn(Object.keys(THEMES), state.theme));
  try {
    localStorage.setItem("igla-theme", state.theme);
  } catch {
    /* a page opened from a file may have no storage */
  }
}
function themeKept() {
  try {
    return localStorage.getItem("igla-theme");
  } catch {
    return null;
  }
}
function recolor() {
  readInk();
  if (skeleton) render();
}
function readInk() {
  const style = getComputedStyle(document.documentElement),
    get = (name) => style.getPropertyValue(name).trim();
  const rgb = (name) => [1, 3, 5].map((at) => parseInt(get(name).slice(at, at + 2), 16));
  const blend = (a, b, share) => `rgb(${a.map((v, i) => Math.round(v + (b[i] - v) * share)).join(" ")})`;
  const cold = rgb("--cold"),
    middle = rgb("--middle"),
    hot = rgb("--hot");
  ink = {
    name: get("--paper"),
    grid: get("--grid"),
    muted: get("--muted"),
    alarm: get("--alarm"),
    font: getComputedStyle(document.body).fontFamily,
    lines: [1, 2, 3, 4, 5, 6, 7].map((n) => get(`--line-${n}`)),
    diverging: (v) => blend(middle, v < 0 ? cold : hot, Math.min(1, Math.abs(v))),
    rising: (v) => blend(middle, hot, Math.min(1, Math.max(0, v))),
  };
}
function toggleMarks() {
  state.marks = !state.marks;
  byId("marks").setAttribute("aria-pressed", String(state.marks));
  redraw();
}
const help = () => {
  const dialog = byId("help");
  if (dialog.open) dialog.close();
  else dialog.showModal();
};
const turn = (list, now) => list[(list.indexOf(now) + 1) % list.length];
function keys(event, plot) {
  const target = event.target;
  if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT", "TEXTAREA"].includes(target.tagName))
    return;
  const modes = Object.keys(MODES).filter((mode) => runs.some((run) => run.rows?.[mode]));
  const commands = {
    "+": () => scaleView(0.5),
    "=": () => scaleView(0.5),
    "-": () => scaleView(2),
    0: reset,
    Escape: reset,
    x: () => setMode(turn(modes, state.mode)),
    s: () => setSmooth(state.smooth + 1),
    S: () => setSmooth(state.smooth - 1),
    e: toggleMarks,
    t: chooseTheme,
    "?": help,
    "[": () => pan(-0.5),
    "]": () => pan(0.5),
    l: () => (plots.find((one) => one.box === document.activeElement) ?? plots[0])?.toggleLog(),
  };
  if (plot) {
    const [from, to] = view(),
      run = shownRuns().find((one) => one.rows),
      xs = run ? axis(run) : [];
    const stride = Math.max(1, Math.round(((lower(xs, to) - lower(xs, from)) / 200) * (event.shiftKey ? 10 : 1)));
    const go = (by) => () => {
      if (!xs.length) return;
      const at =
        state.cursor === null ? (by < 0 ? xs.length - 1 : lower(xs, from)) : nearest(xs, state.cursor) + by * stride;
      const x = xs[Math.min(Math.max(at, 0), xs.length - 1)];
      if (x < from || x > to) pan(by * 0.5);
      point(x);
      const values = plot.values?.map(([line, node]) => `${line.name} ${node.textContent}`);
      byId("spoken").textContent = values ? `${MODES[state.mode]} ${sayX(x)}: ${values.join(", ")}` : "";
    };
    Object.assign(commands, { ArrowLeft: go(-1), ArrowRight: go(1), Home: () => point(from), End: () => point(to) });
  }
  const command = commands[event.key];
  if (!command || (event.key === "Escape" && byId("help").open)) return;
  event.preventDefault();
  event.stopPropagation();
  command();
}
