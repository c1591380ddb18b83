"use strict";
// A GPT-2 in one file: its vocabulary, its forward pass and its sampling, as tokenizer.py, model.py, sampling.py and
// inference/decoder.py have them. Nothing here touches the page or the network; Node runs it as it is.

// ---- One kernel in WebAssembly -------------------------------------------------------------------------------------
// y[r] = sum of w[r][c] * x[c], 16 numbers a turn in four SIMD sums. In the text format:
//   (func (param $w $x $y $rows $end $skip i32) (local $p i32) (local $a $b $c $d v128)   ;; $end: of x, in bytes
//     (loop $row  (set $p $x) (set $a..$d 0)
//       (loop $col  ($a += w[0..3] * p[0..3]) ... ($d += w[12..15] * p[12..15])  (w += 64) (p += 64)
//         (br_if $col (p < end)))
//       (w += skip)  (y[0] = horizontal sum of a + b + c + d)  (y += 4)  (br_if $row (--rows))))
// The memory is imported, so that JavaScript lays out weights and cache in it.
function kernelBytes() {
  const [w, x, y, rows, end, skip, p] = [0, 1, 2, 3, 4, 5, 6], sums = [7, 8, 9, 10];
  const get = (local) => [0x20, local], set = (local) => [0x21, local];
  const i32 = (value) => [0x41, ...leb(value, true)];
  const plus = (local, value) => [...get(local), ...value, 0x6a, ...set(local)]; // i32.add
  const load = (local, offset) => [...get(local), 0xfd, 0x00, 0x02, offset]; // v128.load, aligned to 4 bytes
  const ADD = [0xfd, 0xe4, 0x01], MUL = [0xfd, 0xe6, 0x01], XOR = [0xfd, 0x51]; // f32x4.add, f32x4.mul, v128.xor
  const lane = (number) => [...get(sums[0]), 0xfd, 0x1f, number]; // f32x4.extract_lane
  const body = [
    0x02, 0x01, 0x7f, 0x04, 0x7b, // locals: one i32, four v128
    0x03, 0x40, // loop $row
    ...get(x), ...set(p),
    ...sums.flatMap((sum) => [...get(sum), ...get(sum), ...XOR, ...set(sum)]), // to zero
    0x03, 0x40, // loop $col
    ...sums.flatMap((sum, n) => [...get(sum), ...load(w, 16 * n), ...load(p, 16 * n), ...MUL, ...ADD, ...set(sum)]),
    ...plus(w, i32(64)), ...plus(p, i32(64)),
    ...get(p), ...get(end), 0x49, 0x0d, 0x00, // i32.lt_u, br_if $col
    0x0b,
    ...plus(w, get(skip)),
    ...get(sums[0]), ...get(sums[1]), ...ADD, ...get(sums[2]), ...get(sums[3]), ...ADD, ...ADD, ...set(sums[0]),
    ...get(y), ...lane(0), ...lane(1), 0x92, ...lane(2), ...lane(3), 0x92, 0x92, 0x38, 0x02, 0x00, // f32.add, f32.store
    ...plus(y, i32(4)),
    ...get(rows), ...i32(-1), 0x6a, 0x22, rows, 0x0d, 0x00, // local.tee, br_if $row
    0x0b,
    0x0b,
  ];
  const section = (id, content) => [id, ...leb(content.length), ...content];
  return new Uint8Array([
    0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00, // "\0asm", version 1
    ...section(1, [1, 0x60, 6, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0]), // one type: six i32, no result
    ...section(2, [1, 1, 0x6d, 1, 0x6d, 2, 0, 1]), // import memory "m" "m"
    ...section(3, [1, 0]),
    ...section(7, [1, 1, 0x66, 0, 0]), // export function "f"
    ...section(10, [1, ...leb(body.length), ...body]),
  ]);
}

/** LEB128, WebAssembly's way of writing whole numbers. */
function leb(value, signed = false) {
  const bytes = [];
  for (;;) {
    const low = value & 0x7f;
    value >>= 7;
    const done = signed ? (value === 0 && !(low & 0x40)) || (value === -1 && low & 0x40) : value === 0;
    bytes.push(done ? low : low | 0x80);
    if (done) return bytes;
  }
}

