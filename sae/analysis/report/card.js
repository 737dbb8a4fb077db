/* One latent's card. */

function tokenSpan(text, share, value, isPeak) {
  return el("span", {
    class: isPeak ? "token is-peak" : "token", "data-activation": number(value), "data-text": text,
    style: share > 0 ? `--share:${share.toFixed(3)}` : undefined,
  });
}

function contextRow(data, context, largest) {
  const texts = joinSplit(context.tokens.map((id) => data.texts[id]));
  const text = el("p", { class: "context-text", dir: "auto" });
  if (context.isCutBefore) text.append(mark("…"));
  texts.forEach((part, i) => {
    const share = context.shares[i];
    appendToken(text, part, tokenSpan(part, share, share * largest, i === context.peak));
  });
  if (context.isCutAfter) text.append(mark("…"));
  return el("li", { class: "context" }, el("span", { class: "context-value" }, number(context.value)), text);
}

function effectList(data, latent, which, title) {
  const effects = effectsOf(data, latent, which);
  const largest = Math.max(...effects.map(({ z }) => Math.abs(z)), 1e-9);
  const items = effects.map(({ text, z }) => {
    const token = el("code", {});
    appendVisible(token, text, { leading: true });
    const bar = el("i", { style: `width:${(100 * Math.abs(z)) / largest}%` });
    return el("li", {}, token, el("span", { class: "effect-bar" }, bar), el("span", { class: "number" }, z.toFixed(1)));
  });
  return el("section", {}, el("h4", {}, title, el("small", {}, "sd")), el("ol", { class: "effects" }, ...items));
}

function nearestList(data, latent) {
  const n = data.near.length / data.d_sae;
  const cosines = row(data.cosines, latent, n);
  const items = Array.from(row(data.near, latent, n), (near, i) =>
    el("li", {}, el("a", { href: `#latent=${near}` }, String(near)), snippet(data, near),
      el("span", { class: "number" }, (cosines[i] / 32767).toFixed(2))));
  return el("section", { class: "nearest" },
    el("h4", {}, "Nearest latents", el("small", {}, "decoder cosine")), el("ol", {}, ...items));
}

function activationHistogram(data, latent) {
  const bins = data.edges.length - 1;
  let counts = Array.from(row(data.histogram, latent, bins));
  const first = counts.findIndex((n) => n > 0);
  const last = counts.findLastIndex((n) => n > 0) + 1;
  counts = counts.slice(first, last);
  const edges = data.edges.slice(first, last + 1);
  const box = el("div", {});
  histogram(box, {
    counts, height: 84, label: "Tokens by activation", idle: "tokens by activation, log scale",
    read: (i) => `${group(counts[i])} tokens in ${number(edges[i])} – ${number(edges[i + 1])}`,
    ends: [[0, number(edges[0])], [counts.length, number(edges.at(-1))]],
  });
  return el("section", {}, el("h4", {}, "Activations"), box);
}

function fact(label, value, note) {
  return el("div", {}, el("dt", {}, label), el("dd", {}, value, note ? el("small", {}, note) : ""));
}

function facts(data, latent) {
  const list = el("dl", { class: "card-facts" },
    fact("Fires on", percent(rateOf(data, latent)), `${group(data.counts[latent])} of ${group(data.n_tokens)} tokens`),
    fact("Max activation", number(data.maxima[latent])));
  if (data.scores) list.append(fact("Logit effect", data.scores[latent].toFixed(1), "sd above the mean token"));
  for (const { key, label, unit } of data.measured) {
    if (!Number.isNaN(data[key][latent])) list.append(fact(label, measuredText(data[key][latent], unit)));
  }
  return list;
}

/** What was said of the latent in words, and by whom; null where nothing was. */
function explanationBox(data, latent) {
  const said = data.explanations[latent];
  if (!said) return null;
  const items = said.map(([text, by]) =>
    el("p", { class: "explanation" }, text || "nothing found", el("small", {}, `by ${by}`)));
  return el("section", { class: "explanations" }, el("h4", {}, "Explanation"), ...items);
}

function drawCard(card, data, latent, { onBack, onStep }) {
  const contexts = contextsOf(data, latent);
  const largest = data.maxima[latent];
  const list = el("ol", { class: "contexts" }, ...contexts.map((c) => contextRow(data, c, largest)));
  const head = el("header", { class: "card-head" },
    el("button", { type: "button", class: "quiet back", onclick: onBack }, "‹ All latents"),
    el("h3", {}, el("small", {}, "Latent "), String(latent)),
    el("span", { class: "steps" },
      el("button", { type: "button", class: "quiet", "aria-label": "Previous in the list", onclick: () => onStep(-1) }, "↑"),
      el("button", { type: "button", class: "quiet", "aria-label": "Next in the list", onclick: () => onStep(1) }, "↓")));
  const side = el("div", { class: "card-side" });
  if (contexts.length) side.append(activationHistogram(data, latent));
  if (data.scores) {
    side.append(effectList(data, latent, "promoted", "Tokens promoted"), effectList(data, latent, "suppressed", "Tokens suppressed"));
  }
  const main = el("div", { class: "card-main" }, el("h4", {}, "Strongest contexts"),
    contexts.length ? list : el("p", { class: "empty" }, `It never fired in these ${group(data.n_tokens)} tokens.`),
    nearestList(data, latent));
  const explanation = explanationBox(data, latent);
  card.replaceChildren(head, facts(data, latent), ...(explanation ? [explanation] : []), el("div", { class: "card-body" }, main, side));
  card.scrollTop = 0;
}

/** Show a token's exact activation beside the pointer. */
function bindTip(card, tip) {
  card.addEventListener("pointerover", (event) => {
    const token = event.target.closest?.(".token");
    tip.hidden = !token;
    if (!token) return;
    tip.replaceChildren(el("b", {}, token.dataset.activation), " ");
    const text = el("code", {});
    appendVisible(text, token.dataset.text, { leading: true });
    tip.append(text);
    const box = token.getBoundingClientRect();
    tip.style.left = `${Math.max(6, Math.min(box.left, innerWidth - tip.offsetWidth - 6))}px`;
    tip.style.top = `${box.top > 40 ? box.top - tip.offsetHeight - 5 : box.bottom + 5}px`;
  });
  card.addEventListener("pointerleave", () => { tip.hidden = true; });
  addEventListener("scroll", () => { tip.hidden = true; }, true);
}
