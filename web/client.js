// The page's side of the WebSocket protocol. All text from the server becomes text nodes; nothing is parsed as HTML.
"use strict";

const PING_MS = 4 * 60 * 1000; // gateways close a connection after ten silent minutes
const SILENCE_MS = 2 * 60 * 1000; // a gateway gives a text up after one minute without a free writer
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 30_000;
const OWN = "the model's own"; // shown for a default that the server does not tell

const $ = (id) => document.getElementById(id);

/** One connection that comes back by itself, waiting longer after every failure. */
class Line {
  constructor(onState, onMessage) {
    this.onState = onState;
    this.onMessage = onMessage;
    this.socket = null;
    this.address = null;
    this.failures = 0;
    this.timer = null;
    setInterval(() => this.send({ action: "ping" }), PING_MS);
    window.addEventListener("online", () => this.retry(0));
    document.addEventListener("visibilitychange", () => document.hidden || this.retry(0));
  }

  get open() {
    return this.socket !== null && this.socket.readyState === WebSocket.OPEN;
  }

  connect(address) {
    this.address = address;
    this.failures = 0;
    this.hangUp();
    this.dial();
  }

  hangUp() {
    clearTimeout(this.timer);
    this.timer = null;
    const socket = this.socket;
    this.socket = null;
    if (socket) socket.close();
  }

  dial() {
    clearTimeout(this.timer);
    this.timer = null;
    let socket;
    try {
      socket = new WebSocket(this.address);
    } catch (error) {
      this.onState("refused", `This address cannot be used: ${error.message}`);
      return;
    }
    this.socket = socket;
    this.onState("dialling", "Connecting…");
    socket.onopen = () => {
      if (socket !== this.socket) return;
      this.failures = 0;
      this.onState("open", `Connected to ${new URL(this.address).host}`);
    };
    socket.onmessage = (event) => {
      if (socket !== this.socket) return;
      let message;
      try {
        message = JSON.parse(event.data);
      } catch {
        return;
      }
      if (message && typeof message === "object") this.onMessage(message);
    };
    socket.onclose = (event) => {
      if (socket !== this.socket) return;
      this.socket = null;
      this.failures += 1;
      const ceiling = Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** (this.failures - 1));
      const delay = ceiling * (0.5 + Math.random() / 2);
      const reason = event.reason ? ` (${event.reason})` : "";
      this.onState("lost", `No connection${reason}; trying again in ${Math.ceil(delay / 1000)} s`);
      this.timer = setTimeout(() => this.dial(), delay);
    };
  }

  retry(delay) {
    if (this.timer === null) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.dial(), delay);
  }

  send(message) {
    if (!this.open) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }
}

/** One request's texts on the page; puts the tokens in order and drops repeated ones. */
class Story {
  constructor(id, prompt, n, given) {
    this.id = id;
    this.prompt = prompt;
    this.begun = performance.now();
    this.first = null;
    this.tokens = 0;
    this.next = 0;
    this.early = new Map();
    this.given = given; // the seed as it was typed: it may have more digits than a number holds
    this.seed = null;
    this.started = false;
    this.pages = Array.from({ length: n }, (_, index) => this.page(index, n));
  }

  page(index, n) {
    const article = $("page").content.firstElementChild.cloneNode(true);
    article.querySelector("h2").textContent = n > 1 ? `Sample ${index + 1} of ${n}` : "❦";
    if (n === 1) article.querySelector("h2").setAttribute("aria-label", "The text");
    const text = article.querySelector(".text");
    if (this.prompt) {
      const given = document.createElement("span");
      given.className = "given";
      given.textContent = this.prompt;
      text.append(given);
    }
    const node = document.createTextNode("");
    text.append(node);
    article.classList.add("writing");
    article.querySelector(".continue").addEventListener("click", () => {
      $("opening").value = this.prompt + node.data;
      $("opening").focus();
      $("opening").scrollTop = $("opening").scrollHeight;
    });
    article.querySelector(".copy").addEventListener("click", () => copy(this.prompt + node.data));
    return { article, node, colophon: article.querySelector(".colophon") };
  }

  token(message) {
    if (message.seq < this.next || this.early.has(message.seq)) return;
    this.early.set(message.seq, message);
    while (this.early.has(this.next)) {
      const due = this.early.get(this.next);
      this.early.delete(this.next);
      this.next += 1;
      this.append(due);
    }
  }

