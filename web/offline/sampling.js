"use strict";
// From logits to the next token, as sampling.py has it: seeds, filters in its order, stop strings. Nothing here touches
// the page or the network; Node runs it as it is.

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

/** Places of the `count` largest values, falling; of equal ones the later first. */
function largest(values, count) {
  const found = []; // falling; short, so that insertion is quick
  for (let at = 0; at < values.length; at++) {
    const value = values[at];
    if (found.length === count && !(value >= values[found[count - 1]])) continue;
    let place = found.length;
    while (place && value >= values[found[place - 1]]) place--;
    found.splice(place, 0, at);
    if (found.length > count) found.pop();
  }
  return found;
}

// ---- Filters -------------------------------------------------------------------------------------------------------

/** The ids of one text as the filters need them; `ids` is the writer's array, which grows at its end. */
class TokenHistory {
  constructor(ids, promptTokens, tokenizer) {
    Object.assign(this, { ids, promptTokens, tokenizer });
    this.known = new Set();
    this.counted = 0;
  }

  /** The last ids in order; 0: all. */
  array(last) {
    return last ? this.ids.slice(-last) : this.ids;
  }

  /** Those of the `last` ids (0: of all) that come after the prompt. */
  written(last) {
    return this.ids.slice(Math.max(this.promptTokens, last ? this.ids.length - last : 0));
  }

  /** Each of the `last` ids (0: of all) once. */
  distinct(last) {
    if (last) return new Set(this.array(last));
    for (; this.counted < this.ids.length; this.counted++) this.known.add(this.ids[this.counted]);
    return this.known;
  }
}

// A filter takes the candidates, logits `values` with their `ids`, and returns [values, ids] of those that are left. It
// changes neither in place. Penalties come first and get all ids: to them the logit of id i is values[i].

function addBias(values, ids, { logit_bias: bias }) {
  values = values.slice();
  for (const [id, value] of Object.entries(bias)) if (id < values.length) values[id] += f32(value);
  return [values, ids];
}

function penaliseRepetition(values, ids, settings, history) {
  const penalty = f32(settings.repetition_penalty);
  values = values.slice();
  for (const id of history.distinct(settings.penalty_last_n)) values[id] = values[id] < 0 ? values[id] * penalty : values[id] / penalty;
  return [values, ids];
}

function penaliseFrequency(values, ids, settings, history) {
  const counts = new Map(), penalty = f32(settings.frequency_penalty);
  for (const id of history.written(settings.penalty_last_n)) counts.set(id, (counts.get(id) ?? 0) + 1);
  values = values.slice();
  for (const [id, count] of counts) values[id] -= f32(penalty * count);
  return [values, ids];
}

function penalisePresence(values, ids, settings, history) {
  values = values.slice();
  for (const id of new Set(history.written(settings.penalty_last_n))) values[id] -= f32(settings.presence_penalty);
  return [values, ids];
}

const DRY_MOST = 1e6, DRY_LONGEST = 200; // its largest penalty, and the ids beyond the allowed length that it compares

/** DRY (P. E. Weidmann 2024): what continues a repetition of an earlier passage is less likely, the longer the more. */
function penaliseDry(values, ids, settings, history) {
  const whole = history.array(settings.penalty_last_n), end = whole.length - 1;
  const breakers = history.tokenizer.breakers(settings.dry_sequence_breakers);
  if (end < 1 || breakers.has(whole[end])) return [values, ids];
  let ends = []; // where an earlier occurrence ends
  for (let at = 0; at < end; at++) if (whole[at] === whole[end] && !breakers.has(whole[at + 1])) ends.push(at);
  const allowed = settings.dry_allowed_length, penalties = new Map();
  for (let length = 1; ends.length; length++) {
    if (length >= allowed) { // longer passages come later and overwrite the penalty
      const penalty = Math.min(settings.dry_multiplier * settings.dry_base ** (length - allowed), DRY_MOST);
      for (const at of ends) penalties.set(whole[at + 1], penalty);
    }
    if (length >= Math.min(allowed + DRY_LONGEST, end) || breakers.has(whole[end - length])) break;
    ends = ends.filter((at) => at >= length && whole[at - length] === whole[end - length]);
  }
  if (!penalties.size) return [values, ids];
  values = values.slice();
  for (const [id, penalty] of penalties) values[id] -= f32(penalty);
  return [values, ids];
}

