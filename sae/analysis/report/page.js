/* The page: reads the data, draws the charts, ties search, list, card, address and keys together. */

const $ = (id) => document.getElementById(id);

function drawCurves(data) {
  const { axis, x, series } = data.curves;
  if (!series.length) return;
  curves($("main-curves"), { axis, x, series: series.filter((one) => one.is_main) });
  const others = series.filter((one) => !one.is_main);
  if (others.length) curves($("other-curves"), { axis, x, series: others });
  else $("other-curves-box").remove();
}

/** Bars a fifth of a decade wide; latents that never fired have no logarithm and are said in words. */
function drawRates(data) {
  const low = Math.floor(Math.log10(1 / Math.max(data.n_tokens, 10)));
  const counts = new Array(-low * 5).fill(0);
  let silent = 0;
  for (let latent = 0; latent < data.d_sae; latent++) {
    const rate = rateOf(data, latent);
    if (rate === 0) silent++;
    else counts[Math.min(counts.length - 1, Math.floor((Math.log10(rate) - low) * 5))]++;
  }
  const edge = (i) => percent(10 ** (low + i / 5));
  histogram($("rates"), {
    counts, label: "Latents by firing rate",
    idle: `${group(silent)} of ${group(data.d_sae)} never fired`,
    read: (i) => `${group(counts[i])} latents fire on ${edge(i)} – ${edge(i + 1)} of tokens`,
    ends: Array.from({ length: -low + 1 }, (_, d) => [d * 5, percent(10 ** (low + d))]),
  });
}

function bindTheme(button) {
  const root = document.documentElement;
  const isDarkSystem = matchMedia("(prefers-color-scheme: dark)").matches;
  try { root.dataset.theme = localStorage.getItem("theme") ?? ""; } catch { /* storage is off */ }
  button.addEventListener("click", () => {
    const now = root.dataset.theme || (isDarkSystem ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* storage is off */ }
  });
}

function latentInAddress(data) {
  const match = /^#latent=(\d+)$/.exec(location.hash);
  const latent = match ? Number(match[1]) : -1;
  return latent >= 0 && latent < data.d_sae ? latent : null;
}

function bindLatents(data) {
  const explorer = $("explorer");
  const isNarrow = matchMedia("(max-width: 860px)");
  const search = makeSearch(data);
  let isReversed = false, opened = null;

  /** Draw a latent's card; `isStep` adds a step to the browser's history. */
  function open(latent, isStep) {
    if (latent === undefined) return;
    opened = latent;
    explorer.classList.add("has-card");
    drawCard($("card"), data, latent, { onBack: back, onStep: (step) => open(list.move(step), false) });
    const address = `#latent=${latent}`;
    if (location.hash !== address) history[isStep ? "pushState" : "replaceState"](null, "", address);
    if (isNarrow.matches) show(explorer);
  }

  function back() {
    explorer.classList.remove("has-card");
    history.replaceState(null, "", "#latents");
    list.mark(opened);
    $("list").focus({ preventScroll: true });
  }

  function refresh() {
    const key = $("sort").value;
    const found = search(sorted(data, key, isReversed), $("search").value, $("scope").value);
    list.show(found, key);
    if (found.includes(opened)) list.mark(opened);
    $("count").textContent = found.length === data.d_sae
      ? `${group(data.d_sae)} latents` : `${group(found.length)} of ${group(data.d_sae)}`;
  }

  /** Search for what was typed, at once: keys act on what it finds. */
  function settle() {
    clearTimeout(waiting);
    if (waiting) refresh();
    waiting = 0;
  }

  function follow() {
    const latent = latentInAddress(data);
    if (latent === null) {
      if (isNarrow.matches) explorer.classList.remove("has-card");
      return;
    }
    list.mark(latent);
    open(latent, false);
    if (isNarrow.matches || !isExplorerInSight()) show($("latents"));
  }

  const list = makeList(data, { list: $("list"), rows: $("rows"), onOpen: open });
  let waiting = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(settle, 90);
  });
  $("scope").addEventListener("change", refresh);
  $("sort").addEventListener("change", refresh);
  $("direction").addEventListener("click", () => {
    isReversed = !isReversed;
    $("direction").textContent = isReversed ? "↑" : "↓";
    refresh();
  });
  $("random").addEventListener("click", () => {
    const latent = Math.floor(Math.random() * data.d_sae);
    list.mark(latent);
    open(latent, true);
  });
  addEventListener("hashchange", follow);
  bindKeys({ list, open, back, settle, isNarrow });
  bindTip($("card"), $("tip"));
  refresh();
  if (latentInAddress(data) !== null) follow();
  else if (!isNarrow.matches) showFirst(list, explorer, data, (latent) => drawCard($("card"), data, latent, {
    onBack: back, onStep: (step) => open(list.move(step), false),
  }));

  /** Put the list in the order of a score and go there. */
  function sortBy(key) {
    $("sort").value = key;
    refresh();
    explorer.classList.remove("has-card");
    if (!isNarrow.matches) open(list.move(0), false);
    show($("latents"));
  }

  return { sortBy };
}

/** On a wide page the card is never empty: the first latent shows, without changing the address. */
function showFirst(list, explorer, data, draw) {
  const latent = list.move(0);
  explorer.classList.add("has-card");
  if (latent !== undefined) draw(latent);
}

function show(node) {
  node.scrollIntoView({ behavior: "instant" });
}

function isExplorerInSight() {
  const box = $("explorer").getBoundingClientRect();
  return box.top < innerHeight / 2 && box.bottom > innerHeight / 3;
}

function bindKeys({ list, open, back, settle, isNarrow }) {
  const takesArrows = (target) =>
    target === $("search") || $("list").contains(target) ||
    (!/^(INPUT|SELECT|SUMMARY|BUTTON|A)$/.test(target.tagName) && isExplorerInSight());
  const takesEnter = (target) => target === $("search") || $("list").contains(target) || target === document.body;

  function step(event, by) {
    if (!takesArrows(event.target)) return;
    event.preventDefault();
    settle();
    const latent = list.move(by);
    if (!isNarrow.matches) open(latent, false);
  }

  const keys = {
    "/": (event) => {
      if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
      event.preventDefault();
      $("search").focus();
      $("search").select();
    },
    ArrowDown: (event) => step(event, 1),
    ArrowUp: (event) => step(event, -1),
    Enter: (event) => {
      if (!takesEnter(event.target)) return;
      settle();
      open(list.activeLatent ?? list.move(0), true);
    },
    Escape: () => {
      if (document.activeElement === $("search")) $("search").blur();
      else if (isNarrow.matches && $("explorer").classList.contains("has-card")) back();
    },
  };
  addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey && !event.altKey) keys[event.key]?.(event);
  });
}

async function start() {
  bindTheme($("theme"));
  const data = await readData();
  addMeasuredSorts(data);
  drawCurves(data);
  drawRates(data);
  const { sortBy } = bindLatents(data);
  bindEvals(data, sortBy);
  document.documentElement.dataset.ready = "yes";
}

start();
