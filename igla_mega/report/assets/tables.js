// Tables and texts: forgetting, needle, samples, ranks, sources, events, recipes.

// The reader's choices by table id, which outlive the tables: a live page rebuilds them.
const chosen = new Map();

const named = (title, run) => (comparing() ? `${title}: ${run.name}` : title);
const section = (id, title, note, wide, ...children) =>
  el(
    "section",
    { id, class: wide ? "wide" : "half" },
    el("div", { class: "head" }, el("h3", {}, title), el("p", {}, note)),
    ...children,
  );
const sectionOf = (run, id, title, ...more) => section(`${id}-${run.index}`, named(title, run), ...more);
function table(heads, rows, name) {
  const cellOf = (cell, i) =>
    cell instanceof Node && ["TD", "TH"].includes(cell.tagName)
      ? cell
      : el(i ? "td" : "th", i ? {} : { scope: "row" }, cell ?? "–");
  return el(
    "div",
    { class: "scroll", tabindex: "0" },
    el(
      "table",
      { "aria-label": name },
      el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map(cellOf)))),
    ),
  );
}
// The axis of a column of strips: its ends and its middle, in the words of `say`.
function scale(title, most, say) {
  const marks = [0, 0.5, 1].map((share) => {
    const mark = el("i", {}, say(share * most));
    mark.style.left = `${100 * share}%`;
    return mark;
  });
  return el("span", { class: "axis" }, title, el("span", { class: "marks" }, ...marks));
}
function tall(node) {
  node.classList.add("tall");
  return node;
}
function colored(text, color, title) {
  const node = el("td", { class: "cell", title }, text);
  node.style.backgroundColor = color;
  const [r, g, b] = color.match(/\d+/g).map(Number);
  node.style.color = 0.3 * r + 0.59 * g + 0.11 * b > 128 ? "#14171d" : "#ffffff";
  return node;
}
function forgetting(run) {
  const { domains, phases, losses, step } = run.matrix,
    learned = {},
    risen = losses.map((row) => row.map((loss, c) => (loss === null ? null : loss - (learned[c] ??= loss))));
  const most = Math.max(1e-3, ...risen.flat().map((v) => Math.abs(v ?? 0)));
  const rows = phases.map((phase, r) => [
    `after ${phase}`,
    ...losses[r].map((loss, c) =>
      loss === null
        ? el("td", { class: "cell" }, "·")
        : colored(
            loss.toFixed(3),
            ink.diverging(risen[r][c] / most),
            `${domains[c]} after ${phase}: ${loss.toFixed(4)} nats, ${risen[r][c] >= 0 ? "+" : ""}${risen[r][c].toFixed(4)} since it was learned`,
          ),
    ),
  ]);
  return sectionOf(
    run,
    "forgetting",
    "Forgetting",
    `nats per token of each domain after each phase, at step ${whole(step ?? 0)}; orange: risen since it was learned, blue: fallen`,
    true,
    table(["", ...domains], rows, "Forgetting"),
  );
}
// Restore the chosen value of a rebuilt table; if the last one was chosen, the table follows to the newest.
function stays(id, control, last, show) {
  const before = chosen.get(id);
  control.value = before !== undefined && before < last ? before : last;
  control.addEventListener("input", () => {
    if (+control.value < last) chosen.set(id, +control.value);
    else chosen.delete(id);
    show();
  });
}
function needle(run) {
  const id = `needle-${run.index}`,
    box = el("div"),
    choice = el(
      "select",
      { "aria-label": "step of the grid" },
      ...run.needle.map((grid, i) => el("option", { value: i }, `step ${whole(grid.step)}`)),
    ),
    exactly = el("button", { class: "small", type: "button", title: "values that are exactly the most likely continuation" });
  const show = () => {
    const { lengths, depths, values, exact } = run.needle[+choice.value],
      strict = Boolean(exact && chosen.get(`${id}-exact`));
    exactly.hidden = !exact;
    exactly.textContent = "word for word";
    exactly.setAttribute("aria-pressed", String(strict));
    const cell = (v) =>
      v === null
        ? el("td", { class: "cell" }, "·")
        : colored(`${Math.round(100 * v)}`, ink.diverging(1 - 2 * v), `${percent(v)} found`);
    const rows = lengths.map((length, r) => [
      whole(+length) === "NaN" ? length : whole(+length),
      ...(strict ? exact : values)[r].map(cell),
    ]);
    box.replaceChildren(
      table(["length \\ depth", ...depths.map((depth) => `${depth} %`)], rows, "Needle in a haystack"),
    );
  };
  exactly.addEventListener("click", () => {
    chosen.set(`${id}-exact`, !chosen.get(`${id}-exact`));
    show();
  });
  stays(id, choice, run.needle.length - 1, show);
  show();
  const note = run.needle.some((grid) => grid.exact)
    ? "percent of a hidden value's tokens that are more likely than nine other words: 10 by chance; blue: found, orange: lost"
    : "percent found, by length of the text and depth of the needle; blue: found, orange: lost";
  const node = sectionOf(run, "needle", "Needle in a haystack", note, true, box);
  node.querySelector(".head").append(exactly, choice);
  return node;
}
function samples(run) {
  const steps = [...new Set(run.samples.map((one) => one.step))].sort((a, b) => a - b),
    box = el("div", { class: "samples" });
  const slider = el("input", { type: "range", min: 0, max: steps.length - 1, "aria-label": "step of the samples" }),
    label = el("output");
  const show = () => {
    const step = steps[+slider.value];
    label.textContent = `step ${whole(step)}`;
    slider.setAttribute("aria-valuetext", label.textContent);
    box.replaceChildren(
      ...run.samples
        .filter((one) => one.step === step)
        .map((one) => el("blockquote", {}, el("b", {}, one.prompt), one.text)),
    );
  };
  stays(`samples-${run.index}`, slider, steps.length - 1, show);
  show();
  const node = sectionOf(run, "samples", "Samples", "continuations of the prompts (bold) by the model", true, box);
  node.querySelector(".head").append(el("label", { class: "slide" }, slider, label));
  return node;
}
function ranks(run) {
  const most = Math.max(...run.ranks.map((q) => q[4])) * 1.03,
    slowest = run.ranks.reduce((best, q, i) => (q[2] > run.ranks[best][2] ? i : best), 0);
  const order = run.ranks.map((_, rank) => rank);
  if (order.length > 8) order.sort((a, b) => run.ranks[b][2] - run.ranks[a][2]); // slowest first
  const rows = order.map((rank) => {
    const q = run.ranks[rank];
    const strip = el("span", { class: "strip" });
    for (const [kind, a, b] of [
      ["range", q[0], q[4]],
      ["box", q[1], q[3]],
      ["mid", q[2], q[2]],
    ]) {
      const part = el("i", { class: kind });
      part.style.left = `${(100 * a) / most}%`;
      part.style.width = `${(100 * (b - a)) / most}%`;
      strip.append(part);
    }
    return [
      `rank ${rank}${rank === slowest && run.ranks.length > 1 ? " ◆" : ""}`,
      el("td", { class: "strips" }, strip),
      secs(q[2]),
      secs(q[4]),
    ];
  });
  return sectionOf(
    run,
    "ranks",
    "Step times of ranks",
    "box: middle half; line: 5 to 95 %; ◆ the slowest median",
    false,
    tall(table(["", scale("seconds per step", most, secs), "median", "95 %"], rows, "Step times of ranks")),
  );
}
function slowest(run) {
  return sectionOf(
    run,
    "slowest",
    "Slowest ranks",
    "number of compared steps in which a rank was the slowest",
    false,
    table(
      ["", "times"],
      run.slowest.map(([rank, times]) => [`rank ${rank}`, whole(times)]),
      "Slowest ranks",
    ),
  );
}
function sources(run) {
  const rows = run.sources.items.map(([name, taken, share, wanted]) => {
    const strip = el("span", { class: "strip bar" }),
      bar = el("i", { class: "box" });
    bar.style.width = `${100 * share}%`;
    strip.append(bar);
    if (wanted !== null) {
      const tick = el("i", { class: "mid" });
      tick.style.left = `${100 * wanted}%`;
      strip.append(tick);
    }
    return [
      name,
      el("td", { class: "strips" }, strip),
      `${(100 * share).toFixed(1)} %`,
      wanted === null ? "–" : `${(100 * wanted).toFixed(1)} %`,
      short(taken),
    ];
  });
  return sectionOf(
    run,
    "sources",
    "Data by source",
    `${run.sources.unit} consumed; the tick is data.mix`,
    false,
    table(["", scale("share", 1, percent), "consumed", "data.mix", run.sources.unit], rows, "Data by source"),
  );
}
function eventList() {
  let time = 0; // an event without a time is placed after the one before it
  const events = allEvents().map((event) => ({ ...event, at: (time = event.time ?? time) })),
    kinds = [...new Set(events.map((event) => event.event))],
    quiet = events.filter((event) => looks(event.event).quiet).length;
  const node = section("events", "Events", `${whole(events.length)}; the button of a step moves the plots to it`, true);
  if (!events.length) {
    node.querySelector("p").textContent = "no events";
    return node;
  }
  const choice = el(
    "select",
    { "aria-label": "kind of event" },
    el("option", { value: "" }, "all kinds"),
    quiet ? el("option", { value: "-" }, "without saves and evaluations") : null,
    ...kinds.map((kind) => el("option", { value: kind }, kind)),
  );
  choice.value = chosen.get("events") ?? (quiet > 12 && quiet < events.length ? "-" : "");
  const box = el("div");
  const wanted = ({ event }) => !choice.value || (choice.value === "-" ? !looks(event).quiet : event === choice.value);
  const goTo = (event) => {
    const [a, b] = extent(),
      x = toAxis(event.run, event.step);
    zoom(x - (b - a) / 20, x + (b - a) / 20);
    point(x);
  };
  const rowOf = (event) => {
    const { glyph, alarm } = looks(event.event),
      step = el("button", { class: "small", type: "button", onclick: () => goTo(event) }, whole(event.step));
    return [
      el("td", {}, step),
      el("td", { class: alarm ? "alarm" : "" }, `${glyph} ${event.event}`),
      el("td", { class: "message" }, (comparing() ? `${event.run.name}: ` : "") + event.message),
      when(event.time),
    ];
  };
  const show = () => {
    const most = chosen.get("events-most") ?? 12,
      // By time, since a run may go back to an earlier step.
      found = events
        .filter(wanted)
        .reverse()
        .sort((a, b) => b.at - a.at);
    box.replaceChildren(table(["step", "what", "", "when"], found.slice(0, most).map(rowOf), "Events"));
    if (found.length <= most) return;
    const more = () => {
      chosen.set("events-most", most + 200);
      show();
    };
    box.append(el("button", { type: "button", onclick: more }, `${whole(found.length - most)} more`));
  };
  choice.addEventListener("change", () => {
    chosen.set("events", choice.value);
    show();
  });
  show();
  node.querySelector(".head").append(choice);
  node.append(box);
  return node;
}
function difference() {
  const { heads, rows, more } = DATA.difference,
    says = more ? `; the first ${rows.length}` : "",
    note = rows.length ? `${whole(rows.length + more)} keys differ${says}` : "none: the recipes are equal";
  const cells = rows.map(([key, ...values]) => [key, ...values.map((v) => el("td", { class: "message" }, v ?? "–"))]),
    node = rows.length ? table(["key", ...heads], cells, "Difference of the recipes") : null;
  return section("difference", "Difference of the recipes", note, true, ...(node ? [node] : []));
}
function plan(run) {
  const rows = run.plan.rows.map(([what, unit, measured, planned]) => [
    `${what}, ${unit}`,
    short(measured),
    short(planned),
    measured ? `${(planned / measured).toFixed(2)} ×` : "–",
  ]);
  const title = comparing() ? "Plan" : "Plan and measurement";
  return sectionOf(
    run,
    "plan",
    title,
    run.plan.note,
    false,
    table(["", "measured", "plan", "plan / measured"], rows, "Plan"),
  );
}
function recipe(run) {
  const text = el("pre", { tabindex: "0" }, run.recipe);
  return el("details", { class: "wide" }, el("summary", {}, named("recipe.yaml", run)), text);
}
