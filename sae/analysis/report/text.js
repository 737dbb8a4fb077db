/* How tokens and numbers are written for a person. Text only ever enters the page as text nodes. */

const BYTES = /^⟨([0-9A-F]{2}(?: [0-9A-F]{2})*)⟩$/;
/* Texts of nothing but control, format, combining or unusual space characters. */
const INVISIBLE = /^(?:(?![ \n\r\t])[\p{C}\p{Z}\p{M}])+$/u;
const MARKS = { "\n": "↵", "\r": "␍", "\t": "⇥" };

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function bytesOf(text) {
  const match = BYTES.exec(text);
  return match && match[1].split(" ").map((hex) => parseInt(hex, 16));
}

/** The character(s) that a run of part-character tokens spells, or null. */
function spelled(run) {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(run.flat()));
  } catch {
    return null;
  }
}

/** Texts of consecutive tokens; a character split over tokens stands at the last of them. */
function joinSplit(texts) {
  const joined = texts.slice();
  for (let i = 0; i < texts.length; i++) {
    const run = [];
    while (i + run.length < texts.length && bytesOf(texts[i + run.length])) {
      run.push(bytesOf(texts[i + run.length]));
    }
    const text = run.length > 1 ? spelled(run) : null;
    if (text !== null) {
      joined.fill("", i, i + run.length - 1);
      joined[i + run.length - 1] = text;
    }
    i += Math.max(run.length - 1, 0);
  }
  return joined;
}

function mark(character) {
  return el("span", { class: "mark" }, character);
}

/** U+200B for a character that shows nothing. */
function codePoints(text) {
  return [...text].map((c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`).join(" ");
}

/** Append `text` to `node` with newlines, tabs and lone (or leading) spaces made visible. */
function appendVisible(node, text, { leading = false } = {}) {
  if (text === "") return void node.append(mark("‥"));
  if (INVISIBLE.test(text)) return void node.append(mark(codePoints(text)));
  const isBlank = /^ +$/.test(text);
  let plain = "";
  const flush = () => {
    if (plain) node.append(plain);
    plain = "";
  };
  [...text].forEach((character, i) => {
    const isShownSpace = character === " " && (isBlank || (leading && i === 0));
    if (isShownSpace || MARKS[character]) {
      flush();
      node.append(mark(isShownSpace ? "·" : MARKS[character]));
    } else plain += character;
  });
  flush();
}

function group(n) {
  return n.toLocaleString("en-US");
}

/** Append a token in running text: `box` holds it without its leading space, which stays outside. */
function appendToken(node, text, box) {
  const hasSpace = text.length > 1 && text[0] === " " && text[1] !== " ";
  if (hasSpace) node.append(" ");
  appendVisible(box, hasSpace ? text.slice(1) : text);
  node.append(box);
}

/** Four significant digits, no trailing zeros. */
function number(x) {
  if (x === null || !Number.isFinite(x)) return "–";
  if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6)) return String(Number(x.toPrecision(3)).toExponential());
  return Number(x.toPrecision(4)).toLocaleString("en-US", { maximumFractionDigits: 6 });
}

function percent(share) {
  if (share === null || !Number.isFinite(share)) return "–";
  return `${Number((share * 100).toPrecision(2))} %`;
}

/** Large counts for axes: 1.2M, 350k. */
function short(n) {
  if (Math.abs(n) >= 1e9) return `${Number((n / 1e9).toPrecision(3))}B`;
  if (Math.abs(n) >= 1e6) return `${Number((n / 1e6).toPrecision(3))}M`;
  if (Math.abs(n) >= 1e4) return `${Number((n / 1e3).toPrecision(3))}k`;
  return number(n);
}
