// Start of the page: unpack and draw the data; a live page then polls its server for new data.

let failures = 0;
async function poll() {
  const live = byId("live");
  try {
    const answer = await fetch(`data?since=${runs.map((run) => run.since).join(",")}`, { cache: "no-store" });
    if (!answer.ok) throw new Error(String(answer.status));
    const news = await answer.json();
    let moved = false;
    for (const one of news.runs) {
      moved ||= Boolean(one.rows || Object.keys(one.rest).length);
      await take(runs[one.index], one);
    }
    live.textContent = `live · ${new Date().toLocaleTimeString("en-GB")}`;
    live.className = "";
    if (moved) render();
    else head();
    api.polls++;
    failures = 0;
  } catch {
    failures = Math.min(failures + 1, 5);
    live.textContent = "no answer from the server; the data is not current";
    live.className = "alarm";
  }
  // Back off when the server fails, and poll slowly while nobody sees the page.
  setTimeout(poll, (document.hidden ? 10 : 1) * DATA.poll_seconds * 1000 * 2 ** failures);
}

// Access to what the page shows, for tests and the console.
const api = (window.runPage = {
  state,
  runs,
  polls: 0,
  readyMs: null,
  plot: (id) => plots.find((plot) => plot.spec.id === id),
  ids: () => plots.map((plot) => plot.spec.id),
  lines: (id) =>
    api.plot(id).lines.map((line) => {
      const [x, y] = pointsOf(line);
      return { name: line.name, x: Array.from(x), y: Array.from(y) };
    }),
});

async function start() {
  for (const news of DATA.runs) await take(runs[news.index], news);
  const most = Math.max(...runs.map((run) => run.rows?.step.length ?? 0));
  state.smooth = most > 60 ? Math.round(Math.log2(Math.min(128, Math.max(2, most / 50)))) : 0;
  document.querySelector("h1").textContent = runs[0].title;
  PLOTS[0].note = runs[0].summary.loss_unit;
  byId("smooth").addEventListener("input", (event) => setSmooth(+event.target.value));
  byId("reset").addEventListener("click", reset);
  byId("in").addEventListener("click", () => scaleView(0.5));
  byId("out").addEventListener("click", () => scaleView(2));
  byId("marks").addEventListener("click", toggleMarks);
  byId("theme").addEventListener("click", chooseTheme);
  for (const button of document.querySelectorAll("[data-help]")) button.addEventListener("click", help);
  for (const button of document.querySelectorAll("[data-mode]")) {
    button.hidden = !runs.some((run) => run.rows?.[button.dataset.mode]);
    button.addEventListener("click", () => setMode(button.dataset.mode));
  }
  document.addEventListener("keydown", (event) => keys(event, null));
  // Printing uses light colours even with the dark theme.
  for (const what of ["(prefers-color-scheme: dark)", "print"]) matchMedia(what).addEventListener("change", recolor);
  setTheme(themeKept());
  head();
  layOut();
  fillTables();
  setSmooth(state.smooth);
  let width = innerWidth;
  new ResizeObserver(() => {
    if (innerWidth !== width) {
      width = innerWidth;
      redraw();
    }
  }).observe(document.body);
  api.readyMs = performance.now();
  document.documentElement.dataset.ready = "yes";
  if (DATA.live) setTimeout(poll, DATA.poll_seconds * 1000);
}
start().catch((error) => {
  const list = byId("problems");
  list.hidden = false;
  list.replaceChildren(
    el("li", {}, `The page could not be drawn: ${error.message}. It needs a browser of 2023 or later.`),
  );
  throw error;
});
