/* The report's data: base64 → gzip → head (JSON) and typed arrays. See payload.py for the layout. */

const TYPES = { Uint8Array, Uint16Array, Uint32Array, Int16Array, Float32Array };
const ALIGNMENT = 8;

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

async function gunzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const start = 4 + length;
  if (start % ALIGNMENT) throw new Error("the data's arrays are not aligned");
  for (const [name, [type, offset, size]] of Object.entries(head.arrays)) {
    head[name] = new TYPES[type](buffer, start + offset, size);
  }
  return head;
}

async function readData() {
  const script = document.getElementById("data");
  const data = unpack(await gunzip(fromBase64(script.textContent)));
  script.remove();
  data.noToken = data.tokens.BYTES_PER_ELEMENT === 2 ? 0xffff : 0xffffffff;
  return data;
}

/** The n entries that belong to `latent` in an array of n a latent. */
function row(array, latent, n) {
  return array.subarray(latent * n, (latent + 1) * n);
}

/** A latent's contexts, strongest first: token ids, activations, place of the peak. */
function contextsOf(data, latent) {
  const { contexts, window: width, left } = data;
  const found = [];
  for (let c = 0; c < contexts; c++) {
    const place = latent * contexts + c;
    const tokens = row(data.tokens, place, width);
    if (tokens[left] === data.noToken) break;
    const first = tokens.findIndex((token) => token !== data.noToken);
    let last = width;
    while (tokens[last - 1] === data.noToken) last--;
    const share = row(data.activations, place, width).subarray(first, last);
    found.push({
      tokens: Array.from(tokens.subarray(first, last)),
      shares: Array.from(share, (a) => a / 65535),
      peak: left - first,
      value: data.peaks[place],
      isCutBefore: first === 0,
      isCutAfter: last === width,
    });
  }
  return found;
}

function rateOf(data, latent) {
  return data.n_tokens ? data.counts[latent] / data.n_tokens : 0;
}

/** The tokens that a latent promotes or suppresses, with z; empty where there are no effects. */
function effectsOf(data, latent, which) {
  if (!data[which]) return [];
  const n = data[which].length / data.d_sae;
  const z = row(data[`${which}_z`], latent, n);
  return Array.from(row(data[which], latent, n), (id, i) => ({ text: data.texts[id], z: z[i] / 256 }));
}
