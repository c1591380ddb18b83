"use strict";
// The writing desk around engine.js. All that comes from the model, the writer or a link is set as text, never as markup.

const at = (id) => document.getElementById(id);
const MODEL = JSON.parse(at("model").textContent);
const PLAIN = ["max_tokens", "temperature"];
const CONTROLS = new Map(MODEL.controls.map((control) => [control.name, control])); // the settings behind "More"
const FIELDS = [...PLAIN, ...CONTROLS.keys(), "style", "seed"];
const BLEND = "\n"; // the choice of a style that asks for a blend; no style is called so
const OPENINGS = ["The old house stood", "It was a dark night, and", "“My dear,” said the old lady,", "There was once, in the county of", "I was born in the year"];
const PLACE = `victorian-gpt ${MODEL.name} ${MODEL.parameters}`; // in the browser's own storage
const sheet = at("text"), mirror = at("mirror"), card = at("card");

let model, tokenizer;
let written = []; // {start, end, probability, likeliest, last}: the tokens of the sheet that the model wrote, in order
let past = []; // [{text, written}] before each change, for Undo
let latest = null; // {text, written} before the last Continue: what Retry starts from, and the link carries
let writing = false, halted = false;

// ---- The model out of the page -------------------------------------------------------------------------------------

async function unpack() {
  const read = MODEL.file ? await besides(MODEL.file) : (n) => decodeNumbers(fromBase64(take(`tensor-${n}`)), MODEL.tensors[n].type);
  const bytes = fromBase64(take("vocabulary")), count = MODEL.shape.tokens, lengths = new DataView(bytes.buffer);
  const pieces = [];
  for (let id = 0, start = 2 * count; id < count; id++) {
    const end = start + lengths.getUint16(2 * id, true);
    pieces.push(bytes.subarray(start, end));
    start = end;
  }
  tokenizer = new Tokenizer(MODEL.vocabulary, pieces);
  model = new GPT(MODEL.shape, MODEL.tensors, read);
}

/** What reads a tensor of the file beside this page, once it is here and is the one of the export. */
async function besides({ name, bytes, integrity }) {
  if (location.protocol === "file:") {
    throw new Error(
      `a browser does not let a page that was opened from a file read ${name} beside it. Put both on a web host, ` +
        "or have the one-file page made: python export.py --to html",
    );
  }
  say(`Loading the model, ${(bytes / 1e6).toFixed(1)} MB …`);
  let buffer;
  try {
    const answer = await fetch(name, { integrity });
    if (!answer.ok) throw new Error(answer.status);
    buffer = await answer.arrayBuffer();
  } catch {
    throw new Error(`${name} beside this page is missing, or is not the one that was exported with it. Put both files of the export there`);
  }
  return (n) => {
    const { at, shape, type, turn } = MODEL.tensors[n], count = shape.reduce((a, b) => a * b);
    const numbers = decodeNumbers(new Uint8Array(buffer, at, count * (type === "f32" ? 4 : 2)), type);
    return turn ? turned(numbers, shape) : numbers;
  };
}

/** The text of a data block, which is then removed. */
function take(id) {
  const block = at(id), text = block.textContent;
  block.remove();
  return text;
}

// ---- What is shown -------------------------------------------------------------------------------------------------

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

