// The views of circuits, traces and lenses, where the reports folders have some.

const PORTS = { q: ["queries", "for"], k: ["keys", "against"], v: ["values", "third"], "": ["MLP and output", "muted"] };
const DRAWN = 150; // most edges of a drawing
const LISTED = 400; // most edges of a table

/** The writer, the node that reads, and the port of an edge such as `L0.H1 -> L2.H3.q`. */
function edgeOf(name) {
  const [writer, reader] = name.split(" -> ");
  const port = /\.[qkv]$/.test(reader ?? "") ? reader.slice(-1) : "";
  return { name, writer, reader: port ? reader.slice(0, -2) : reader, port };
}

/** The row of a node in a drawing: the embedding, then heads and MLP of every layer, then the output. */
function rowOf(label) {
  const layer = /^L(\d+)\.(\w)/.exec(label);
  if (!layer) return label === "embed" ? -1 : 1e6;
  return 2 * Number(layer[1]) + (layer[2] === "m" ? 1 : 0);
}

function circuitsView(panel, argument) {
  const all = content.circuits;
  const [first, ...rest] = (argument ?? "").split("/");
  const c = Math.min(Number.parseInt(first, 10) || 0, all.length - 1);
  const circuit = all[c];
  const picked = rest.join("/");
  panel.append(make("p", { class: "lead" }, "A circuit is a sparse set of edges that computes what the whole model computes on its task; all other edges carry replacements."));
  panel.append(make("div", { class: "tools" }, choice("Circuit", all.map((one, n) => [n, `${one.name}, ${plural(one.edges.length, one.table === "nodes" ? "node" : "edge")}`]), c, (value) => go(`circuits/${value}`))));
  if (!circuit.own) panel.append(missing("This circuit was found in a model with other weights than those of the run on this page."));
  const nodes = new Set(circuit.edges.map((name) => edgeOf(name).writer));
  panel.append(card(circuit.name, facts([["edges", `${circuit.edges.length} of ${circuit.size.toLocaleString("en")} ${circuit.table}`], ["nodes that write", String(nodes.size)],
    ["found by", circuit.method], ["ablation of the others", circuit.ablation], ["file", circuit.file]])));
  if (circuit.table !== "nodes") panel.append(circuit.edges.length <= DRAWN ? drawingPart(circuit, c, picked) : layersOfEdges(circuit));
  panel.append(edgesPart(circuit, picked));
  if (circuit.judged) panel.append(sizesPart(circuit.judged));
  const python = `circuit = coar.Circuit.load(${JSON.stringify(circuit.file)})\nwith circuit.applied(model):\n    logits = model(tokens).logits`;
  panel.append(card("Use it", command(python)));
}

/** Places of nodes: layers from below to above, the nodes of a row spread evenly; nodes alone are not on one line. */
function placesOf(labels) {
  const rows = new Map();
  for (const label of labels) rows.set(rowOf(label), [...(rows.get(rowOf(label)) ?? []), label]);
  const ordered = [...rows].sort(([a], [b]) => a - b);
  const numeric = new Intl.Collator("en", { numeric: true }).compare;
  const aside = (own, y) => (own.length === 1 ? 0.05 * ((y % 3) - 1) : 0);
  return new Map(ordered.flatMap(([, own], y) => own.sort(numeric).map((label, i) => [label, [(i + 0.5) / own.length + aside(own, y), y]])));
}

