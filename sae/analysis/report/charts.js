/* Two small charts in SVG with hover read-outs: curves over training, and histograms. */

const SVG = "http://www.w3.org/2000/svg";
const PAD = { left: 44, right: 8, top: 6, bottom: 22 };
const LABEL_WIDTH = 54;

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Draw now and whenever the width of `box` changes. */
function onWidth(box, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== width) draw((width = box.clientWidth));
  }).observe(box);
}

/** About `n` round numbers between low and high. */
function ticks(low, high, n) {
  const raw = (high - low) / n || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * [1, 2, 5, 10].find((s) => s * unit >= raw);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-9); i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
    for (const s of [1, 2, 5]) if (s * 10 ** e >= low && s * 10 ** e <= high) found.push(s * 10 ** e);
  }
  return found.length > 4 ? found.filter((t) => /^1/.test(t.toExponential())) : found;
}

/** A scale of y: where values go (0 bottom, 1 top) and which ticks it has. */
function scaleOf(values, isLog) {
  const low = Math.min(...values), high = Math.max(...values);
  if (isLog && low > 0 && high / low > 4) {
    const [a, b] = [Math.log(low), Math.log(high)];
    return { place: (v) => (Math.log(v) - a) / (b - a), ticks: logTicks(low, high) };
  }
  const slack = (high - low) * 0.08 || Math.abs(high) * 0.1 || 0.01;
  const [a, b] = [low >= 0 ? Math.max(0, low - slack) : low - slack, high + slack];
  return { place: (v) => (v - a) / (b - a), ticks: ticks(a, b, 3) };
}

function yAxis(scale, width, height, write) {
  return scale.ticks.map((t) => {
    const y = PAD.top + (1 - scale.place(t)) * height;
    return svg("g", {},
      svg("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: y, y2: y }),
      svg("text", { class: "tick", x: PAD.left - 6, y: y + 3.5, "text-anchor": "end" }, write(t)));
  });
}

function pathOf(points) {
  let d = "", isDown = false;
  for (const point of points) {
    if (point) d += `${isDown ? "L" : "M"}${point[0].toFixed(1)},${point[1].toFixed(1)}`;
    isDown = point !== null;
  }
  return d;
}

/** Curves that share x: hovering one reads all of them. Returns nothing; fills `box`. */
function curves(box, { axis, x, series }) {
  const charts = series.map((one) => curve(box, axis, x, one, (i) => charts.forEach((c) => c.read(i))));
}

function curve(box, axis, x, { label, kind, is_log: isLog, y }, readAll) {
  const write = kind === "share" ? percent : number;
  const value = el("b", {});
  const at = el("span", { class: "at" });
  const plot = el("div", { class: "plot" });
  box.append(el("figure", { class: "panel" }, el("figcaption", {}, label, value, at), plot));
  const known = y.filter((v) => v !== null);
  const scale = scaleOf(known, isLog);
  const height = 110;
  let dots = [], cursor = null;

  function read(i) {
    const j = i ?? y.findLastIndex((v) => v !== null);
    value.textContent = write(y[j]);
    at.textContent = i === null ? "" : `at ${short(x[j])} ${axis}`;
    cursor?.toggleAttribute("hidden", i === null || !dots[j]);
    if (cursor && dots[j]) cursor.setAttribute("transform", `translate(${dots[j][0]},0)`);
    cursor?.querySelector("circle").setAttribute("cy", dots[j]?.[1] ?? 0);
  }

  function draw(width) {
    const span = Math.max(x.at(-1) - x[0], 1), inner = width - PAD.left - PAD.right;
    const across = (v) => PAD.left + ((v - x[0]) / span) * inner;
    dots = y.map((v, i) => v === null ? null : [across(x[i]), PAD.top + (1 - scale.place(v)) * height]);
    cursor = svg("g", { class: "cursor" },
      svg("line", { y1: PAD.top, y2: PAD.top + height }), svg("circle", { r: 3.5 }));
    const bottom = PAD.top + height + 16;
    const picture = svg("svg", { width, height: height + PAD.top + PAD.bottom, role: "img", "aria-label": `${label} over ${axis}` },
      ...yAxis(scale, width, height, kind === "share" ? percent : short),
      svg("path", { class: "curve", d: pathOf(dots) }),
      svg("text", { class: "tick", x: PAD.left, y: bottom }, short(x[0])),
      svg("text", { class: "tick", x: width - PAD.right, y: bottom, "text-anchor": "end" }, `${short(x.at(-1))} ${axis}`),
      cursor);
    picture.addEventListener("pointermove", (event) => {
      const wanted = x[0] + ((event.offsetX - PAD.left) / inner) * span;
      readAll(nearest(x, wanted));
    });
    picture.addEventListener("pointerleave", () => readAll(null));
    plot.replaceChildren(picture);
    read(null);
  }

  onWidth(plot, draw);
  return { read };
}

function nearest(sorted, wanted) {
  let best = 0;
  sorted.forEach((v, i) => {
    if (Math.abs(v - wanted) < Math.abs(sorted[best] - wanted)) best = i;
  });
  return best;
}

/** Bars of `counts`; `read(i)` says what bar i is, `ends` labels places [bar edge, text]. */
function histogram(box, { counts, height = 120, read, ends, idle, label }) {
  const caption = el("p", { class: "readout" }, idle);
  const plot = el("div", { class: "plot" });
  box.replaceChildren(plot, caption);
  const scale = { place: (v) => v / high, ticks: [] };
  const high = Math.max(...counts, 1);
  scale.ticks = ticks(0, high, 3).filter(Number.isInteger);

  onWidth(plot, (width) => {
    const inner = width - PAD.left - PAD.right, step = inner / counts.length;
    const every = Math.ceil(LABEL_WIDTH / (inner / Math.max(ends.length - 1, 1)));
    const labels = ends.filter((_, i) => (ends.length - 1 - i) % every === 0);
    const bars = counts.map((n, i) => svg("rect", {
      class: "histogram-bar", x: PAD.left + i * step + Math.min(0.75, step / 8),
      width: Math.max(step - Math.min(1.5, step / 4), 0.5),
      y: PAD.top + (1 - n / high) * height, height: (n / high) * height,
    }));
    const picture = svg("svg", { width, height: height + PAD.top + PAD.bottom, role: "img", "aria-label": label },
      ...yAxis(scale, width, height, short), ...bars, ...labels.map(([edge, text]) => svg("text", {
        class: "tick", x: PAD.left + edge * step, y: PAD.top + height + 16,
        "text-anchor": edge >= counts.length ? "end" : edge <= 0 ? "start" : "middle",
      }, text)));
    picture.addEventListener("pointermove", (event) => {
      const i = Math.floor((event.offsetX - PAD.left) / step);
      bars.forEach((bar, j) => bar.classList.toggle("is-read", i === j));
      caption.textContent = i >= 0 && i < counts.length ? read(i) : idle;
    });
    picture.addEventListener("pointerleave", () => {
      bars.forEach((bar) => bar.classList.remove("is-read"));
      caption.textContent = idle;
    });
    plot.replaceChildren(picture);
  });
}
