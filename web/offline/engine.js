"use strict";
// A GPT-2: its vocabulary, its forward pass and its writing, as tokenizer.py, model.py and inference/decoder.py have them.
// Nothing here touches the page or the network; with sampling.js before it, Node runs it as it is.

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

/** The numbers in little-endian bytes of type "f16", "bf16" or "f32". */
function decodeNumbers(bytes, type) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const found = new Float32Array(bytes.byteLength / (type === "f32" ? 4 : 2)), bits = new Uint32Array(found.buffer);
  for (let at = 0; at < found.length; at++) {
    if (type === "f32") found[at] = view.getFloat32(4 * at, true);
    else if (type === "f16") found[at] = float16(view.getUint16(2 * at, true));
    else bits[at] = view.getUint16(2 * at, true) << 16; // the upper half of a float32
  }
  return found;
}

/** A matrix [columns, rows] as [rows, columns]: GPT-2's files hold some of them turned. */
function turned(numbers, [rows, columns]) {
  const found = new Float32Array(numbers.length);
  for (let row = 0; row < rows; row++) for (let n = 0; n < columns; n++) found[row * columns + n] = numbers[n * rows + row];
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
    let total = wide;
    for (const tensor of tensors) total += (tensor.shape[1] ? tensor.shape[0] : 1) * padded(tensor.shape.at(-1));
    this.memory = new WebAssembly.Memory({ initial: Math.ceil((4 * total) / 65536) + 1 });
    this.numbers = new Float32Array(this.memory.buffer);
    this.plain = plain;
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
    this.slots = []; // key-value caches, one for each style of a blend: {keys, values, held}
    this.slot(0);
  }

  /** The cache of that number, made on first use. held: the ids whose keys and values are there. */
  slot(number) {
    while (this.slots.length <= number) {
      const { n_layer: L, n_head: H, block_size: T, headSize: D } = this, keys = this.used, values = keys + L * H * T * padded(D);
      this.used = values + L * H * D * padded(T); // keys [layer, head, position, channel], values [layer, head, channel, position]
      const short = 4 * (this.used + 16) - this.memory.buffer.byteLength;
      if (short > 0) {
        this.memory.grow(Math.ceil(short / 65536));
        this.numbers = new Float32Array(this.memory.buffer);
        this.kernel = matrixVector(this.memory, this.plain);
      }
      this.slots.push({ keys, values, held: [] });
    }
    return this.slots[number];
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

  attend(layer, position, slot) {
    const { numbers, kernel, n_head: H, n_embd: C, headSize: D, block_size: T, qkv, query, scores } = this;
    const Dp = padded(D), Tp = padded(T), seen = position + 1, used = padded(seen), scale = 1 / Math.sqrt(D);
    for (let head = 0; head < H; head++) {
      const keys = slot.keys + (layer * H + head) * T * Dp, values = slot.values + (layer * H + head) * D * Tp;
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

  /** Read one more token into a cache; its logits [tokens] (a view, until the next call) if `wanted`. */
  forward(id, wanted, number = 0) {
    const slot = this.slot(number), { numbers, x, n_embd: C } = this, position = slot.held.length;
    const words = this.tensors.get("token_embd.weight"), places = this.tensors.get("position_embd.weight");
    for (let n = 0; n < C; n++) {
      numbers[x + n] = numbers[words.start + id * words.stride + n] + numbers[places.start + position * places.stride + n];
    }
    for (let layer = 0; layer < this.n_layer; layer++) {
      const block = `blk.${layer}`;
      this.norm(`${block}.attn_norm`);
      this.multiply(`${block}.attn_qkv`, this.normed, this.qkv);
      this.attend(layer, position, slot);
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
    slot.held.push(id);
    if (!wanted) return null;
    this.norm("output_norm");
    this.multiply(this.tensors.has("output.weight") ? "output" : "token_embd", this.normed, this.logits);
    return numbers.subarray(this.logits, this.logits + this.tokens);
  }

  /** Keep of what a cache holds the beginning that `ids` share, all but their last; returns how many need not be read. */
  keep(ids, number = 0) {
    const { held } = this.slot(number);
    let same = 0;
    while (same < Math.min(held.length, ids.length - 1) && held[same] === ids[same]) same++;
    held.length = same;
    return same;
  }
}

// ---- The vocabulary ------------------------------------------------------------------------------------------------

const SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"; // Unicode White_Space
const WORDS = `'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+|[${SPACE}]+(?![^${SPACE}])|[${SPACE}]`;

/** A style's name: lower-case letters and digits without accents, joined by hyphens, as config.style_name. */
function slug(text) {
  const plain = text.toLowerCase().normalize("NFKD").replace(/\p{Mn}/gu, "");
  return plain.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
}

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
    this.found = new Map(); // ids of strings at which DRY's passages end
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

  /** [control id, share] of each style that `dickens:0.7,austen:0.3` names, as tokenizer.blend; the shares sum to 1. */
  blend(style) {
    const shares = new Map();
    for (const part of style.split(",").filter((part) => part.trim())) {
      const [, own, colon, weight] = /^([^:]*)(:?)(.*)$/s.exec(part), name = slug(own), share = colon ? Number(weight.trim() || NaN) : 1;
      if (!name || !(share > 0 && share < Infinity)) {
        throw new Error(`Style “${part.trim()}”: write NAME or NAME:WEIGHT with a weight above 0, like dickens:0.7.`);
      }
      shares.set(name, (shares.get(name) ?? 0) + share);
    }
    if (shares.size > 4) throw new Error(`${shares.size} styles are too many: at most 4 can be blended.`);
    const total = [...shares.values()].reduce((a, b) => a + b, 0), found = new Map(), known = Object.keys(this.styles);
    for (const [name, share] of shares) {
      const words = name.split("-");
      const fit = known.includes(name) ? [name] : known.filter((own) => words.every((word) => own.split("-").includes(word)));
      if (fit.length !== 1) throw new Error(fit.length ? `Style “${name}” fits several of this model's: ${fit.join(", ")}. Give more of the name.` : `This model has no style “${name}”. It has: ${known.join(", ") || "none"}.`);
      found.set(this.styles[fit[0]], (found.get(this.styles[fit[0]]) ?? 0) + share / total);
    }
    return [...found];
  }

  /** Ids whose bytes hold one of `strings`; of a string that no single id holds, the last id it encodes to. */
  breakers(strings) {
    const key = JSON.stringify(strings);
    if (!this.found.has(key)) this.found.set(key, new Set(strings.flatMap((text) => this.holding(text))));
    return this.found.get(key);
  }

  holding(text) {
    const latin1 = (bytes) => bytes.reduce((made, byte) => made + String.fromCharCode(byte), ""); // a letter a byte
    const wanted = latin1(new TextEncoder().encode(text));
    const ids = [...this.pieces.keys()].filter((id) => latin1(this.pieces[id]).includes(wanted));
    try {
      return ids.length ? ids : this.encode(text).slice(-1);
    } catch {
      return []; // a small alphabet may lack its characters: it never occurs then
    }
  }

  text(id) {
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.pieces[id]);
  }
}

// ---- Writing -------------------------------------------------------------------------------------------------------

const blended = (settings) => settings.style.replace(/^[ ,]+|[ ,]+$/g, "") !== "";

/** What is read of a prompt: its first `keep` ids and its end; a quarter of the context, or max_tokens if less, stays free. */
function promptWindow(ids, context, settings) {
  const room = context - Math.min(settings.max_tokens, context >> 2) - (blended(settings) ? 1 : 0);
  if (ids.length <= room) return ids.slice();
  const keep = Math.min(settings.keep, room >> 1);
  return [...ids.slice(0, keep), ...ids.slice(ids.length - room + keep)];
}

/** Read what is unread of each style's window; the next token's logits, of a blend the weighted sum. Null if stopped. */
async function read(model, states, pause, stopped) {
  let sum = null;
  for (const [slot, state] of states.entries()) {
    let logits = null;
    for (let n = 0; n < state.unread.length; n++) {
      logits = model.forward(state.unread[n], n === state.unread.length - 1, slot);
      await pause();
      if (stopped()) return null;
    }
    if (states.length === 1) return logits;
    const weight = f32(state.weight), part = logits.map((value) => weight * value);
    sum = sum ? sum.map((value, id) => value + part[id]) : part;
  }
  return sum;
}

/**
 * Continue `prompt`: yields {id, piece, text, probability, likeliest} a token, then {text, reason} at the end. piece: what
 * the token spells; text: what may be shown now, later where a stop string might begin.
 * pause(): awaited after each token read or written, so that the page stays alive. stopped(): whether to end.
 */
async function* write(model, tokenizer, prompt, settings, pause = async () => {}, stopped = () => false) {
  const context = model.block_size, styles = tokenizer.blend(settings.style);
  let ids = tokenizer.encode(prompt.replace(/^\ufeff/, "").replace(/\r\n?/g, "\n"));
  if (!ids.length && !styles.length) ids = [tokenizer.start];
  ids = promptWindow(ids, context, settings);
  const states = (styles.length ? styles : [[null, 1]]).map(([control, weight]) => ({ front: control === null ? [] : [control], weight }));
  states.forEach((state, slot) => {
    const window = state.front.concat(ids);
    state.unread = window.slice(model.keep(window, slot));
  });
  const history = new TokenHistory(ids, ids.length, tokenizer), generator = new Generator(seedOf(settings.seed));
  const stream = tokenizer.stream(), stopper = new StopStringMatcher(settings.stop);
  let reason = "length";
  for (let written = 0; written < settings.max_tokens; written++) {
    const logits = await read(model, states, pause, stopped);
    if (!logits) {
      reason = "stopped";
      break;
    }
    for (const id of tokenizer.controls) logits[id] = -Infinity;
    const id = sample(logits, settings, generator, history);
    if (id === tokenizer.eot) {
      reason = "stop";
      break;
    }
    ids.push(id);
    const piece = stream.feed(id), [text, ended] = stopper.feed(piece);
    yield { id, piece, text, ...likelihoods(logits, id, 5, tokenizer) };
    if (ended) return yield { text: "", reason: "phrase" };
    for (const [slot, state] of states.entries()) {
      state.unread = [id];
      if (model.slots[slot].held.length < context) continue;
      const window = ((context * 3) >> 2) - state.front.length; // the context is full: read the newest part again
      const keep = Math.min(settings.keep, window >> 1);
      state.unread = [...state.front, ...ids.slice(0, keep), ...ids.slice(keep - window)];
      model.slots[slot].held.length = 0;
    }
  }
  const [text, ended] = stopper.feed(stream.flush());
  yield { text: ended ? text : text + stopper.rest(), reason };
}