  append(message) {
    this.first ??= performance.now();
    this.tokens += 1;
    const page = this.pages[message.index];
    if (page) page.node.appendData(String(message.text));
  }

  /** Whatever still waits for a message that was lost, then the last line of each page. */
  end(describe) {
    for (const seq of [...this.early.keys()].sort((a, b) => a - b)) this.append(this.early.get(seq));
    this.early.clear();
    this.pages.forEach((page, index) => {
      page.article.classList.remove("writing");
      page.colophon.textContent = describe(index);
    });
  }

  pace(tokens) {
    const seconds = (performance.now() - (this.first ?? this.begun)) / 1000;
    return seconds > 0.05 && tokens > 1 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
  }
}

const REASONS = {
  stop: "came to its end",
  length: "full length",
  cancelled: "stopped",
  deadline: "the server's time was up",
};

let story = null;
let line = null;
let silence = null; // the timer that ends a story nobody writes
let parameters = []; // [name, JSON schema] of each setting that has a slider
let described = null; // address of the server that they are from
let asking = false; // whether the connection has been asked for them
let refusals = 0; // how often it has put the answer off

function copy(text) {
  const done = () => notice("Copied.");
  if (navigator.clipboard) {
    navigator.clipboard.writeText(text).then(done, () => notice("The browser did not allow copying."));
    return;
  }
  const box = document.createElement("textarea"); // no clipboard outside secure pages
  box.value = text;
  document.body.append(box);
  box.select();
  if (document.execCommand("copy")) done();
  box.remove();
}

function notice(text) {
  $("notice").textContent = text;
}

function showError(text) {
  $("error-box").textContent = text;
  $("error-box").hidden = !text;
}

function busy(on) {
  $("pages").setAttribute("aria-busy", String(on));
  $("stop").disabled = !on;
  $("write").disabled = on || !line.open;
}

/** Give a text up whose server sends nothing more: called again with every message. */
function listen() {
  clearTimeout(silence);
  silence = setTimeout(() => {
    stop();
    showError("The server has sent nothing for two minutes, so this text was given up. Try again.");
    finish(() => "The server fell silent; what was written is kept.");
    notice("");
  }, SILENCE_MS);
}

function finish(described) {
  clearTimeout(silence);
  if (!story) return;
  story.end(described);
  story = null;
  busy(false);
}

function onState(state, text) {
  $("link").textContent = text;
  $("lamp").className = `lamp ${{ open: "open", dialling: "wait" }[state] ?? ""}`;
  if (state !== "open" && story) {
    finish(() => "The connection was lost; what was written is kept.");
    notice("The connection was lost.");
  }
  asking = false;
  if (state === "open") {
    refusals = 0;
    ask();
  }
  busy(story !== null);
}

/** Ask the server for its model and settings, at every connection: another model may run there by now. */
function ask() {
  if (described !== line.address) buildSliders(parameters.map(withoutDefault)); // what is shown is another server's
  asking = line.send({ action: "settings" });
}

/** A server that is loading its model is asked again; one that has no answer leaves what is shown. */
function unanswered(error) {
  asking = false;
  if (error?.type === "unavailable_error") {
    refusals += 1;
    const socket = line.socket;
    setTimeout(() => socket === line.socket && ask(), Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** refusals));
  } else {
    undescribed("This server does not say which settings it has; its own defaults apply.");
  }
}

const withoutDefault = ([field, { default: _, ...schema }]) => [field, schema];

/** What stands in place of the sliders where there are none. */
function undescribed(text) {
  $("undescribed").textContent = text;
  $("undescribed").hidden = parameters.length > 0;
}

/** Show the model, its settings and its authors. */
function describe(message) {
  asking = false;
  described = line.address;
  const known = typeof message.model === "string";
  $("model").textContent = known ? `Model: ${message.model}` : "";
  $("model").hidden = !known;
  // a gateway whose model is silent gives general defaults, which the model's folder overrules; it sets the length alone
  const told = (field) => known || field === "max_tokens";
  const settings = Object.entries(message.settings).map((pair) => (told(pair[0]) ? pair : withoutDefault(pair)));
  const style = message.settings.style ?? {};
  $("authors").replaceChildren(...(style.examples ?? []).map((name) => new Option(name, name)));
  $("style").closest(".field").hidden = style.enum?.join("") === "";
  buildSliders(settings);
}