/** (w, x, y, rows, end, skip), all in bytes of `memory`: the kernel, or the same in JavaScript where there is no SIMD. */
function matrixVector(memory, plain = false) {
  if (!plain) {
    try {
      return new WebAssembly.Instance(new WebAssembly.Module(kernelBytes()), { m: { m: memory } }).exports.f;
    } catch {
      // An old browser: fall through.
    }
  }
  const numbers = new Float32Array(memory.buffer);
  return (w, x, y, rows, end, skip) => {
    const columns = (end - x) >> 2, step = columns + (skip >> 2);
    x >>= 2;
    for (let row = 0, at = w >> 2, out = y >> 2; row < rows; row++, at += step, out++) {
      let a = 0, b = 0, c = 0, d = 0;
      for (let n = 0; n < columns; n += 4) {
        a += numbers[at + n] * numbers[x + n];
        b += numbers[at + n + 1] * numbers[x + n + 1];
        c += numbers[at + n + 2] * numbers[x + n + 2];
        d += numbers[at + n + 3] * numbers[x + n + 3];
      }
      numbers[out] = a + b + (c + d);
    }
  };
}

// ---- Numbers out of the page ---------------------------------------------------------------------------------------

/** The bytes of a base64 text. */
function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let at = 0; at < bytes.length; at++) bytes[at] = binary.charCodeAt(at);
  return bytes;
}

let halves = null; // float32 of each of the 65,536 float16s
function float16(bits) {
  if (!halves) {
    halves = new Float32Array(65536);
    for (let code = 0; code < 65536; code++) {
      const sign = code & 0x8000 ? -1 : 1, exponent = (code >> 10) & 31, part = code & 1023;
      if (exponent === 31) halves[code] = part ? NaN : sign * Infinity;
      else halves[code] = sign * (exponent ? 2 ** (exponent - 15) * (1 + part / 1024) : 2 ** -14 * (part / 1024));
    }
  }
  return halves[bits];
}

/** The numbers in little-endian bytes of type "f16" or "f32". */
function decodeNumbers(bytes, type) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const found = new Float32Array(bytes.byteLength / (type === "f16" ? 2 : 4));
  for (let at = 0; at < found.length; at++) {
    found[at] = type === "f16" ? float16(view.getUint16(2 * at, true)) : view.getFloat32(4 * at, true);
  }
  return found;
}

// ---- The model -----------------------------------------------------------------------------------------------------

const padded = (count) => (count + 15) & ~15; // to whole turns of the kernel

class GPT {
  /** shape: {n_layer, n_head, n_embd, block_size, tokens}. tensors: [{name, shape}]. read(n): tensor n's numbers. */
  constructor(shape, tensors, read, plain = false) {
    Object.assign(this, shape);
    const C = this.n_embd, D = C / this.n_head;
    this.headSize = D;
    const wide = padded(4 * C) + padded(this.tokens) + 8 * padded(C) + padded(this.block_size) + 64;
    const store = this.n_layer * this.n_head * (this.block_size * padded(D) + D * padded(this.block_size));
    let total = wide + store;
    for (const tensor of tensors) total += (tensor.shape[1] ? tensor.shape[0] : 1) * padded(tensor.shape.at(-1));
    this.memory = new WebAssembly.Memory({ initial: Math.ceil((4 * total) / 65536) + 1 });
    this.numbers = new Float32Array(this.memory.buffer);
    this.kernel = matrixVector(this.memory, plain);
    this.used = 0;
    this.tensors = new Map();
    tensors.forEach(({ name, shape: [rows, columns] }, index) => {
      if (columns === undefined) [rows, columns] = [1, rows];
      const numbers = read(index), stride = padded(columns), start = this.take(rows * stride);
      for (let row = 0; row < rows; row++) {
        this.numbers.set(numbers.subarray(row * columns, (row + 1) * columns), start + row * stride);
      }
      this.tensors.set(name, { start, rows, columns, stride });
    });
    this.x = this.take(padded(C)); // the residual stream
    this.normed = this.take(padded(C));
    this.qkv = this.take(padded(3 * C) + 16);
    this.query = this.take(padded(D));
    this.scores = this.take(padded(this.block_size));
    this.mixed = this.take(padded(C));
    this.out = this.take(padded(C));
    this.wide = this.take(padded(4 * C));
    this.logits = this.take(padded(this.tokens));
    this.keys = this.take(this.n_layer * this.n_head * this.block_size * padded(D)); // [layer, head, position, channel]
    this.values = this.take(this.n_layer * this.n_head * D * padded(this.block_size)); // [layer, head, channel, position]
    this.held = []; // the ids whose keys and values are there
  }

