/* A page an eval: one shows at a time, chosen by its tab or by the address; and how its scores of
   latents are spread. */

const SCORE_BINS = 24;

function drawScore(box, data, { key, label, unit }) {
  const values = Array.from(data[key]).filter((value) => !Number.isNaN(value));
  if (!values.length) return box.remove();
  const low = Math.min(...values), step = (Math.max(...values) - low) / SCORE_BINS || 1;
  const counts = new Array(SCORE_BINS).fill(0);
  values.forEach((value) => counts[Math.min(SCORE_BINS - 1, Math.floor((value - low) / step))]++);
  const edge = (i) => measuredText(low + i * step, unit);
  histogram(box, {
    counts, height: 84, label: `Latents by ${label}`, idle: `${group(values.length)} latents`,
    read: (i) => `${group(counts[i])} latents in ${edge(i)} – ${edge(i + 1)}`,
    ends: [[0, edge(0)], [SCORE_BINS, edge(SCORE_BINS)]],
  });
}

/** The scores that an eval gave latents, each with its spread and a way to the list in its order. */
function scoreFigures(data, name, onSort) {
  return data.measured.filter((score) => score.eval === name).map((score) => {
    const box = el("div", {});
    drawScore(box, data, score);
    const order = el("button", { type: "button", class: "link", onclick: () => onSort(score.key) }, "see latents in this order");
    return el("section", { class: "score" }, el("h4", {}, score.label), box, order);
  });
}

function evalInAddress() {
  const match = /^#eval-(\w+)$/.exec(location.hash);
  return match ? match[1] : null;
}

function bindEvals(data, onSort) {
  const pages = Array.from(document.querySelectorAll(".eval-page"));
  if (!pages.length) return;
  const names = pages.map((page) => page.dataset.eval);
  const tabs = names.map((name) => $(`tab-${name}`));

  function choose(name) {
    pages.forEach((page) => { page.hidden = page.dataset.eval !== name; });
    tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(names[i] === name));
      tab.tabIndex = names[i] === name ? 0 : -1;
      if (names[i] === name) tab.parentElement.scrollLeft = tab.offsetLeft - tab.parentElement.offsetLeft - 40;
    });
  }

  function follow() {
    const name = evalInAddress();
    if (!names.includes(name)) return;
    choose(name);
    show($("measurements"));
  }

  pages.forEach((page) => page.querySelector(".scores").append(...scoreFigures(data, page.dataset.eval, onSort)));
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", (event) => {
      event.preventDefault();
      history.replaceState(null, "", `#eval-${names[i]}`);
      choose(names[i]);
    });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      const next = tabs[(i + step + tabs.length) % tabs.length];
      next.click();
      next.focus();
    });
  });
  choose(names[0]);
  addEventListener("hashchange", follow);
  follow();
}
