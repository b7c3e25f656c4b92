// Tabs, addresses and the colour scheme.

const views = {
  examples: ["Examples", examplesView], example: ["One example", exampleView], component: ["One component", componentView],
  whatif: ["What if", whatifView], edits: ["Edits", editsView],
  ...(content.circuits ? { circuits: ["Circuits", circuitsView] } : {}),
  ...(content.traces ? { traces: ["Traces", tracesView] } : {}),
  ...(content.lenses ? { lenses: ["Lenses", lensesView] } : {}),
  evaluation: ["Evaluation", evaluationView], about: ["About", aboutView],
};
const last = { name: "examples", argument: undefined };
const addresses = new Map(Object.keys(views).map((name) => [name, name]));

/** Draw the view that the address names; unknown addresses show the examples. */
function show() {
  let address = "";
  try {
    address = decodeURIComponent(window.location.hash.slice(1));
  } catch {
    address = "";
  }
  const [name, ...rest] = address.split("/");
  if (address === "main") return;
  last.name = Object.hasOwn(views, name) ? name : "examples";
  last.argument = rest.join("/");
  addresses.set(last.name, address || "examples");
  draw();
  window.scrollTo(0, 0);
}

function draw() {
  const main = document.getElementById("main");
  main.querySelectorAll(".chart").forEach((place) => place.dataset.drawn && window.Plotly.purge(place));
  const panel = make("div", { class: "panel", role: "tabpanel", id: "panel", "aria-labelledby": `tab-${last.name}` });
  main.replaceChildren(panel);
  views[last.name][1](panel, last.argument);
  for (const name of Object.keys(views)) {
    const tab = document.getElementById(`tab-${name}`);
    tab.setAttribute("aria-selected", String(name === last.name));
    tab.tabIndex = name === last.name ? 0 : -1;
    if (name === last.name) tab.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  main.dataset.view = last.name;
}

function makeTabs() {
  const names = Object.keys(views);
  const tabs = document.getElementById("tabs");
  const open = (name) => go(addresses.get(name));
  tabs.append(...names.map((name) => make("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", on: { click: () => open(name) } }, views[name][0])));
  tabs.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const at = names.indexOf(document.activeElement.id.replace("tab-", ""));
    const to = event.key === "Home" ? 0 : event.key === "End" ? names.length - 1 : step ? (at + step + names.length) % names.length : null;
    if (to === null) return;
    event.preventDefault();
    open(names[to]);
    document.getElementById(`tab-${names[to]}`).focus();
  });
}

function makeSwitch() {
  const button = document.getElementById("theme");
  const dark = () => (document.documentElement.dataset.theme ?? (window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => (button.textContent = dark() ? "Light scheme" : "Dark scheme");
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    name();
    draw();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { name(); draw(); });
  name();
}

document.getElementById("title").textContent = content.title;
document.getElementById("subtitle").textContent = `${plural(content.components.of, "component")}, ${plural(content.examples.of, "example")}, ${content.facts.ablation} ablation${heldOutRow() ? `, held-out correlation ${shown(heldOutRow().pearson)}` : ""}`;
document.getElementById("footer").textContent = `Made by coar ${content.version}. Charts by plotly.js, under the MIT licence.`;
makeTabs();
makeSwitch();
window.addEventListener("hashchange", show);
show();
document.documentElement.dataset.ready = "true";
requestAnimationFrame(() => setTimeout(plotly)); // start the charts' code once the first view is painted