function drawingPart(circuit, c, picked) {
  const edges = circuit.edges.map(edgeOf);
  const places = placesOf(new Set(edges.flatMap((edge) => [edge.writer, edge.reader])));
  const touched = (edge) => !places.has(picked) || edge.writer === picked || edge.reader === picked;
  const lines = Object.entries(PORTS).map(([port, [title, side]]) => {
    const own = edges.filter((edge) => edge.port === port && touched(edge));
    const along = (axisNumber) => own.flatMap((edge) => [places.get(edge.writer)[axisNumber], places.get(edge.reader)[axisNumber], null]);
    return { type: "scatter", mode: "lines", name: title, x: along(0), y: along(1), line: { color: colour(side), width: 1.6 }, opacity: 0.75, hoverinfo: "skip" };
  }).filter((line) => line.x.length);
  const labels = [...places.keys()];
  const near = new Set(edges.filter(touched).flatMap((edge) => [edge.writer, edge.reader]));
  const sum = (label, end) => edges.filter((edge) => edge[end] === label).length;
  const marks = {
    type: "scatter", mode: "markers", showlegend: false, x: labels.map((label) => places.get(label)[0]), y: labels.map((label) => places.get(label)[1]),
    text: labels, customdata: labels, marker: { symbol: "square", size: 30, opacity: 0 },
    hovertext: labels.map((label) => `${inert(label)}: ${sum(label, "reader")} in, ${sum(label, "writer")} out`), hoverinfo: "text",
  };
  const boxes = labels.map((label) => ({
    x: places.get(label)[0], y: places.get(label)[1], text: inert(label), showarrow: false, borderpad: 4, bgcolor: colour("panel"), font: { size: 11, color: colour(near.has(label) ? "ink" : "muted") },
    bordercolor: colour(label === picked ? "accent" : near.has(label) ? "muted" : "line"), borderwidth: label === picked ? 2.5 : 1,
  }));
  const rows = new Set(labels.map((label) => places.get(label)[1])).size;
  const hidden = { visible: false, fixedrange: true };
  const layout = { xaxis: { ...hidden, range: [0, 1] }, yaxis: { ...hidden, range: [-0.6, rows - 0.4] }, annotations: boxes, showlegend: true, margin: { l: 8, r: 8, t: 30, b: 8 } };
  const drawn = chart(`Drawing of ${circuit.name}`, [...lines, marks], layout, {
    height: Math.max(300, 46 * rows + 40), caption: "From the embedding below to the output above. Colours show what an edge is read as. Choose a node to see its edges alone.",
    clicked: (point) => point.customdata && go(`circuits/${c}/${point.customdata === picked ? "" : point.customdata}`),
  });
  const node = choice("Edges of", [["", "all nodes"], ...labels.map((label) => [label, label])], picked, (value) => go(`circuits/${c}/${value}`));
  return card("Drawing", make("div", { class: "tools" }, node), drawn);
}

/** How many edges go from each layer into each, for circuits with too many to draw. */
function layersOfEdges(circuit) {
  const layer = (label) => /^L\d+/.exec(label)?.[0] ?? label;
  const edges = circuit.edges.map(edgeOf);
  const order = (names) => [...new Set(names)].sort((a, b) => rowOf(`${a}.H`) - rowOf(`${b}.H`) || rowOf(a) - rowOf(b));
  const [writers, readers] = [order(edges.map((edge) => layer(edge.writer))), order(edges.map((edge) => layer(edge.reader)))];
  const cells = readers.map((reader) => writers.map((writer) => edges.filter((edge) => layer(edge.reader) === reader && layer(edge.writer) === writer).length || null));
  const heat = { type: "heatmap", x: writers, y: readers, z: cells, colorscale: rising(), xgap: 1, ygap: 1, colorbar: { thickness: 10, outlinewidth: 0 }, hovertemplate: "%{x} to %{y}: %{z} edges<extra></extra>" };
  return card("Edges between layers", chart(`Edges between layers of ${circuit.name}`, [heat], { xaxis: axis("from", { type: "category" }), yaxis: axis("into", { type: "category" }) },
    { height: Math.max(260, 20 * readers.length + 90), caption: `A drawing shows up to ${DRAWN} edges; this circuit has ${circuit.edges.length}.` }));
}

