// The sheet of paper: a textarea with a mirror under it that shows what is new and what the model no longer sees.
// Text only ever passes through .value and text nodes, so nothing in a story is ever read as HTML.
const sheets = new WeakMap();
const PAUSE_MS = 400; // typing is handed on after a pause this long, and at once when the field is left
const REVEAL_MS = 280; // words that arrive together are written out over this long

export default function (component) {
  const { data, parentElement, setStateValue, setTriggerValue } = component;
  const find = (name) => parentElement.querySelector("." + name);
  const box = find("ink");
  const title = find("title");
  if (!box || !title) return;
  let sheet = sheets.get(parentElement);
  if (!sheet) {
    sheet = { rev: null, live: false, shown: 0, text: "", timer: 0, frame: 0, follow: true, unsent: false, titled: null };
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
    clearTimeout(sheet.timer);
    if (!sheet.unsent) return;
    sheet.unsent = false;
    setStateValue("edit", { rev: sheet.rev, text: sheet.text });
  };
  const command = (name) => {
    send();
    setTriggerValue("command", name);
  };

  if (data.rev !== sheet.rev || data.live || sheet.live) {
    const before = sheet.live && data.text.startsWith(sheet.text.slice(0, sheet.shown)) ? sheet.shown : data.text.length;
    const starting = data.live && !sheet.live;
    if (starting) sheet.follow = true;
    clearTimeout(sheet.timer);
    sheet.unsent = false;
    sheet.edited = false;
    sheet.rev = data.rev;
    sheet.live = data.live;
    sheet.text = data.text;
    sheet.shown = before;
    if (box.value !== data.text) {
      box.value = data.text;
      if (!data.live) box.setSelectionRange(data.text.length, data.text.length);
    }
    find("said").textContent = data.live ? data.saying : "";
  } else if (data.text === sheet.text) {
    sheet.edited = false;
  }
  box.readOnly = data.live;
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
