/* Which latents are listed, and in which order. */

const SORTS = {
  rate: { of: (data, latent) => data.counts[latent], write: (data, latent) => percent(rateOf(data, latent)) },
  max: { of: (data, latent) => data.maxima[latent], write: (data, latent) => number(data.maxima[latent]) },
  effect: { of: (data, latent) => data.scores[latent], write: (data, latent) => `${data.scores[latent].toFixed(1)} sd` },
  id: { of: (_, latent) => -latent, write: (data, latent) => percent(rateOf(data, latent)) },
};

/** One more order for each score that evals gave latents. */
function addMeasuredSorts(data) {
  for (const { key, unit } of data.measured) {
    const of = (_, latent) => data[key][latent];
    SORTS[key] = { of, write: (_, latent) => measuredText(data[key][latent], unit) };
  }
}

function measuredText(value, unit) {
  if (Number.isNaN(value)) return "–";
  return unit === "share" ? percent(value) : number(value);
}

/** All latents, largest first; equal ones by id, those without a value last. `isReversed` turns the order round. */
function sorted(data, key, isReversed) {
  const values = Float64Array.from({ length: data.d_sae }, (_, latent) => SORTS[key].of(data, latent));
  const all = Array.from(values.keys());
  const order = all.filter((i) => !Number.isNaN(values[i])).sort((a, b) => values[b] - values[a] || a - b);
  const without = all.filter((i) => Number.isNaN(values[i]));
  return [...(isReversed ? order.reverse() : order), ...without];
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

  function explanationText(latent) {
    return (data.explanations[latent] ?? []).map(([text]) => text).join("\n").toLowerCase();
  }

  const tests = {
    explanations: (latent, query) => explanationText(latent).includes(query),
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
    const isExactFirst = exact >= 0 && exact < data.d_sae && (scope === "all" || scope === "id");
    return isExactFirst ? [exact, ...found.filter((latent) => latent !== exact)] : found;
  };
}
