/* The list of latents: only rows in sight exist, however many latents there are. */

const ROW_HEIGHT = 58;
const OVERSCAN = 6;
const SNIPPET = { charactersBefore: 20, after: 10 };

/** The tokens before the peak that leave room for it in a row. */
function leadIn(texts, peak) {
  let first = peak, length = 0;
  while (first > 0 && length + texts[first - 1].length <= SNIPPET.charactersBefore) {
    length += texts[--first].length;
  }
  return texts.slice(first, peak);
}

function snippet(data, latent) {
  const [context] = contextsOf(data, latent);
  const box = el("span", { class: "snippet" });
  if (!context) return box.append(el("i", {}, "never fired")), box;
  const texts = joinSplit(context.tokens.map((id) => data.texts[id]));
  const { peak } = context;
  leadIn(texts, peak).forEach((text, i) => appendVisible(box, i ? text : text.trimStart() || text));
  appendToken(box, texts[peak], el("mark", {}));
  texts.slice(peak + 1, peak + SNIPPET.after).forEach((text) => appendVisible(box, text));
  return box;
}

/** Three words that the latent promotes: tokens that differ only in spaces are one. */
function promotedWords(data, latent) {
  const words = effectsOf(data, latent, "promoted").map(({ text }) => text.trim() || text);
  return [...new Set(words)].slice(0, 3);
}

function makeList(data, { list, rows, onOpen }) {
  let shown = [], active = -1, sort = "id";

  function rowFor(latent, place) {
    const tops = el("span", { class: "tops" });
    promotedWords(data, latent).forEach((text) => {
      const word = el("span", {});
      appendVisible(word, text);
      tops.append(word);
    });
    return el("div", {
      class: "row", role: "option", id: `row-${latent}`, "aria-selected": String(place === active),
      style: `top:${place * ROW_HEIGHT}px`, "data-latent": latent,
      onclick: () => { setActive(place); onOpen(latent, true); },
    },
    el("span", { class: "row-id" }, String(latent)), snippet(data, latent),
    el("span", { class: "row-value" }, SORTS[sort].write(data, latent)), tops);
  }

  function draw() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - OVERSCAN);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW_HEIGHT) + OVERSCAN);
    rows.replaceChildren(...shown.slice(first, last).map((latent, i) => rowFor(latent, first + i)));
    if (!shown.length) rows.append(el("p", { class: "empty" }, "No latent matches."));
    if (active >= 0) list.setAttribute("aria-activedescendant", `row-${shown[active]}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function setActive(place) {
    active = Math.max(-1, Math.min(place, shown.length - 1));
    const top = active * ROW_HEIGHT;
    if (active >= 0 && top < list.scrollTop) list.scrollTop = top;
    else if (active >= 0 && top + ROW_HEIGHT > list.scrollTop + list.clientHeight) {
      list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
    }
    draw();
  }

  let isQueued = false;
  list.addEventListener("scroll", () => {
    if (isQueued) return;
    isQueued = true;
    requestAnimationFrame(() => { isQueued = false; draw(); });
  });
  new ResizeObserver(draw).observe(list);

  return {
    show(latents, sortKey) {
      [shown, sort, active] = [latents, sortKey, -1];
      rows.style.height = `${Math.max(shown.length * ROW_HEIGHT, 1)}px`;
      list.scrollTop = 0;
      draw();
    },
    /** Move by `step` rows and return the latent reached, or undefined in an empty list. */
    move(step) {
      setActive(active < 0 ? 0 : Math.max(0, active + step));
      return shown[active];
    },
    mark(latent) { setActive(shown.indexOf(latent)); },
    get activeLatent() { return shown[active]; },
  };
}
