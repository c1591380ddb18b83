// The sheet of paper: a textarea with a mirror under it that shows what is new and what the model no longer sees.
// Text only ever passes through .value and text nodes, so nothing in a story is ever read as HTML.
const sheets = new WeakMap();
const PAUSE_MS = 400; // typing is handed on after a pause this long, and at once when the field is left
const ANSWER_MS = 5000; // what the app has not taken by then is handed on again: it may have been away
const REVEAL_MS = 280; // words that arrive together are written out over this long
const lifeOf = (rev) => rev.split(":").at(-2); // a revision is story:life of the app:number
const storyOf = (rev) => rev.split(":").slice(0, -2).join(":");

/** Words that the app has not taken yet, kept by the browser over a reload: {bases: texts they were typed upon, text}. */
const drafts = {
  name: (story) => `story-sheet:${story}`,
  keep(story, draft) {
    try {
      localStorage.setItem(this.name(story), JSON.stringify(draft));
    } catch {
      // no storage here, or it is full: the words are still on the sheet
    }
  },
  take(story) {
    try {
      const kept = localStorage.getItem(this.name(story));
      localStorage.removeItem(this.name(story));
      return JSON.parse(kept);
    } catch {
      return null;
    }
  },
};

export default function (component) {
  const { data, parentElement, setStateValue, setTriggerValue } = component;
  const find = (name) => parentElement.querySelector("." + name);
  const box = find("ink");
  const title = find("title");
  if (!box || !title) return;
  let sheet = sheets.get(parentElement);
  if (!sheet) {
    sheet = {
      rev: null,
      live: false,
      shown: 0,
      text: "",
      known: "", // the text as the app last told it
      sent: [], // and as it was handed on since
      tries: 0,
      timer: 0,
      frame: 0,
      follow: true,
      unsent: false,
      away: false, // whether the app did not answer the last time
      asked: -Infinity, // when the model was last asked to write
      titled: null,
    };
    sheets.set(parentElement, sheet);
  }
  sheet.data = data;
  box.setAttribute("aria-label", data.label);
  box.placeholder = data.placeholder;

  const parts = () => {
    const length = sheet.text.length;
    const fresh = sheet.edited ? length : length - Math.min(sheet.data.fresh, length);
    const seen = sheet.edited ? 0 : Math.min(sheet.data.seen, length);
    return [seen, Math.max(seen, fresh), length];
  };
  const span = (name, text) => {
    const part = document.createElement("span");
    part.className = name;
    part.textContent = text;
    return part;
  };
  const paint = () => {
    const [seen, fresh, length] = parts();
    const until = sheet.live ? Math.min(sheet.shown, length) : length;
    const mirror = find("mirror");
    const nodes = [];
    if (seen > 0) nodes.push(span("unseen", sheet.text.slice(0, seen)));
    nodes.push(span("plain", sheet.text.slice(seen, Math.min(fresh, until))));
    if (fresh < until) nodes.push(span("fresh", sheet.text.slice(fresh, until)));
    if (sheet.live) nodes.push(span("quill", ""));
    nodes.push(document.createTextNode("\u200b"));
    mirror.replaceChildren(...nodes);
  };
  const reveal = (before) => {
    cancelAnimationFrame(sheet.frame);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) sheet.shown = sheet.text.length;
    const begun = performance.now();
    let drawn = 0;
    const step = (time) => {
      if (!sheet.live) return;
      if (time - drawn > 33) {
        drawn = time;
        const share = Math.min(1, Math.max(0, (time - begun) / REVEAL_MS));
        sheet.shown = Math.max(sheet.shown, Math.round(before + (sheet.text.length - before) * share));
        paint();
        if (sheet.follow) find("quill")?.scrollIntoView({ block: "nearest" });
      }
      if (sheet.shown < sheet.text.length) sheet.frame = requestAnimationFrame(step);
    };
    sheet.frame = requestAnimationFrame(step);
  };
  const send = () => {
    if (!sheet.unsent) return;
    clearTimeout(sheet.timer);
    sheet.unsent = false;
    sheet.sent = [...sheet.sent.slice(-20), sheet.text];
    sheet.tries += 1;
    sheet.timer = setTimeout(again, ANSWER_MS);
    drafts.keep(storyOf(sheet.rev), { bases: [sheet.known, ...sheet.sent], text: sheet.text });
    setStateValue("edit", { rev: sheet.rev, text: sheet.text, tries: sheet.tries });
  };
  const lock = () => {
    box.readOnly = sheet.live || performance.now() - sheet.asked < ANSWER_MS;
  };
  const again = () => {
    if (!sheet.edited || sheet.live || !parentElement.isConnected) return;
    sheet.unsent = true;
    send();
    // an app that was started again does not know this page until it is loaded anew
    fetch(new URL("_stcore/health", document.baseURI)).then(
      () => sheet.away && setTimeout(() => sheet.edited && location.reload(), ANSWER_MS / 2),
      () => (sheet.away = true),
    );
  };
  const command = (name) => {
    send();
    setTriggerValue("command", name);
    if (name !== "continue" && name !== "retry") return;
    sheet.asked = performance.now(); // what is typed before the answer comes would be lost
    box.readOnly = true;
    setTimeout(lock, ANSWER_MS);
  };

  const changed = data.rev !== sheet.rev;
  const anew = lifeOf(data.rev) !== lifeOf(sheet.rev ?? data.rev) && storyOf(data.rev) === storyOf(sheet.rev);
  if (anew && sheet.edited && [sheet.known, ...sheet.sent].includes(data.text)) {
    // the app was started again while the writer went on typing: the words since then still belong to this text
    sheet.rev = data.rev;
    sheet.live = false;
    sheet.unsent = true;
    clearTimeout(sheet.timer);
    sheet.timer = setTimeout(send, PAUSE_MS);
  } else if (changed || data.live || sheet.live) {
    const draft = sheet.rev === null ? drafts.take(storyOf(data.rev)) : null;
    if (sheet.rev !== null && (!sheet.edited || sheet.sent.includes(data.text))) drafts.take(storyOf(sheet.rev));
    const before = sheet.live && data.text.startsWith(sheet.text.slice(0, sheet.shown)) ? sheet.shown : data.text.length;
    const starting = data.live && !sheet.live;
    if (starting) sheet.follow = true;
    clearTimeout(sheet.timer);
    sheet.unsent = false;
    sheet.edited = false;
    sheet.sent = [];
    sheet.rev = data.rev;
    sheet.live = data.live;
    sheet.text = data.text;
    sheet.shown = before;
    if (box.value !== data.text) {
      box.value = data.text;
      if (!data.live) box.setSelectionRange(data.text.length, data.text.length);
    }
    find("said").textContent = data.live ? data.saying : "";
    if (draft && !data.live && draft.text !== data.text && draft.bases.includes(data.text)) {
      box.value = sheet.text = draft.text;
      sheet.edited = sheet.unsent = true;
      sheet.timer = setTimeout(send, PAUSE_MS);
    }
  } else if (data.text === sheet.text) {
    drafts.take(storyOf(sheet.rev));
    sheet.edited = sheet.away = false;
    sheet.sent = [];
  }
  sheet.known = data.text;
  if (data.live || changed) sheet.asked = -Infinity;
  lock();
  box.setAttribute("aria-busy", String(data.live));
  if (sheet.titled !== data.title && document.activeElement !== title && parentElement.activeElement !== title) {
    title.value = data.title;
    sheet.titled = data.title;
  }
  paint();
  if (sheet.live && sheet.shown < sheet.text.length) reveal(sheet.shown);
  if (data.focus && sheet.focused !== data.focus) {
    sheet.focused = data.focus;
    box.focus({ preventScroll: true });
  }

  box.oninput = () => {
    sheet.text = box.value;
    sheet.edited = true;
    sheet.unsent = true;
    paint();
    clearTimeout(sheet.timer);
    sheet.timer = setTimeout(send, PAUSE_MS);
  };
  box.onblur = send;
  box.onkeydown = (event) => {
    const mod = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    let name = "";
    if (event.key === "Enter" && mod) name = "continue";
    else if (event.key === "Enter" && event.altKey) name = "retry";
    else if (event.key === "Escape" && sheet.live) name = "stop";
    else if (mod && !event.altKey && key === "z") name = event.shiftKey ? "redo" : "undo";
    else if (mod && key === "y") name = "redo";
    if (!name || event.isComposing) return;
    event.preventDefault();
    event.stopPropagation();
    command(name);
  };
  title.onchange = () => {
    sheet.titled = title.value;
    setStateValue("title", title.value);
  };
  title.onkeydown = (event) => {
    if (event.key === "Enter") box.focus();
    event.stopPropagation();
  };
  const hidden = () => {
    if (document.visibilityState === "hidden") send();
  };
  document.onvisibilitychange = hidden;
  parentElement.onwheel = (event) => {
    if (event.deltaY < 0) sheet.follow = false;
  };
  parentElement.ontouchmove = () => {
    sheet.follow = false;
  };
  return () => {
    send();
    cancelAnimationFrame(sheet.frame);
    document.onvisibilitychange = null;
  };
}