function make(name, text = "", kind = "") {
  const element = document.createElement(name);
  element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

/** The mirror under the sheet holds the same text, in pieces that can be marked and pointed at. */
function reflect() {
  const text = sheet.value, parts = [];
  let done = 0;
  written.forEach((token, index) => {
    if (token.start > done) parts.push(text.slice(done, token.start));
    const span = make("span", text.slice(token.start, token.end), token.last ? "last" : "");
    span.dataset.token = index;
    if (at("tint").checked) {
      const strength = Math.min(1, -Math.log(token.probability) / 9);
      span.style.background = `color-mix(in srgb, var(--accent) ${Math.round(45 * strength)}%, transparent)`;
    }
    parts.push(span);
    done = token.end;
  });
  mirror.replaceChildren(...parts, text.slice(done) + "\n");
  sheet.style.height = "auto";
  sheet.style.height = `${Math.max(sheet.scrollHeight, mirror.scrollHeight)}px`;
  const words = text.match(/\S+/g)?.length ?? 0;
  at("words").textContent = words === 1 ? "1 word" : `${words.toLocaleString("en")} words`;
}

function buttons() {
  at("continue").hidden = writing;
  at("halt").hidden = !writing;
  at("continue").disabled = !model;
  at("retry").disabled = writing || !latest;
  at("undo").disabled = writing || !past.length;
  sheet.readOnly = writing;
  for (const button of document.querySelectorAll("#openings button, #clear")) button.disabled = writing;
}

const percent = (share) => (share >= 0.1 ? `${Math.round(100 * share)}%` : share >= 0.001 ? `${(100 * share).toFixed(1)}%` : "<0.1%");
const visible = (text) => (text === null ? "the end" : text.replace(/\n/g, "⏎").replace(/^ /, "␣") || "part of a letter");

/** Show what else might have stood where token `index` stands. */
function showCard(index) {
  const token = written[index], span = mirror.querySelector(`[data-token="${index}"]`);
  hideCard();
  if (!token || !span) return;
  span.classList.add("shown");
  const rows = make("dl");
  const chosen = sheet.value.slice(token.start, token.end);
  for (const { text, probability } of token.likeliest) {
    const share = make("dd", "", "share"), bar = make("i");
    bar.style.width = `${100 * probability}%`;
    share.append(bar);
    rows.append(make("dt", visible(text), text === chosen ? "chosen" : ""), share, make("dd", percent(probability)));
  }
  card.replaceChildren(make("p", `chosen with ${percent(token.probability)}; most likely:`), rows);
  card.hidden = false;
  const place = span.getBoundingClientRect(), width = document.documentElement.clientWidth;
  card.style.left = `${Math.max(8, Math.min(place.left, width - card.offsetWidth - 8)) + scrollX}px`;
  const below = place.bottom + 8 + card.offsetHeight < innerHeight;
  card.style.top = `${(below ? place.bottom + 8 : place.top - card.offsetHeight - 8) + scrollY}px`;
}

function hideCard() {
  card.hidden = true;
  mirror.querySelector(".shown")?.classList.remove("shown");
}

// ---- Settings, saved in the browser and carried by links -----------------------------------------------------------

const ESCAPES = { "\n": "\\n", "\t": "\\t", "\\": "\\\\", "|": "\\|" };

/** Texts as one line, parted by |, in which \n stands for the end of a line; and back. */
const asLine = (phrases) => phrases.map((phrase) => phrase.replace(/[\n\t\\|]/g, (letter) => ESCAPES[letter])).join("|");
function asPhrases(line) {
  const plain = (part) => part.replace(/\\(.)/g, (_, letter) => ({ n: "\n", t: "\t" })[letter] ?? letter);
  return (line.match(/(?:\\.|[^|])+/g) ?? []).map(plain);
}

/** What a field behind "More" holds; throws a sentence. */
function valueOf({ name, label, kind, whole, minimum, maximum, above, below }) {
  const text = at(name).value.trim(), wrong = (why) => new Error(`${label} ${text || "(empty)"} ${why}.`);
  if (kind === "phrases") {
    const phrases = asPhrases(at(name).value);
    if (phrases.length > maximum || phrases.some((phrase) => phrase.length > 1000)) throw wrong(`is more than ${maximum} phrases, or a very long one`);
    return phrases;
  }
  if (kind === "bias") {
    const pairs = text.split(/[,\s]+/).filter(Boolean).map((pair) => pair.split(":"));
    const right = ([id, value, more]) => /^\d{1,9}$/.test(id) && value && Math.abs(Number(value)) <= 100 && more === undefined;
    if (!pairs.every(right) || pairs.length > maximum) throw wrong("is not like 262:-5, 11:2, with numbers of tokens and values of at most 100");
    return Object.fromEntries(pairs.map(([id, value]) => [Number(id), Number(value)]));
  }
  const value = text === "" ? NaN : Number(text);
  if (whole && !Number.isInteger(value)) throw wrong("is no whole number");
  if (!(value >= minimum && value <= maximum && (above === undefined || value > above) && (below === undefined || value < below))) {
    throw wrong(`is outside ${minimum} to ${maximum}`);
  }
  return value;
}

/** The fields behind "More": label and description of each are the setting's own. */
function build() {
  for (const control of CONTROLS.values()) {
    const label = make("label", `${control.label} `), field = make("input");
    const extra = { phrases: " Several are parted by |; \\n is a line's end.", bias: " Like 262:-5, 11:2." }[control.kind] ?? "";
    label.htmlFor = field.id = control.name;
    label.append(make("small", control.help + extra));
    field.autocomplete = "off";
    field.spellcheck = false;
    if (control.kind === "number") {
      field.type = "number";
      Object.assign(field, { min: control.minimum, max: control.maximum, step: control.whole ? 1 : "any" });
    }
    field.onchange = () => {
      try {
        valueOf(control);
        field.setCustomValidity("");
      } catch (error) {
        field.setCustomValidity(error.message);
        say(error.message, true);
      }
    };
    at(control.rare ? "seldom" : "common").append(label, field);
  }
}

function styleOf() {
  return !at("style") ? "" : at("style").value === BLEND ? at("blend").value.trim() : at("style").value;
}

/** Choose a style or a blend; one that the model does not have is none. */
function setStyle(text) {
  const select = at("style");
  if (!select) return;
  const known = (style) => {
    try {
      return Tokenizer.prototype.blend.call(MODEL.vocabulary, style).length > 0;
    } catch {
      return false;
    }
  };
  if (Object.hasOwn(MODEL.vocabulary.styles, text)) select.value = text;
  else if (known(text)) [select.value, at("blend").value] = [BLEND, text];
  else select.value = "";
  showBlend();
}

function showBlend() {
  for (const part of [at("blend"), document.querySelector('label[for="blend"]')]) part.hidden = at("style").value !== BLEND;
}

function settings() {
  const found = { style: styleOf() }, open = (field, error) => {
    at("settings").open = true;
    for (let fold = field.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    field.focus();
    return error;
  };
  for (const name of PLAIN) {
    const field = at(name);
    if (!field.checkValidity() || field.value === "") {
      const label = document.querySelector(`label[for="${name}"]`).firstChild.textContent.trim();
      throw open(field, new Error(`${label} ${field.value || "(empty)"} is outside ${field.min} to ${field.max}.`));
    }
    found[name] = Number(field.value);
  }
  for (const [name, control] of CONTROLS) {
    try {
      found[name] = valueOf(control);
    } catch (error) {
      throw open(at(name), error);
    }
  }
  tokenizer.blend(found.style);
  if (at("fresh").checked) at("seed").value = freshSeed();
  const seed = at("seed").value.trim();
  if (!/^\d{1,19}$/.test(seed) || BigInt(seed) >= 2n ** 63n) throw new Error(`Seed ${seed || "(empty)"} is no whole number below 2⁶³.`);
  return { ...found, seed };
}

/** A seed of 53 bits, which every program reads exactly. */
function freshSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return String((high & 0x1fffff) * 4294967296 + low);
}

/** A setting as its field shows it. */
function asText(value) {
  if (Array.isArray(value)) return asLine(value);
  if (value !== null && typeof value === "object") return Object.entries(value).map((pair) => pair.join(":")).join(", ");
  return String(value);
}

function apply(values) {
  for (const name of FIELDS) if (values[name] !== undefined && values[name] !== null) {
    if (name === "style") {
      setStyle(asText(values.style));
      continue;
    }
    const field = at(name), before = field.value;
    field.value = asText(values[name]);
    if (PLAIN.includes(name) && (field.value === "" || !field.checkValidity())) field.value = before;
    if (!CONTROLS.has(name)) continue;
    try {
      valueOf(CONTROLS.get(name));
    } catch {
      field.value = before;
    }
  }
  for (const name of ["fresh", "tint"]) if (typeof values[name] === "boolean") at(name).checked = values[name];
  document.querySelector(".slider output").textContent = Number(at("temperature").value).toFixed(2);
}

function held() {
  const values = { text: sheet.value, fresh: at("fresh").checked, tint: at("tint").checked, style: styleOf() };
  for (const name of FIELDS) if (name !== "style") values[name] = at(name).value;
  return values;
}

function keep() {
  try {
    localStorage.setItem(PLACE, JSON.stringify(held()));
  } catch {
    // Private windows and full storage: the page works, it only forgets.
  }
}

function remembered() {
  try {
    const found = JSON.parse(localStorage.getItem(PLACE));
    return found && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

/** The address of this page with the beginning, the settings and the seed of what was written last. */
function address() {
  const values = held(), link = new URLSearchParams({ prompt: latest ? latest.text : values.text });
  for (const name of FIELDS) {
    const usual = CONTROLS.get(name)?.rare ? asText(MODEL.settings[name]) : ""; // what is rare is carried where it was changed
    if (values[name] !== usual) link.set(name, values[name]);
  }
  return `${location.href.split("#")[0]}#${link}`;
}

function fromAddress() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (!link.has("prompt")) return false;
  const values = Object.fromEntries(link);
  if (sheet.value && sheet.value !== values.prompt) past.push({ text: sheet.value, written });
  apply({ ...MODEL.settings, ...values, fresh: !values.seed }); // not what this reader had set
  put(values.prompt, []);
  latest = null;
  return true;
}

// ---- Changing the sheet --------------------------------------------------------------------------------------------

function put(text, tokens) {
  sheet.value = text;
  written = tokens;
  hideCard();
  reflect();
  buttons();
  keep();
}

function remember() {
  past.push({ text: sheet.value, written });
  if (past.length > 200) past.shift();
}

function undo() {
  const before = past.pop();
  if (!before) return;
  latest = null;
  put(before.text, before.written);
  say("Taken back.");
  sheet.focus();
}

function retry() {
  if (!latest || writing) return;
  if (!at("fresh").checked && /^\d{1,18}$/.test(at("seed").value)) at("seed").value = String(BigInt(at("seed").value) + 1n);
  remember();
  put(latest.text, latest.written);
  return go(false);
}

const channel = new MessageChannel();
let rested = 0;
/** Let the browser paint and listen, at most every 12 ms. */
async function pause() {
  if (performance.now() - rested < 12) return;
  await new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(0);
  });
  rested = performance.now();
}