/** The candidates at the places where `keeps` is true. */
function only(values, ids, keeps) {
  const places = [];
  for (let at = 0; at < ids.length; at++) if (keeps(at)) places.push(at);
  return [Float32Array.from(places, (at) => values[at]), places.map((at) => ids[at])];
}

const most = (values) => values.reduce((a, b) => Math.max(a, b)); // NaN if one is

/** Top-n-sigma (Tang et al. 2024): within so many standard deviations of all finite logits below the largest. */
function keepTopNSigma(values, ids, settings) {
  const finite = values.filter(Number.isFinite), count = finite.length, mean = f32(pairwise(finite) / count);
  const squares = finite.map((value) => f32(f32(value - mean) ** 2));
  const deviation = f32(Math.sqrt(f32(pairwise(squares) / count)));
  const least = f32(most(values) - f32(f32(settings.top_n_sigma) * deviation));
  return only(values, ids, (at) => values[at] >= least);
}

/** Divide by the temperature and keep the `top_k` largest, with all that equal the last; temperature 0 keeps one. */
function applyTemperature(values, ids, settings) {
  if (settings.temperature < 1e-6) {
    let best = 0;
    for (let at = 1; at < values.length; at++) if (values[at] > values[best]) best = at;
    return [values.slice(best, best + 1), [ids[best]]];
  }
  const temperature = f32(settings.temperature), scaled = () => values.map((value) => value / temperature);
  if (!(settings.top_k > 0 && settings.top_k < values.length)) return [scaled(), ids];
  const places = largest(values, settings.top_k + 1); // one more, to see whether the last place is shared
  const found = Float32Array.from(places, (at) => values[at] / temperature), least = found.at(-2);
  if (found.at(-1) === least) {
    const all = scaled();
    return only(all, ids, (at) => all[at] >= least);
  }
  return [found.slice(0, -1), places.slice(0, -1).map((at) => ids[at])];
}

/** The smallest set of most likely ids whose probabilities sum to `top_p`; of equal logits the larger ids stay. */
function keepTopP(values, ids, settings) {
  const order = [...ids.keys()].sort((a, b) => values[a] - values[b] || ids[a] - ids[b]);
  const sorted = Float32Array.from(order, (at) => values[at]), named = order.map((at) => ids[at]), last = order.length - 1;
  const shares = softmax(sorted), floor = f32(1 - settings.top_p);
  let sum = 0;
  return only(sorted, named, (at) => (sum = f32(sum + shares[at])) > floor || at === last);
}

function keepMinP(values, ids, settings) {
  const shares = softmax(values), floor = f32(f32(settings.min_p) * most(shares));
  return only(values, ids, (at) => shares[at] >= floor);
}

/** Locally typical sampling (Meister et al. 2023): the ids whose surprise is nearest to the entropy, up to `typical_p`. */
function keepTypical(values, ids, settings) {
  const shares = softmax(values), surprise = shares.map((share) => -Math.log(share));
  const entropy = pairwise(shares.map((share, at) => (share > 0 ? share * surprise[at] : 0)));
  const distance = surprise.map((value) => Math.abs(value - entropy));
  const order = [...ids.keys()].sort((a, b) => distance[a] - distance[b] || ids[a] - ids[b]);
  const wanted = f32(settings.typical_p);
  let sum = 0, short = 0;
  for (const at of order) if ((sum = f32(sum + shares[at])) < wanted) short++;
  const widest = distance[order[Math.min(short, order.length - 1)]];
  return only(values, ids, (at) => distance[at] <= widest);
}