  take(count) {
    const start = this.used;
    this.used += count;
    return start;
  }

  /** out = matrix `name` times the vector at `x`, plus its bias if it has one; all are places among the numbers. */
  multiply(name, x, out) {
    const { start, rows, stride } = this.tensors.get(`${name}.weight`), bias = this.tensors.get(`${name}.bias`);
    this.kernel(4 * start, 4 * x, 4 * out, rows, 4 * (x + stride), 0);
    if (bias) for (let n = 0; n < rows; n++) this.numbers[out + n] += this.numbers[bias.start + n];
  }

  /** LayerNorm `name` of the residual stream, into `normed`. */
  norm(name) {
    const { numbers, x, n_embd: C } = this, out = this.normed;
    const weight = this.tensors.get(`${name}.weight`).start, bias = this.tensors.get(`${name}.bias`).start;
    let mean = 0, variance = 0;
    for (let n = 0; n < C; n++) mean += numbers[x + n];
    mean /= C;
    for (let n = 0; n < C; n++) variance += (numbers[x + n] - mean) ** 2;
    const scale = 1 / Math.sqrt(variance / C + 1e-5);
    for (let n = 0; n < C; n++) numbers[out + n] = (numbers[x + n] - mean) * scale * numbers[weight + n] + numbers[bias + n];
  }

  attend(layer, position) {
    const { numbers, kernel, n_head: H, n_embd: C, headSize: D, block_size: T, qkv, query, scores } = this;
    const Dp = padded(D), Tp = padded(T), seen = position + 1, used = padded(seen), scale = 1 / Math.sqrt(D);
    for (let head = 0; head < H; head++) {
      const keys = this.keys + (layer * H + head) * T * Dp, values = this.values + (layer * H + head) * D * Tp;
      for (let n = 0; n < D; n++) {
        numbers[query + n] = numbers[qkv + head * D + n] * scale;
        numbers[keys + position * Dp + n] = numbers[qkv + C + head * D + n];
        numbers[values + n * Tp + position] = numbers[qkv + 2 * C + head * D + n];
      }
      kernel(4 * keys, 4 * query, 4 * scores, seen, 4 * (query + Dp), 0);
      let most = -Infinity, sum = 0;
      for (let n = 0; n < seen; n++) most = Math.max(most, numbers[scores + n]);
      for (let n = 0; n < seen; n++) sum += numbers[scores + n] = Math.exp(numbers[scores + n] - most);
      for (let n = 0; n < seen; n++) numbers[scores + n] /= sum;
      numbers.fill(0, scores + seen, scores + used);
      kernel(4 * values, 4 * scores, 4 * (this.mixed + head * D), D, 4 * (scores + used), 4 * (Tp - used));
    }
  }

  /** Read one more token; its logits [tokens] (a view, until the next call) if `wanted`. */
  forward(id, wanted) {
    const { numbers, x, n_embd: C } = this, position = this.held.length;
    const words = this.tensors.get("token_embd.weight"), places = this.tensors.get("position_embd.weight");
    for (let n = 0; n < C; n++) {
      numbers[x + n] = numbers[words.start + id * words.stride + n] + numbers[places.start + position * places.stride + n];
    }
    for (let layer = 0; layer < this.n_layer; layer++) {
      const block = `blk.${layer}`;
      this.norm(`${block}.attn_norm`);
      this.multiply(`${block}.attn_qkv`, this.normed, this.qkv);
      this.attend(layer, position);
      this.multiply(`${block}.attn_output`, this.mixed, this.out);
      for (let n = 0; n < C; n++) numbers[x + n] += numbers[this.out + n];
      this.norm(`${block}.ffn_norm`);
      this.multiply(`${block}.ffn_up`, this.normed, this.wide);
      for (let n = this.wide; n < this.wide + 4 * C; n++) {
        const v = numbers[n];
        numbers[n] = 0.5 * v * (1 + Math.tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
      }
      this.multiply(`${block}.ffn_down`, this.wide, this.out);
      for (let n = 0; n < C; n++) numbers[x + n] += numbers[this.out + n];
    }
    this.held.push(id);
    if (!wanted) return null;
    this.norm("output_norm");
    this.multiply(this.tensors.has("output.weight") ? "output" : "token_embd", this.normed, this.logits);
    return numbers.subarray(this.logits, this.logits + this.tokens);
  }

  /** Keep of what is held the beginning that `ids` share, all but their last; returns how many need not be read. */
  keep(ids) {
    let same = 0;
    while (same < Math.min(this.held.length, ids.length - 1) && this.held[same] === ids[same]) same++;
    this.held.length = same;
    return same;
  }
}

// ---- The vocabulary ------------------------------------------------------------------------------------------------

const SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"; // Unicode White_Space
const WORDS = `'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+|[${SPACE}]+(?![^${SPACE}])|[${SPACE}]`;

class Tokenizer {
  /** facts: {kind, eot, start, styles: {name: id}, controls: [id]}. pieces: the bytes of each id, none for controls. */
  constructor(facts, pieces) {
    Object.assign(this, facts);
    this.pieces = pieces;
    this.ids = new Map();
    const text = new TextDecoder("utf-8", { ignoreBOM: true });
    pieces.forEach((piece, id) => {
      if (piece.length) this.ids.set(this.kind === "char" ? text.decode(piece) : String.fromCharCode(...piece), id);
    });
    this.known = new Map(); // words already merged
  }