async function go(recorded = true) {
  if (!model || writing) return;
  let chosen;
  try {
    chosen = settings();
    tokenizer.encode(sheet.value);
  } catch (error) {
    return say(error.message, true);
  }
  if (recorded) remember();
  latest = { text: sheet.value, written };
  writing = true;
  halted = false;
  hideCard();
  buttons();
  say("Writing …");
  written = written.map((token) => ({ ...token, last: false }));
  const start = sheet.value, began = performance.now();
  let text = start, spelt = start.length, count = 0, reason = "length", painted = began;
  try {
    for await (const step of write(model, tokenizer, start, chosen, pause, () => halted)) {
      text += step.text; // may lag behind what the tokens spell: it could begin a stop string
      if (step.reason) reason = step.reason;
      else {
        count++;
        written.push({ start: spelt, end: (spelt += step.piece.length), probability: step.probability, likeliest: step.likeliest, last: true });
      }
      if (step.reason || performance.now() - painted > 60) {
        const near = innerHeight + scrollY > document.documentElement.scrollHeight - 240;
        sheet.value = text;
        reflect();
        if (near) at("bar").scrollIntoView({ block: "nearest" });
        painted = performance.now();
      }
    }
    const seconds = (performance.now() - began) / 1000;
    const ends = { length: "", stop: "The model ended the text here. ", phrase: "A stop phrase ended the text. ", stopped: "Stopped. " };
    say(`${ends[reason]}${count} tokens, ${Math.round(count / seconds)} a second, from seed ${chosen.seed}.`);
    at("spoken").textContent = text.slice(start.length);
  } catch (error) {
    say(error.message, true);
  }
  writing = false;
  written = written.filter((token) => token.start < text.length); // a stop string may have taken the last
  for (const token of written) token.end = Math.min(token.end, text.length);
  sheet.value = text;
  reflect();
  buttons();
  keep();
}