function edgesPart(circuit, picked) {
  const edges = circuit.edges.map(edgeOf).filter((edge) => !picked || edge.writer === picked || edge.reader === picked);
  const columns = [{ title: "from", text: true, value: (edge) => edge.writer }, { title: "into", text: true, value: (edge) => edge.reader ?? "all readers" },
    { title: "as", text: true, value: (edge) => (edge.reader ? PORTS[edge.port][0] : "") }];
  const more = edges.length > LISTED ? make("p", { class: "caption" }, `The first ${LISTED} of ${edges.length}.`) : null;
  return card(picked ? `Edges of ${picked}` : "All edges", make("details", { open: edges.length <= 20 }, make("summary", {}, plural(edges.length, "edge")), tableOf(columns, edges.slice(0, LISTED), "Edges of the circuit"), more));
}

function sizesPart(judged) {
  const rows = records(judged);
  const methods = [...new Set(rows.map((row) => row.method))];
  const traces = methods.map((method, n) => {
    const { color, dash, symbol } = fitStyle(n);
    const own = rows.filter((row) => row.method === method).sort((a, b) => a.edges - b.edges);
    return { type: "scatter", mode: "lines+markers", name: inert(method), x: own.map((row) => row.edges), y: own.map((row) => row.kl), line: { color, dash }, marker: { color, symbol, size: 9 } };
  });
  const layout = { xaxis: axis("edges of the circuit", { type: "log" }), yaxis: axis("held-out KL divergence (nats)", { type: "log", dtick: "D2" }), showlegend: true };
  return card("How faithful", chart("Divergence by the number of edges", traces, layout, { height: 340, caption: "Divergence of the circuit's next token from the model's, on prompts that no step has seen; lower is better." }),
    plainTable(judged, "Judged circuits"));
}

function tracesView(panel, argument) {
  const all = content.traces;
  const t = Math.min(Number.parseInt(argument, 10) || 0, all.length - 1);
  const rows = records(all[t].table);
  panel.append(make("p", { class: "lead" }, "Where does the model recall facts? The subject is corrupted, then the clean state of one part is restored. A cell is the share of the lost probability of the answer that comes back."));
  panel.append(make("div", { class: "tools" }, choice("Corruption", all.map((one, n) => [n, all.filter((other) => other.corruption === one.corruption).length > 1 ? one.file : one.corruption]), t, (value) => go(`traces/${value}`))));
  const name = (row) => `${row.kind}${row.window > 1 ? ` × ${row.window}` : ""}, ${String(row.place).replaceAll("_", " ")}`;
  const places = [...new Set(rows.map(name))];
  const layers = [...new Set(rows.map((row) => row.layer))].sort((a, b) => a - b);
  const at = new Map(rows.map((row) => [`${name(row)}/${row.layer}`, row]));
  const found = places.map((place) => layers.map((layer) => at.get(`${place}/${layer}`)));
  const heat = {
    type: "heatmap", x: layers, y: places.map(inert), z: found.map((line) => line.map((row) => row?.aie ?? null)), zmin: 0, colorscale: rising(), xgap: 1, ygap: 1, colorbar: { thickness: 10, outlinewidth: 0 },
    text: found.map((line) => line.map((row) => (row ? `${shown(row.aie)} (${shown(row.low)} to ${shown(row.high)})` : ""))), hovertemplate: "%{y}, layer %{x}: %{text}<extra></extra>",
  };
  panel.append(card("Average indirect effect", chart("Average indirect effect by layer", [heat], { xaxis: axis("layer", { type: "category", showgrid: false }), yaxis: axis("", { type: "category", autorange: "reversed", showgrid: false }) },
    { height: Math.max(240, 34 * places.length + 80), caption: `1: the part brings the fact back entirely; 0: it brings back nothing. From ${all[t].file}.` })));
  const best = found.map((line) => line.filter(Boolean).reduce((a, b) => (b.aie > a.aie ? b : a)));
  const columns = [{ title: "restored", text: true, value: name }, { title: "best layer", value: (row) => String(row.layer) }, { title: "effect", value: (row) => shown(row.aie) },
    { title: "95 % interval", value: (row) => `${shown(row.low)} to ${shown(row.high)}` }];
  panel.append(card("Best layers", tableOf(columns, best, "Best layers")));
}