  encode(text) {
    text = text.toWellFormed ? text.toWellFormed() : text.replace(/\p{Surrogate}/gu, "\ufffd");
    if (this.kind === "char") {
      const unknown = [...new Set(text)].filter((character) => !this.ids.has(character));
      if (unknown.length) throw new Error(`The model knows no ${unknown.slice(0, 8).map((c) => `“${c}”`).join(", ")}: take out what it cannot read.`);
      return Array.from(text, (character) => this.ids.get(character));
    }
    const encoder = new TextEncoder(), found = [];
    for (const [word] of text.matchAll(new RegExp(WORDS, "gu"))) {
      if (!this.known.has(word)) {
        const ids = this.merge(Array.from(encoder.encode(word), (byte) => String.fromCharCode(byte)));
        if (this.known.size < 50000 && word.length < 64) this.known.set(word, ids);
        else for (const id of ids) found.push(id);
      }
      for (const id of this.known.get(word) ?? []) found.push(id);
    }
    return found;
  }

  /** Byte pair encoding of one word: of all neighbours always the pair that makes the lowest id, leftmost first. */
  merge(parts) {
    const next = parts.map((_, at) => at + 1), before = parts.map((_, at) => at - 1), queue = [];
    const less = (a, b) => a.id - b.id || a.at - b.at;
    const push = (at) => {
      const id = next[at] < parts.length ? this.ids.get(parts[at] + parts[next[at]]) : undefined;
      if (id === undefined) return;
      let place = queue.push({ id, at, text: parts[at] + parts[next[at]] }) - 1;
      for (let up; place && less(queue[place], queue[(up = (place - 1) >> 1)]) < 0; place = up) {
        [queue[place], queue[up]] = [queue[up], queue[place]];
      }
    };
    const pop = () => {
      const first = queue[0], last = queue.pop();
      if (queue.length) queue[0] = last;
      for (let place = 0, child; (child = 2 * place + 1) < queue.length; place = child) {
        if (child + 1 < queue.length && less(queue[child + 1], queue[child]) < 0) child++;
        if (less(queue[place], queue[child]) <= 0) break;
        [queue[place], queue[child]] = [queue[child], queue[place]];
      }
      return first;
    };
    for (let at = 0; at + 1 < parts.length; at++) push(at);
    while (queue.length) {
      const { at, text } = pop(), right = next[at];
      if (parts[at] === null || right >= parts.length || parts[at] + parts[right] !== text) continue; // merged meanwhile
      parts[at] = text;
      parts[right] = null;
      next[at] = next[right];
      if (next[at] < parts.length) before[next[at]] = at;
      push(at);
      if (before[at] >= 0) push(before[at]);
    }
    return parts.filter((part) => part !== null).map((part) => this.ids.get(part));
  }

  /** A decoder for ids one at a time; characters that are not whole yet are held back. */
  stream() {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    return {
      feed: (id) => decoder.decode(this.pieces[id], { stream: true }),
      flush: () => decoder.decode(),
    };
  }

  text(id) {
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.pieces[id]);
  }
}

// ---- Chance --------------------------------------------------------------------------------------------------------