/** XTC (P. E. Weidmann 2024): now and then, all top choices but the least likely of them are left out. */
function applyXtc(values, ids, settings, history, generator) {
  if (ids.length === 1 || generator.random() >= settings.xtc_probability) return [values, ids];
  const shares = softmax(values), threshold = f32(settings.xtc_threshold);
  const least = shares.reduce((a, b) => (b >= threshold && b < a ? b : a), Infinity);
  return only(values, ids, (at) => shares[at] < threshold || shares[at] === least);
}

// As sampling.FILTERS, in its order: the setting that switches a filter on, the value with which it is off, the filter.
const FILTERS = [
  ["logit_bias", null, addBias],
  ["repetition_penalty", 1, penaliseRepetition],
  ["frequency_penalty", 0, penaliseFrequency],
  ["presence_penalty", 0, penalisePresence],
  ["dry_multiplier", 0, penaliseDry],
  ["top_n_sigma", 0, keepTopNSigma],
  ["temperature", undefined, applyTemperature], // always runs
  ["top_p", 1, keepTopP],
  ["min_p", 0, keepMinP],
  ["typical_p", 1, keepTypical],
  ["xtc_probability", 0, applyXtc],
];

/** The filters that `settings` switch on, in order. */
function activeFilters(settings) {
  const bias = Object.keys(settings.logit_bias).length > 0;
  return FILTERS.filter(([name, off]) => (name === "logit_bias" ? bias : settings[name] !== off)).map(([, , filter]) => filter);
}

let everyId = [];

/** [values, ids] of the tokens that may be drawn from logits [N], after all filters. */
function candidates(logits, settings, history, generator) {
  if (everyId.length !== logits.length) everyId = Array.from(logits.keys());
  let found = [logits, everyId];
  for (const filter of activeFilters(settings)) found = filter(...found, settings, history, generator);
  return found;
}

/** Draw an id, taking one number from `generator` (with XTC two) unless the temperature is 0. */
function sample(logits, settings, generator, history) {
  const [values, ids] = candidates(logits, settings, history, generator);
  if (!Number.isFinite(most(values))) throw new Error("The model's numbers are damaged: export it again.");
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

// ---- Stop strings ---------------------------------------------------------------------------------------------------

/** Cuts a growing text before the first stop string that it completes, and holds back what may begin one. */
class StopStringMatcher {
  constructor(stops) {
    this.stops = stops.map((stop) => [stop, StopStringMatcher.table(stop)]);
    this.matched = stops.map(() => 0); // code units of each stop string that the text ends with
    this.held = "";
  }

  /** For each prefix the length of its longest proper prefix that is also a suffix (Knuth, Morris & Pratt 1977). */
  static table(stop) {
    const table = [0];
    for (let at = 1; at < stop.length; at++) {
      let length = table[at - 1];
      while (length && stop[at] !== stop[length]) length = table[length - 1];
      table.push(length + (stop[at] === stop[length] ? 1 : 0));
    }
    return table;
  }

  /** [text that is safe to show, whether a stop string has ended it] */
  feed(piece) {
    if (!this.stops.length) return [piece, false];
    const text = this.held + piece;
    for (let at = this.held.length; at < text.length; at++) {
      let longest = 0;
      this.stops.forEach(([stop, table], which) => {
        let length = this.matched[which];
        while (length && text[at] !== stop[length]) length = table[length - 1];
        if (text[at] === stop[length]) length++;
        if (length === stop.length) longest = Math.max(longest, length);
        this.matched[which] = length;
      });
      if (longest) {
        this.held = "";
        return [text.slice(0, at + 1 - longest), true];
      }
    }
    const safe = text.length - Math.max(...this.matched);
    this.held = text.slice(safe);
    return [text.slice(0, safe), false];
  }

  /** What was held back, when no more text will come. */
  rest() {
    const { held } = this;
    this.held = "";
    return held;
  }
}
