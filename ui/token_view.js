// The tokens of a text, each shaded and underlined by its probability; a click or the arrow keys select one.
const BANDS = [[0.5, "likely"], [0.1, "fair"], [0.01, "odd"], [0, "rare"]];

export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const view = parentElement.querySelector(".token-view");
  if (!view) return;
  const percent = (p) => (p >= 0.0995 ? `${Math.round(p * 100)} %` : p >= 0.00095 ? `${(p * 100).toFixed(1)} %` : "under 0.1 %");
  const pick = (index) => {
    if (index >= 0 && index < data.tokens.length && data.tokens[index].p !== null) setTriggerValue("pick", index);
  };
  view.setAttribute("aria-label", data.label);
  const nodes = data.tokens.map((token, index) => {
    const node = document.createElement("span");
    node.textContent = token.text;
    node.id = `token-${index}`;
    node.setAttribute("role", "option");
    node.setAttribute("aria-selected", String(index === data.chosen));
    if (token.p === null) {
      node.className = "token given";
      node.title = "the first token has no probability: nothing comes before it";
      return node;
    }
    const band = BANDS.find(([least]) => token.p >= least)[1];
    node.className = `token ${band}`;
    const surprise = Math.min(1, Math.max(0, -Math.log10(Math.max(token.p, 1e-9)) / 4));
    node.style.setProperty("--surprise", surprise.toFixed(3));
    node.title = `${percent(token.p)} · rank ${token.rank}`;
    node.setAttribute("aria-label", `${token.text.trim() || "space"}, ${percent(token.p)}`);
    node.onclick = () => pick(index);
    if (data.numbers) {
      const number = document.createElement("span");
      number.className = "percent";
      number.textContent = String(Math.round(token.p * 100));
      node.append(number);
    }
    return node;
  });
  view.replaceChildren(...nodes);
  if (data.chosen >= 0) view.setAttribute("aria-activedescendant", `token-${data.chosen}`);
  view.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    pick(data.chosen < 0 ? 1 : data.chosen + step);
  };
}
