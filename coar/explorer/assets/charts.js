// Charts, drawn by plotly.js. Its code is in the page as text and starts after the first view is painted.

const DRAWING = { displayModeBar: false, responsive: true };

/** Return Plotly; start it when it is first needed. */
function plotly() {
  if (!window.Plotly) {
    const script = document.createElement("script");
    script.textContent = document.getElementById("charts").textContent;
    document.head.append(script);
  }
  return window.Plotly;
}

/** The value of a colour of the style sheet, in the current scheme. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Text that Plotly, which reads a little HTML, shows as it is. */
function inert(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

/** Orange for values below 0, blue for those above, the ground between. */
function diverging() {
  return [[0, colour("against")], [0.5, colour("middle")], [1, colour("for")]];
}

/** From the ground to blue, for numbers from 0 upwards. */
function rising() {
  return [[0, colour("middle")], [1, colour("for")]];
}

function axis(title, more = {}) {
  const line = colour("line");
  return { title: { text: inert(title), standoff: 8 }, gridcolor: line, zerolinecolor: colour("muted"), linecolor: line, automargin: true, ...more };
}

/** A figure with a chart, a name for those who do not see it, and a caption; `clicked` gets the point that is clicked. */
function chart(label, traces, layout, { height = 300, caption = "", clicked = null } = {}) {
  const place = make("div", { class: "chart", style: { height: `${height}px`, minHeight: "0" }, role: "img", "aria-label": label });
  const figure = make("figure", { "data-chart": label }, place, caption ? make("figcaption", {}, caption) : null);
  const style = {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("ink"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 50, r: 12, t: 12, b: 42 },
    showlegend: false,
    hovermode: "closest",
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    dragmode: false,
    ...layout,
  };
  requestAnimationFrame(async () => {
    if (!place.isConnected) return;
    await plotly().newPlot(place, traces, style, DRAWING);
    if (clicked) place.on("plotly_click", (event) => clicked(event.points[0]));
    place.dataset.drawn = "true";
  });
  return figure;
}

/** The components that are attention heads, and the others. */
function headsAndOthers() {
  const all = content.components.names.map((_, j) => j);
  const isHead = (j) => content.components.kinds[j] === "attention head";
  return [all.filter(isHead), all.filter((j) => !isHead(j))].filter((some) => some.length);
}

/** Names of layers by their number, where nothing else differs between them. */
function layerNames(sites) {
  const forms = new Set(sites.map((name) => name.replace(/\d+/, "")));
  return forms.size === 1 && sites.length > 1 && sites.every((name) => /\d/.test(name)) ? sites.map((name) => `layer ${/\d+/.exec(name)[0]}`) : sites;
}

/** Grids of components: one of layers and heads, one of all others; those with too many columns are left out. */
function grids(label, value, caption, marked = null) {
  const groups = headsAndOthers();
  return groups.map((members) => grid(groups.length > 1 ? `${label}, ${content.components.kinds[members[0]]}s` : label, members, value, caption, marked)).filter(Boolean);
}

/** Some components by site (rows) and index (columns), coloured by a value; null where there are too many columns. */
function grid(label, members, value, caption, marked) {
  const { site, index } = content.components;
  const own = [...new Set(members.map((j) => site[j]))].sort((a, b) => a - b);
  const sites = own.map((s) => content.components.sites[s]);
  const width = members.reduce((most, j) => Math.max(most, index[j]), 0) + 1;
  if (width > 512 || sites.length > 80) return null;
  const areHeads = content.components.kinds[members[0]] === "attention head";
  const rows = new Map(own.map((s, i) => [s, i]));
  const cells = sites.map(() => new Array(width).fill(null));
  const names = sites.map(() => new Array(width).fill(""));
  let largest = 0;
  for (const j of members) {
    cells[rows.get(site[j])][index[j]] = value(j);
    names[rows.get(site[j])][index[j]] = inert(content.components.names[j]);
    largest = Math.max(largest, Math.abs(value(j)));
  }
  const heat = {
    type: "heatmap", z: cells, text: names, y: (areHeads ? layerNames(sites) : sites).map(inert), zmin: -largest || -1, zmax: largest || 1, xgap: width < 80 ? 1 : 0, ygap: 1,
    colorscale: diverging(), hovertemplate: "%{text}: %{z:.3f}<extra></extra>", colorbar: { thickness: 10, outlinewidth: 0 },
  };
  const row = marked === null ? undefined : rows.get(site[marked]);
  const frame = row === undefined || !members.includes(marked) ? [] : [{
    type: "rect", x0: index[marked] - 0.5, x1: index[marked] + 0.5, y0: row - 0.5, y1: row + 0.5,
    line: { color: colour("ink"), width: 2.5 },
  }];
  const layout = { xaxis: axis(areHeads ? "head" : "index in the layer", { showgrid: false, zeroline: false }), yaxis: axis("", { autorange: "reversed", showgrid: false, type: "category" }), shapes: frame };
  const at = new Map(members.map((j) => [`${rows.get(site[j])}/${index[j]}`, j]));
  const clicked = (point) => {
    const found = at.get(`${point.pointNumber[0]}/${point.pointNumber[1]}`);
    if (found !== undefined) go(`component/${found}`);
  };
  return chart(label, [heat], layout, { height: Math.max(170, 24 * sites.length + 70), caption, clicked });
}
