// The story editor: a textarea over a mirror of its text that shows what is new and what the model no longer reads.
// Text passes only through .value and text nodes, so nothing in a story is parsed as HTML.
const editors = new WeakMap();
const PAUSE_MS = 400; // typing is sent after a pause this long, and at once when the field loses focus
const ANSWER_MS = 5000; // an edit that the app has not confirmed by then is sent again: it may have been down
const REVEAL_MS = 280; // words that arrive together appear over this long
const instanceOf = (rev) => rev.split(":").at(-2); // a revision is story:instance of the app:number
const storyOf = (rev) => rev.split(":").slice(0, -2).join(":");

/** Edits that the app has not confirmed, kept by the browser over a reload: {bases: texts they were typed on, text}. */
const drafts = {
  name: (story) => `story-draft:${story}`,
  keep(story, draft) {
    try {
      localStorage.setItem(this.name(story), JSON.stringify(draft));
    } catch {
      // no storage here, or it is full: the words are still in the editor
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
  const box = find("input");
  const title = find("title");
  if (!box || !title) return;
  let editor = editors.get(parentElement);
  if (!editor) {
    editor = {
      rev: null,
      live: false,
      shown: 0,
      text: "",
      known: "", // the text as the app last sent it
      sent: [], // and as it was sent since
      tries: 0,
      timer: 0,
      frame: 0,
      follow: true,
      unsent: false,
      away: false, // whether the app did not answer the last time
      asked: -Infinity, // when the model was last asked to write
      titled: null,
    };
    editors.set(parentElement, editor);
  }
  editor.data = data;
  box.setAttribute("aria-label", data.label);
  box.placeholder = data.placeholder;

  const parts = () => {
    const length = editor.text.length;
    const fresh = editor.edited ? length : length - Math.min(editor.data.fresh, length);
    const seen = editor.edited ? 0 : Math.min(editor.data.seen, length);
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
    const until = editor.live ? Math.min(editor.shown, length) : length;
    const mirror = find("mirror");
    const nodes = [];
    if (seen > 0) nodes.push(span("unseen", editor.text.slice(0, seen)));
    nodes.push(span("plain", editor.text.slice(seen, Math.min(fresh, until))));
    if (fresh < until) nodes.push(span("fresh", editor.text.slice(fresh, until)));
    if (editor.live) nodes.push(span("cursor", ""));
    nodes.push(document.createTextNode("\u200b"));
    mirror.replaceChildren(...nodes);
  };
  const reveal = (before) => {
    cancelAnimationFrame(editor.frame);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) editor.shown = editor.text.length;
    const begun = performance.now();
    let drawn = 0;
    const step = (time) => {
      if (!editor.live) return;
      if (time - drawn > 33) {
        drawn = time;
        const share = Math.min(1, Math.max(0, (time - begun) / REVEAL_MS));
        editor.shown = Math.max(editor.shown, Math.round(before + (editor.text.length - before) * share));
        paint();
        if (editor.follow) find("cursor")?.scrollIntoView({ block: "nearest" });
      }
      if (editor.shown < editor.text.length) editor.frame = requestAnimationFrame(step);
    };
    editor.frame = requestAnimationFrame(step);
  };
  const send = () => {
    if (!editor.unsent) return;
    clearTimeout(editor.timer);
    editor.unsent = false;
    editor.sent = [...editor.sent.slice(-20), editor.text];
    editor.tries += 1;
    editor.timer = setTimeout(again, ANSWER_MS);
    drafts.keep(storyOf(editor.rev), { bases: [editor.known, ...editor.sent], text: editor.text });
    setStateValue("edit", { rev: editor.rev, text: editor.text, tries: editor.tries });
  };
  const lock = () => {
    box.readOnly = editor.live || performance.now() - editor.asked < ANSWER_MS;
  };
  const again = () => {
    if (!editor.edited || editor.live || !parentElement.isConnected) return;
    editor.unsent = true;
    send();
    // a restarted app does not know this page until it is reloaded
    fetch(new URL("_stcore/health", document.baseURI)).then(
      () => editor.away && setTimeout(() => editor.edited && location.reload(), ANSWER_MS / 2),
      () => (editor.away = true),
    );
  };
  const command = (name) => {
    send();
    setTriggerValue("command", name);
    if (name !== "continue" && name !== "retry") return;
    editor.asked = performance.now(); // what is typed before the answer comes would be lost
    box.readOnly = true;
    setTimeout(lock, ANSWER_MS);
  };

  const changed = data.rev !== editor.rev;
  const anew = instanceOf(data.rev) !== instanceOf(editor.rev ?? data.rev) && storyOf(data.rev) === storyOf(editor.rev);
  if (anew && editor.edited && [editor.known, ...editor.sent].includes(data.text)) {
    // the app was restarted while the writer kept typing: the words since then still belong to this text
    editor.rev = data.rev;
    editor.live = false;
    editor.unsent = true;
    clearTimeout(editor.timer);
    editor.timer = setTimeout(send, PAUSE_MS);
  } else if (changed || data.live || editor.live) {
    const draft = editor.rev === null ? drafts.take(storyOf(data.rev)) : null;
    if (editor.rev !== null && (!editor.edited || editor.sent.includes(data.text))) drafts.take(storyOf(editor.rev));
    const before = editor.live && data.text.startsWith(editor.text.slice(0, editor.shown)) ? editor.shown : data.text.length;
    const starting = data.live && !editor.live;
    if (starting) editor.follow = true;
    clearTimeout(editor.timer);
    editor.unsent = false;
    editor.edited = false;
    editor.sent = [];
    editor.rev = data.rev;
    editor.live = data.live;
    editor.text = data.text;
    editor.shown = before;
    if (box.value !== data.text) {
      box.value = data.text;
      if (!data.live) box.setSelectionRange(data.text.length, data.text.length);
    }
    find("announcement").textContent = data.live ? data.announcement : "";
    if (draft && !data.live && draft.text !== data.text && draft.bases.includes(data.text)) {
      box.value = editor.text = draft.text;
      editor.edited = editor.unsent = true;
      editor.timer = setTimeout(send, PAUSE_MS);
    }
  } else if (data.text === editor.text) {
    drafts.take(storyOf(editor.rev));
    editor.edited = editor.away = false;
    editor.sent = [];
  }
  editor.known = data.text;
  if (data.live || changed) editor.asked = -Infinity;
  lock();
  box.setAttribute("aria-busy", String(data.live));
  if (editor.titled !== data.title && document.activeElement !== title && parentElement.activeElement !== title) {
    title.value = data.title;
    editor.titled = data.title;
  }
  paint();
  if (editor.live && editor.shown < editor.text.length) reveal(editor.shown);
  if (data.focus && editor.focused !== data.focus) {
    editor.focused = data.focus;
    box.focus({ preventScroll: true });
  }

  box.oninput = () => {
    editor.text = box.value;
    editor.edited = true;
    editor.unsent = true;
    paint();
    clearTimeout(editor.timer);
    editor.timer = setTimeout(send, PAUSE_MS);
  };
  box.onblur = send;
  box.onkeydown = (event) => {
    const mod = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    let name = "";
    if (event.key === "Enter" && mod) name = "continue";
    else if (event.key === "Enter" && event.altKey) name = "retry";
    else if (event.key === "Escape" && editor.live) name = "stop";
    else if (mod && !event.altKey && key === "z") name = event.shiftKey ? "redo" : "undo";
    else if (mod && key === "y") name = "redo";
    if (!name || event.isComposing) return;
    event.preventDefault();
    event.stopPropagation();
    command(name);
  };
  title.onchange = () => {
    editor.titled = title.value;
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
    if (event.deltaY < 0) editor.follow = false;
  };
  parentElement.ontouchmove = () => {
    editor.follow = false;
  };
  return () => {
    send();
    cancelAnimationFrame(editor.frame);
    document.onvisibilitychange = null;
  };
}