function lensesView(panel, argument) {
  const all = content.lenses;
  const [first, wanted] = (argument ?? "").split("/");
  const l = Math.min(Number.parseInt(first, 10) || 0, all.length - 1);
  const { file, table, readings } = all[l];
  panel.append(make("p", { class: "lead" }, "What does the model already know at each layer? A lens reads the residual stream before a layer as a prediction of the next token."));
  if (all.length > 1) panel.append(make("div", { class: "tools" }, choice("Lenses", all.map((one, n) => [n, one.file]), l, (value) => go(`lenses/${value}`))));
  const kinds = Object.keys(readings);
  if (kinds.length) panel.append(readingPart(readings, kinds.includes(wanted) ? wanted : kinds[0], (kind) => go(`lenses/${l}/${kind}`)));
  const rows = records(table);
  const traces = [...new Set(rows.map((row) => row.kind))].map((kind, n) => {
    const { color, dash, symbol } = fitStyle(n);
    const own = rows.filter((row) => row.kind === kind).sort((a, b) => a.layer - b.layer);
    const interval = { type: "data", symmetric: false, array: own.map((row) => row.high - row.kl), arrayminus: own.map((row) => row.kl - row.low), color };
    return { type: "scatter", mode: "lines+markers", name: inert(kind), x: own.map((row) => row.layer), y: own.map((row) => row.kl), error_y: interval, line: { color, dash }, marker: { color, symbol, size: 7 } };
  });
  panel.append(card("How far from the model", chart("Divergence of lenses by layer", traces, { xaxis: axis("before layer", { zeroline: false }), yaxis: axis("KL(model || lens) in nats", { type: "log", dtick: "D2" }), showlegend: true },
    { height: 340, caption: `On held-out texts, with 95 % intervals over texts; lower is better. From ${file}.` })));
}

/** The most probable next token at every layer and token of a text. */
function readingPart(readings, kind, chosen) {
  const rows = records(readings[kind]);
  const layers = [...new Set(rows.map((row) => row.layer))];
  const positions = [...new Set(rows.map((row) => row.position))];
  const given = new Map(rows.map((row) => [row.position, String(row.token)]));
  const of = (layer, position) => rows.filter((row) => row.layer === layer && row.position === position).sort((a, b) => a.rank - b.rank);
  const cells = layers.map((layer) => positions.map((position) => of(layer, position)));
  const short = (text) => inert(JSON.stringify(String(text)).slice(1, -1).trim() || "␣").slice(0, 12);
  const heat = {
    type: "heatmap", x: positions, y: layers.map(String), z: cells.map((line) => line.map((found) => found[0].probability)), zmin: 0, zmax: 1, colorscale: rising(), xgap: 1, ygap: 1,
    text: cells.map((line) => line.map((found) => short(found[0].prediction))), texttemplate: "%{text}", textfont: { size: 10 }, colorbar: { thickness: 10, outlinewidth: 0 },
    customdata: cells.map((line) => line.map((found) => found.map((row) => `${inert(JSON.stringify(String(row.prediction)))} ${shown(row.probability)}`).join("<br>"))),
    hovertemplate: "before layer %{y}<br>%{customdata}<extra></extra>",
  };
  const layout = { xaxis: axis("token read", { showgrid: false, tickvals: positions, ticktext: positions.map((position) => short(given.get(position))), tickangle: -45 }), yaxis: axis("before layer", { type: "category", showgrid: false }) };
  const drawn = chart("Most probable next tokens", [heat], layout, { height: 22 * layers.length + 110, caption: "Colour: probability of the most probable next token, which is in the cell. The top row is the model itself." });
  drawn.firstChild.style.minWidth = `${62 * positions.length + 140}px`;
  const wide = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Most probable next tokens, by layer" }, drawn);
  return card("What each layer predicts", make("div", { class: "tools" }, choice("Lens", Object.keys(readings).map((one) => [one, one]), kind, chosen)), wide);
}
