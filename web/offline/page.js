"use strict";
// The writing desk around engine.js. All that comes from the model, the writer or a link is set as text, never as markup.

const at = (id) => document.getElementById(id);
const MODEL = JSON.parse(at("model").textContent);
const NUMBERS = ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"];
const FIELDS = [...NUMBERS, "style", "seed"];
const OPENINGS = ["The old house stood", "It was a dark night, and", "“My dear,” said the old lady,", "There was once, in the county of", "I was born in the year"];
const PLACE = `victorian-gpt ${MODEL.name} ${MODEL.parameters}`; // in the browser's own storage
const sheet = at("text"), mirror = at("mirror"), card = at("card");

let model, tokenizer;
let written = []; // {start, end, probability, likeliest, last}: the tokens of the sheet that the model wrote, in order
let past = []; // [{text, written}] before each change, for Undo
let latest = null; // {text, written} before the last Continue: what Retry starts from, and the link carries
let writing = false, halted = false;

// ---- The model out of the page -------------------------------------------------------------------------------------

function unpack() {
  const bytes = fromBase64(take("vocabulary")), count = MODEL.shape.tokens, lengths = new DataView(bytes.buffer);
  const pieces = [];
  for (let id = 0, start = 2 * count; id < count; id++) {
    const end = start + lengths.getUint16(2 * id, true);
    pieces.push(bytes.subarray(start, end));
    start = end;
  }
  tokenizer = new Tokenizer(MODEL.vocabulary, pieces);
  model = new GPT(MODEL.shape, MODEL.tensors, (n) => decodeNumbers(fromBase64(take(`tensor-${n}`)), MODEL.tensors[n].type));
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
  at("stop").hidden = !writing;
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

function settings() {
  const found = { style: at("style").value };
  for (const name of NUMBERS) {
    const field = at(name);
    if (!field.checkValidity() || field.value === "") {
      field.closest("details#more")?.setAttribute("open", "");
      at("settings").open = true;
      field.focus();
      const label = document.querySelector(`label[for="${name}"]`).firstChild.textContent.trim();
      throw new Error(`${label} ${field.value || "(empty)"} is outside ${field.min} to ${field.max}.`);
    }
    found[name] = Number(field.value);
  }
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

function apply(values) {
  for (const name of FIELDS) if (values[name] !== undefined && values[name] !== null) {
    const field = at(name), before = field.value;
    field.value = values[name];
    if (name === "style" && !Object.hasOwn(MODEL.vocabulary.styles, values.style)) field.value = "";
    if (NUMBERS.includes(name) && (field.value === "" || !field.checkValidity())) field.value = before;
  }
  for (const name of ["fresh", "tint"]) if (typeof values[name] === "boolean") at(name).checked = values[name];
  document.querySelector(".slider output").textContent = Number(at("temperature").value).toFixed(2);
}

function held() {
  const values = { text: sheet.value, fresh: at("fresh").checked, tint: at("tint").checked };
  for (const name of FIELDS) values[name] = at(name).value;
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
  for (const name of FIELDS) if (values[name] !== "") link.set(name, values[name]);
  return `${location.href.split("#")[0]}#${link}`;
}

function fromAddress() {
  const link = new URLSearchParams(location.hash.slice(1));
  if (!link.has("prompt")) return false;
  const values = Object.fromEntries(link);
  if (sheet.value && sheet.value !== values.prompt) past.push({ text: sheet.value, written });
  apply({ ...values, fresh: !values.seed });
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
  let text = start, count = 0, reason = "length", painted = began;
  try {
    for await (const step of write(model, tokenizer, start, chosen, pause, () => halted)) {
      const from = text.length;
      text += step.text;
      if (step.reason) reason = step.reason;
      else {
        count++;
        written.push({ start: from, end: text.length, probability: step.probability, likeliest: step.likeliest, last: true });
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
    const ends = { length: "", stop: "The model ended the text here. ", stopped: "Stopped. " };
    say(`${ends[reason]}${count} tokens, ${Math.round(count / seconds)} a second, from seed ${chosen.seed}.`);
    at("spoken").textContent = text.slice(start.length);
  } catch (error) {
    say(error.message, true);
  }
  writing = false;
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
  for (const name of Object.keys(MODEL.vocabulary.styles)) at("style").append(new Option(name, name));
  if (!Object.keys(MODEL.vocabulary.styles).length) for (const part of document.querySelectorAll(".styled")) part.remove();
  if (!at("style")) {
    const none = make("input");
    none.id = "style";
    none.type = "hidden";
    at("settings").append(none);
  }
}

function listen() {
  at("continue").onclick = () => go();
  at("stop").onclick = () => (halted = true);
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
  at("settings").open = innerWidth > 832;
  apply({ ...MODEL.settings, seed: freshSeed(), fresh: true });
  const before = remembered();
  apply(before);
  put(typeof before.text === "string" ? before.text : "", []);
  const linked = fromAddress();
  listen();
  setTimeout(() => {
    try {
      unpack();
    } catch (error) {
      return say(`The model could not be unpacked (${error.message}): this needs some hundred megabytes of memory.`, true);
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
