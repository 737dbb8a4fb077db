/* Which latents are listed, and in which order. */

const SORTS = {
  rate: { of: (data, latent) => data.counts[latent], write: (data, latent) => percent(rateOf(data, latent)) },
  max: { of: (data, latent) => data.maxima[latent], write: (data, latent) => number(data.maxima[latent]) },
  effect: { of: (data, latent) => data.scores[latent], write: (data, latent) => `${data.scores[latent].toFixed(1)} sd` },
  id: { of: (_, latent) => -latent, write: (data, latent) => percent(rateOf(data, latent)) },
};

/** All latents, largest first; equal ones by id. `isReversed` turns the order round. */
function sorted(data, key, isReversed) {
  const values = Float64Array.from({ length: data.d_sae }, (_, latent) => SORTS[key].of(data, latent));
  const order = Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
  return isReversed ? order.reverse() : order;
}

function makeSearch(data) {
  const contexts = new Array(data.d_sae);
  const promoted = new Array(data.d_sae);

  function contextText(latent) {
    contexts[latent] ??= contextsOf(data, latent)
      .map(({ tokens }) => joinSplit(tokens.map((id) => data.texts[id])).join(""))
      .join("\n").toLowerCase();
    return contexts[latent];
  }

  function promotedText(latent) {
    promoted[latent] ??= effectsOf(data, latent, "promoted").map(({ text }) => text).join("\n").toLowerCase();
    return promoted[latent];
  }

  const tests = {
    id: (latent, query) => String(latent).startsWith(query.replace(/^#/, "").trim()),
    promoted: (latent, query) => promotedText(latent).includes(query),
    contexts: (latent, query) => contextText(latent).includes(query),
  };

  /** The latents of `order` that match; in everything, the latent whose id is asked comes first. */
  return function search(order, query, scope) {
    const wanted = query.toLowerCase();
    if (!wanted.trim()) return order;
    const used = scope === "all" ? Object.values(tests) : [tests[scope]];
    const found = order.filter((latent) => used.some((test) => test(latent, wanted)));
    const exact = /^#?\d+$/.test(wanted.trim()) ? Number(wanted.trim().replace("#", "")) : -1;
    const isExactFirst = exact >= 0 && exact < data.d_sae && scope !== "promoted" && scope !== "contexts";
    return isExactFirst ? [exact, ...found.filter((latent) => latent !== exact)] : found;
  };
}