function onMessage(message) {
  if (message.type === "pong") return;
  if (message.type === "settings") {
    describe(message);
    return;
  }
  // the gateway itself answers so, without a request_id, when it refuses a message or gives up waiting
  const fromGateway = !message.type && message.connectionId;
  if (asking && !story && (fromGateway || (message.type === "error" && message.request_id == null))) {
    unanswered(message.error);
    return;
  }
  if (fromGateway) {
    showError(`The gateway answered: ${message.message}`);
    if (story && !story.started) {
      finish(() => "An error ended this text.");
      notice("");
    }
    return;
  }
  if (!story || message.request_id !== story.id) {
    if (message.type === "error" && message.request_id == null) showError(describeError(message.error));
    return;
  }
  listen();
  if (message.type === "queued") {
    if (!story.started) notice("Waiting for a free writer…");
  } else if (message.type === "started") {
    story.started = true;
    story.seed = message.seed ?? null;
    notice(message.truncated ? "Writing… (the opening was too long: its end was kept)" : "Writing…");
  } else if (message.type === "token") {
    story.token(message);
  } else if (message.type === "complete") {
    complete(message);
  } else if (message.type === "error") {
    showError(describeError(message.error));
    finish(() => "An error ended this text.");
    notice("");
  }
}

function complete(message) {
  const usage = message.usage ?? {};
  const total = usage.completion_tokens ?? story.tokens;
  const seed = story.given || (message.seed ?? story.seed);
  const pace = message.streamed === false ? "" : story.pace(total);
  finish((index) => {
    const sample = message.samples?.[index];
    const reason = sample?.finish_reason ?? message.finish_reason;
    const parts = [REASONS[reason] ?? reason, sample && `${sample.tokens} tokens`, pace, seed != null && `seed ${seed}`];
    return parts.filter(Boolean).join(" · ");
  });
  notice(`Done: ${total} tokens.`);
}

function describeError(error) {
  return error && error.message ? String(error.message) : "The server reported an error.";
}

/** The settings that stand elsewhere than the server's defaults, by name; what is not sent, the model's folder decides. */
function moved() {
  const typed = parameters.filter(([field]) => $(field).value !== "");
  const found = typed.map(([field, schema]) => {
    const value = Number($(field).value);
    return [field, schema.type === "integer" ? Math.round(value) : value, schema.default];
  });
  return Object.fromEntries(found.filter(([, value, usual]) => value !== usual).map(([field, value]) => [field, value]));
}

function values() {
  const body = moved();
  const seed = $("seed").value.trim();
  const style = $("style").value.trim();
  if (style && !$("style").closest(".field").hidden) body.style = style;
  const stops = $("stops").value.split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  return { body, seed };
}

function write(event) {
  event?.preventDefault();
  if (story || !$("desk").reportValidity()) return;
  const { body, seed } = values();
  const prompt = $("opening").value;
  const id = Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  // a seed may have 19 digits, more than a JavaScript number holds: it goes into the JSON as it was typed
  const request = JSON.stringify({ action: "generate", request_id: id, prompt, ...body });
  const text = seed ? `${request.slice(0, -1)},"seed":${seed.replace(/^0+(?=.)/, "")}}` : request;
  if (!line.open) {
    notice("There is no connection.");
    return;
  }
  showError("");
  const usual = Object.fromEntries(parameters).n?.default;
  story = new Story(id, prompt, body.n ?? usual ?? 1, seed);
  $("pages").replaceChildren(...story.pages.map((page) => page.article));
  busy(true);
  notice("Waiting for the first word…");
  line.socket.send(text);
  listen();
  remember();
}

function stop() {
  if (story && line.send({ action: "stop", request_id: story.id })) notice("Stopping…");
}

function clear() {
  stop();
  finish(() => "");
  $("opening").value = "";
  $("pages").replaceChildren(blank);
  notice("");
  showError("");
  $("opening").focus();
}