/** The generator's seed of one sample: the low 32 bits of SplitMix64 (Steele et al. 2014), as sampling.sample_seed. */
function seedOf(seed, index = 0) {
  const mask = (1n << 64n) - 1n;
  let z = (BigInt(seed) + BigInt(index + 1) * 0x9e3779b97f4a7c15n) & mask;
  z = ((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n) & mask;
  z = ((z ^ (z >> 27n)) * 0x94d049bb133111ebn) & mask;
  return Number((z ^ (z >> 31n)) & 0xffffffffn);
}

/** torch.rand in float64 on a CPU: MT19937 (Matsumoto & Nishimura 1998), 53 bits of two words, the high one first. */
class Generator {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed;
    for (let n = 1; n < 624; n++) {
      const last = this.state[n - 1] ^ (this.state[n - 1] >>> 30);
      this.state[n] = Math.imul(1812433253, last) + n;
    }
    this.at = 624;
  }

  word() {
    const { state } = this;
    if (this.at === 624) {
      for (let n = 0; n < 624; n++) {
        const bits = (state[n] & 0x80000000) | (state[(n + 1) % 624] & 0x7fffffff);
        state[n] = state[(n + 397) % 624] ^ (bits >>> 1) ^ (bits & 1 ? 0x9908b0df : 0);
      }
      this.at = 0;
    }
    let y = state[this.at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  random() {
    const high = this.word(), low = this.word();
    return ((high & 0x1fffff) * 4294967296 + low) / 9007199254740992;
  }
}

const f32 = Math.fround;

/** Sum in float32 in the order of numpy's pairwise summation. */
function pairwise(values, start = 0, count = values.length) {
  if (count < 8) {
    let sum = 0;
    for (let n = 0; n < count; n++) sum = f32(sum + values[start + n]);
    return sum;
  }
  if (count <= 128) {
    const sums = Array.from({ length: 8 }, (_, n) => values[start + n]);
    let at = 8;
    for (; at + 8 <= count; at += 8) for (let n = 0; n < 8; n++) sums[n] = f32(sums[n] + values[start + at + n]);
    const [a, b, c, d, e, f, g, h] = sums;
    let sum = f32(f32(f32(a + b) + f32(c + d)) + f32(f32(e + f) + f32(g + h)));
    for (; at < count; at++) sum = f32(sum + values[start + at]);
    return sum;
  }
  const half = (count >> 1) & ~7;
  return f32(pairwise(values, start, half) + pairwise(values, start + half, count - half));
}

/** softmax in float32 */
function softmax(values) {
  let most = -Infinity;
  for (const value of values) if (value > most) most = value;
  const powers = Float32Array.from(values, (value) => Math.exp(f32(value - most))), sum = pairwise(powers);
  return powers.map((power) => power / sum);
}

/** The ids of the `count` largest logits, falling; of equal ones the larger id first. */
function largest(logits, count) {
  const found = []; // falling; short, so that insertion is quick
  for (let id = 0; id < logits.length; id++) {
    const value = logits[id];
    if (found.length === count && !(value >= logits[found[count - 1]])) continue;
    let place = found.length;
    while (place && value >= logits[found[place - 1]]) place--;
    found.splice(place, 0, id);
    if (found.length > count) found.pop();
  }
  return found;
}

/** {values, ids} of the tokens that may be drawn: repetition penalty, temperature, top-k, top-p, min-p, in that order. */
function candidates(logits, settings, seen) {
  const penalty = f32(settings.repetition_penalty), temperature = f32(settings.temperature), N = logits.length;
  if (penalty !== 1) {
    logits = logits.slice();
    for (const id of seen) logits[id] = logits[id] < 0 ? logits[id] * penalty : logits[id] / penalty;
  }
  if (settings.temperature < 1e-6) {
    let best = 0;
    for (let id = 1; id < N; id++) if (logits[id] > logits[best]) best = id;
    return { values: [logits[best]], ids: [best] };
  }
  let ids, values;
  if (settings.top_k > 0 && settings.top_k < N) {
    ids = largest(logits, settings.top_k + 1); // one more, to see whether the last place is shared
    values = ids.map((id) => f32(logits[id] / temperature));
    const least = values.at(-2);
    if (values.at(-1) === least) {
      ids = [...logits.keys()].filter((id) => f32(logits[id] / temperature) >= least);
      values = ids.map((id) => f32(logits[id] / temperature));
    } else {
      ids.pop();
      values.pop();
    }
  } else {
    ids = [...logits.keys()];
    values = Array.from(logits, (value) => f32(value / temperature));
  }
  const only = (kept) => {
    ids = ids.filter((_, n) => kept[n]);
    values = values.filter((_, n) => kept[n]);
  };
  if (settings.top_p < 1) {
    const order = [...ids.keys()].sort((a, b) => values[a] - values[b] || ids[a] - ids[b]);
    [ids, values] = [order.map((n) => ids[n]), order.map((n) => values[n])];
    let sum = 0;
    const floor = f32(1 - settings.top_p), kept = Array.from(softmax(values), (share) => (sum = f32(sum + share)) > floor);
    kept[kept.length - 1] = true;
    only(kept);
  }
  if (settings.min_p > 0) {
    const shares = softmax(values), floor = f32(f32(settings.min_p) * shares.reduce((a, b) => Math.max(a, b)));
    only(Array.from(shares, (share) => share >= floor));
  }
  return { values, ids };
}

/** Draw an id, taking one number from `generator` unless the temperature is 0. */
function sample(logits, settings, generator, seen) {
  const { values, ids } = candidates(logits, settings, seen);
  if (!Number.isFinite(values.reduce((a, b) => (a > b ? a : b)))) throw new Error("The model's numbers are damaged: export it again.");
  if (ids.length === 1 && settings.temperature < 1e-6) return ids[0];
  let sum = 0;
  const summed = Array.from(softmax(values), (share) => (sum += share)), drawn = generator.random() * sum;
  const place = summed.findIndex((below) => below > drawn);
  return ids[place < 0 ? ids.length - 1 : place];
}

/** {probability of `token`, likeliest: [{text, probability}]} under unfiltered logits. */
function likelihoods(logits, token, count, tokenizer) {
  let most = -Infinity, sum = 0;
  for (const value of logits) if (value > most) most = value;
  for (const value of logits) sum += Math.exp(value - most);
  const share = (id) => Math.exp(logits[id] - most) / sum;
  const name = (id) => (id === tokenizer.eot ? null : tokenizer.text(id)); // null: the end of the text
  return { probability: share(token), likeliest: largest(logits, count).map((id) => ({ text: name(id), probability: share(id) })) };
}

// ---- Writing -------------------------------------------------------------------------------------------------------

/** What is read of a prompt: its end; a quarter of the context, or max_tokens if less, stays free for writing. */
function promptWindow(ids, context, settings) {
  const room = context - Math.min(settings.max_tokens, context >> 2) - (settings.style ? 1 : 0);
  return ids.length <= room ? ids : ids.slice(ids.length - room);
}

/**
 * Continue `prompt`: yields {id, text, probability, likeliest} a token, then {text, reason} at the end.
 * pause(): awaited after each token read or written, so that the page stays alive. stopped(): whether to end.
 */
async function* write(model, tokenizer, prompt, settings, pause = async () => {}, stopped = () => false) {
  const context = model.block_size, front = settings.style ? [tokenizer.styles[settings.style]] : [];
  let ids = tokenizer.encode(prompt);
  if (!ids.length && !front.length) ids = [tokenizer.start];
  ids = promptWindow(ids, context, settings).slice();
  const generator = new Generator(seedOf(settings.seed)), seen = new Set(ids), stream = tokenizer.stream();
  let reason = "length", unread = front.concat(ids);
  unread = unread.slice(model.keep(unread));
  for (let written = 0; written < settings.max_tokens; written++) {
    let logits = null;
    for (let n = 0; n < unread.length; n++) {
      logits = model.forward(unread[n], n === unread.length - 1);
      await pause();
      if (stopped()) break;
    }
    if (stopped()) {
      reason = "stopped";
      break;
    }
    for (const id of tokenizer.controls) logits[id] = -Infinity;
    const id = sample(logits, settings, generator, seen);
    if (id === tokenizer.eot) {
      reason = "stop";
      break;
    }
    ids.push(id);
    seen.add(id);
    yield { id, text: stream.feed(id), ...likelihoods(logits, id, 5, tokenizer) };
    unread = [id];
    if (model.held.length >= context) {
      unread = front.concat(ids.slice(-(((context * 3) >> 2) - front.length))); // the context is full: read the newest part again
      model.held.length = 0;
    }
  }
  yield { text: stream.flush(), reason };
}