// ---- Setting up ----------------------------------------------------------------------------------------------------

function describe() {
  document.title = MODEL.name;
  at("name").textContent = MODEL.name;
  const size = MODEL.parameters < 1e6 ? MODEL.parameters.toLocaleString("en") : `${(MODEL.parameters / 1e6).toFixed(1)} million`;
  const { description, data, limits, val_loss: loss } = MODEL.card;
  const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);
  at("about").textContent = [
    description ? sentence(String(description)) : "",
    data ? `Learned from: ${sentence(String(data))}` : "",
    `${size} parameters; it sees the last ${MODEL.shape.block_size.toLocaleString("en")} tokens of a text.`,
    loss ? `Validation loss ${Number(loss).toFixed(2)} nats a token.` : "",
  ].filter(Boolean).join(" ");
  at("limits").textContent = limits ? String(limits) : "It states inventions as facts, and repeats the opinions of its books.";
  const licence = MODEL.licence ? `Licence: ${MODEL.licence.toLowerCase() === "mit" ? "MIT" : MODEL.licence}. ` : "";
  at("made").textContent = `${licence}Made with the Victorian Literature Generator.`;
  const styles = Object.keys(MODEL.vocabulary.styles);
  for (const name of styles) at("style").append(new Option(name, name));
  if (styles.length > 1) at("style").append(new Option("a blend …", BLEND));
  if (!styles.length) for (const part of document.querySelectorAll(".styled")) part.remove();
  else at("blend").placeholder = styles.slice(0, 2).map((name, n) => `${name}:${n ? 0.3 : 0.7}`).join(", ");
}