/** Bounds of what may be typed; a bound that is itself excluded is moved by one step. */
function limits(schema) {
  const step = schema["x-step"];
  return {
    min: schema.minimum ?? (schema.exclusiveMinimum === undefined ? "" : schema.exclusiveMinimum + step),
    max: schema.maximum ?? (schema.exclusiveMaximum === undefined ? "" : schema.exclusiveMaximum - step),
    step: schema.type === "integer" ? 1 : "any",
  };
}

/** A slider for each setting whose schema has one (`x-slider`: see `Setting` in config.py); what was moved stays moved. */
function buildSliders(schemas) {
  const found = schemas.filter(([, schema]) => schema["x-slider"]);
  if (JSON.stringify(found) === JSON.stringify(parameters)) return;
  const held = Object.entries(moved());
  const places = { sliders: [], rare: [] };
  for (const [field, schema] of found) {
    const row = $("slider").content.firstElementChild.cloneNode(true);
    const [range, figure] = row.querySelectorAll("input");
    const [name, note] = [row.querySelector("label"), row.querySelector("small")];
    name.textContent = schema["x-label"];
    name.htmlFor = figure.id = field;
    note.id = `${field}-help`;
    note.textContent = schema.description ?? "";
    figure.setAttribute("aria-describedby", note.id);
    range.setAttribute("aria-label", `${schema["x-label"]}, slider`);
    const [min, max] = schema["x-slider"];
    const usual = schema.default ?? "";
    Object.assign(range, { min, max, step: schema["x-step"], value: usual });
    Object.assign(figure, { ...limits(schema), value: usual, required: usual !== "", placeholder: OWN });
    range.classList.toggle("unset", usual === "");
    range.addEventListener("input", () => {
      figure.value = range.value;
      range.classList.remove("unset");
    });
    figure.addEventListener("input", () => {
      range.value = figure.value;
      range.classList.toggle("unset", figure.value === "");
    });
    places[schema["x-rare"] ? "rare" : "sliders"].push(row);
  }
  parameters = found;
  $("sliders").replaceChildren(...places.sliders);
  $("rare").replaceChildren(...places.rare);
  $("rarely").hidden = !places.rare.length;
  $("undescribed").hidden = true;
  recallSettings();
  for (const [field, value] of held) if ($(field)) set(field, value);
}

function set(field, value) {
  const input = $(field);
  input.value = value;
  input.dispatchEvent(new Event("input"));
}

const KEPT = "victorian-generator";

function remember() {
  try {
    localStorage.setItem(KEPT, JSON.stringify({ ...moved(), opening: $("opening").value }));
  } catch {
    // private windows and files may have no storage
  }
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT) ?? "{}");
  } catch {
    return {}; // nothing kept, or damaged: the defaults stand
  }
}

function recallSettings() {
  const values = kept();
  for (const [field] of parameters) if (values[field] !== undefined) set(field, values[field]);
}

function recallOpening() {
  const { opening } = kept();
  if (typeof opening === "string") $("opening").value = opening;
}

/** The address typed, `?server=`, or this page's own server; http becomes ws. */
function startAddress() {
  const given = new URLSearchParams(location.search).get("server");
  if (given) return given;
  if (!location.protocol.startsWith("http")) return "";
  return new URL("ws", location.href.split(/[?#]/)[0]).href.replace(/^http/, "ws");
}

function connect() {
  const typed = $("server").value.trim().replace(/^http/, "ws");
  if (!/^wss?:\/\/\S+$/.test(typed)) {
    $("line").open = true;
    $("server").focus();
    onState("refused", "Give a server's address: ws://… or wss://…");
    return;
  }
  const address = new URL(typed);
  const key = $("key").value;
  if (key) address.searchParams.set("token", key);
  line.connect(address.href);
}

const blank = $("blank");
recallOpening();
line = new Line(onState, onMessage);
$("desk").addEventListener("submit", write);
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", clear);
$("connect").addEventListener("click", connect);
$("reset").addEventListener("click", () => {
  for (const [field, schema] of parameters) set(field, schema.default ?? "");
  $("seed").value = $("style").value = $("stops").value = "";
});
for (const id of ["server", "key"]) {
  $(id).addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      connect();
    }
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write(event);
});
if (matchMedia("(max-width: 61.99rem)").matches) $("settings").open = false;
$("server").value = startAddress();
if ($("server").value) connect();
else onState("refused", "Give a server's address below");