function listen() {
  at("continue").onclick = () => go();
  at("halt").onclick = () => (halted = true);
  at("retry").onclick = retry;
  at("undo").onclick = undo;
  at("link").onclick = async () => {
    const link = address();
    history.replaceState(null, "", link);
    try {
      await navigator.clipboard.writeText(link);
      say("Copied: an address with the beginning, the settings and the seed.");
    } catch {
      say("The address of this page now carries the beginning, the settings and the seed: copy it from there.");
    }
  };
  at("save").onclick = () => {
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([sheet.value], { type: "text/plain" }));
    link.download = `${MODEL.name}.txt`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  at("clear").onclick = () => {
    if (sheet.value) remember();
    latest = null;
    put("", []);
    sheet.focus();
  };
  sheet.oninput = () => {
    const text = sheet.value, before = mirror.textContent.slice(0, -1);
    let same = 0;
    while (same < Math.min(text.length, before.length) && text[same] === before[same]) same++;
    written = written.filter((token) => token.end <= same).map((token) => ({ ...token, last: false }));
    latest = null;
    hideCard();
    reflect();
    buttons();
    keep();
  };
  at("settings").oninput = (event) => {
    if (event.target === at("temperature")) document.querySelector(".slider output").textContent = Number(at("temperature").value).toFixed(2);
    if (event.target === at("style")) showBlend();
    if (event.target === at("seed")) at("fresh").checked = false;
    if (event.target === at("tint")) reflect();
    keep();
  };
  sheet.onmousemove = (event) => {
    const span = document.elementsFromPoint(event.clientX, event.clientY).find((element) => element.dataset.token !== undefined);
    if (!span) hideCard();
    else if (!span.classList.contains("shown")) showCard(Number(span.dataset.token));
  };
  sheet.onmouseleave = hideCard;
  const atCaret = () => {
    const caret = sheet.selectionStart, index = written.findIndex((token) => token.start <= caret && caret < token.end);
    if (index < 0 || caret !== sheet.selectionEnd || writing) hideCard();
    else showCard(index);
  };
  sheet.onkeyup = (event) => event.key.startsWith("Arrow") && atCaret();
  sheet.onclick = atCaret;
  document.onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) go();
    else if (event.key === "Escape") {
      halted = true;
      hideCard();
    } else if (event.altKey && event.code === "KeyR") retry();
    else if (event.altKey && event.code === "KeyU" && !writing) undo();
    else return;
    event.preventDefault();
  };
  onresize = reflect;
  onhashchange = () => !writing && fromAddress() && say("This link brings a beginning and its settings: press Continue.");
}

function begin() {
  describe();
  build();
  at("settings").open = innerWidth > 832;
  apply({ ...MODEL.settings, seed: freshSeed(), fresh: true });
  const before = remembered();
  apply(before);
  put(typeof before.text === "string" ? before.text : "", []);
  const linked = fromAddress();
  listen();
  setTimeout(async () => {
    try {
      await unpack();
    } catch (error) {
      const memory = error instanceof RangeError ? ": it needs some hundred megabytes of memory" : "";
      return say(`The model could not be loaded: ${error.message}${memory}.`, true);
    }
    for (const opening of OPENINGS) {
      try {
        tokenizer.encode(opening);
      } catch {
        continue; // has characters that this model does not know
      }
      const button = make("button", `${opening} …`);
      button.onclick = () => {
        if (sheet.value) remember();
        latest = null;
        put(opening, []);
        sheet.focus();
        sheet.setSelectionRange(opening.length, opening.length);
      };
      at("openings").append(button);
    }
    buttons();
    say(linked ? "This link brings a beginning and its settings: press Continue." : "Ready.");
  }, 30);
}

begin();
