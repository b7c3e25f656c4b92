// The view of one component: its effect over examples, where it is, what excites it, and what is similar.

function componentView(panel, argument) {
  const j = Math.min(Math.max(Number.parseInt(argument, 10) || 0, 0), count.components - 1);
  panel.append(componentTools(j), componentHead(j));
  if (fit) panel.append(make("div", { class: "pair" }, effectPart(j), ...(groupColumns.length ? [groupsPart(j)] : [])), leaningPart(j));
  else panel.append(missing("This run has no fit, so there are no attributions to show; make one with coar fit."));
  panel.append(...[attentionPart(j), excitingPart(j), readingForm(j)].filter(Boolean));
  if (fit) panel.append(similarPart(j), ...[placePart(j)].filter(Boolean));
}

/** Steps to other components, and a field that finds one by name. */
function componentTools(j) {
  const finder = componentField("Component", (found) => go(`component/${found}`));
  return make("div", { class: "tools" }, stepper("component", j, count.components), finder);
}

/** A field with the names of all components; `chosen` gets the index of one. */
function componentField(label, chosen) {
  const names = content.components.names;
  const list = make("datalist", { id: `names-${label.replaceAll(" ", "-")}` }, names.map((name) => make("option", { value: name })));
  const input = make("input", { type: "text", list: list.id, placeholder: names[0], autocomplete: "off" });
  input.addEventListener("change", () => {
    const found = names.indexOf(input.value.trim());
    if (found >= 0) {
      chosen(found);
      input.value = "";
    }
  });
  const made = field(label, input);
  made.append(list);
  return made;
}

function componentHead(j) {
  const { names, kinds, sites, site, index, kernels } = content.components;
  const rows = [["kind", kinds[j]], ["layer", `${sites[site[j]]} (${site[j] + 1} of ${sites.length})`], ["index in the layer", String(index[j])]];
  let words = "";
  if (fit) {
    const own = weightsOn(j);
    const { mean, half } = meanOf(own);
    const size = (k) => weightsOn(k).reduce((sum, value) => sum + Math.abs(value), 0);
    const place = ranked(count.components, sizeOfEach(size)).indexOf(j) + 1;
    words = `Ablating it lowers the output of ${percent(own.filter((value) => value > 0).length / own.length)} of the examples; the mean change over all is ${shown(-mean, 3, { sign: true })}.`;
    rows.push(["mean weight", `${shown(mean, 4, { sign: true })} ± ${shown(half, 4)}`], ["rank by mean magnitude", `${place} of ${count.components}`]);
  }
  const at = kernels ? kernels.components.indexOf(j) : -1;
  const face = at >= 0 ? make("figure", {}, picture(kernels, at, 128, `Kernel of ${names[j]}`), make("figcaption", {}, "its kernel")) : null;
  const add = make("button", { type: "button", on: { click: () => { trial.chosen.add(j); go("whatif"); } } }, "What if it were ablated?");
  return card(names[j], make("div", { class: "profile" }, face, make("div", {}, make("p", { class: "lead" }, words), facts(rows),
    make("p", {}, fit ? add : null))));
}

const sizes = [];

/** Values for every component, computed once. */
function sizeOfEach(size) {
  if (!sizes.length) for (let k = 0; k < count.components; k += 1) sizes.push(size(k));
  return (k) => sizes[k];
}

function effectPart(j) {
  const trace = { type: "histogram", x: Array.from(weightsOn(j)), nbinsx: 40, marker: { color: colour("for"), line: { color: colour("panel"), width: 1 } } };
  const layout = { xaxis: axis("weight"), yaxis: axis("examples"), bargap: 0 };
  return card("Distribution of its effect", chart(`Weights of ${content.components.names[j]} over examples`, [trace], layout,
    { height: 270, caption: "One weight per example; above 0 the component raises that example's output." }));
}

function groupsPart(j) {
  const own = weightsOn(j);
  const place = make("div", {});
  const draw = (column) => {
    const groups = [...groupsBy(column)].map(([value, rows]) => [value, meanOf(rows.map((i) => own[i]))]);
    const trace = {
      type: "scatter", mode: "markers", x: groups.map(([, found]) => found.mean), y: groups.map(([value]) => inert(value)),
      error_x: { type: "data", array: groups.map(([, found]) => found.half), color: colour("muted") },
      marker: { size: 9, color: groups.map(([, found]) => colour(found.mean < 0 ? "against" : "for")) }, hovertemplate: "%{y}: %{x:.3f}<extra></extra>",
    };
    place.replaceChildren(chart(`Mean weight of ${content.components.names[j]} by ${column}`, [trace],
      { xaxis: axis("mean weight"), yaxis: axis(column, { autorange: "reversed", type: "category" }) },
      { height: Math.max(230, 22 * groups.length + 80), caption: "Means over the examples of a group, with 95 % intervals." }));
  };
  draw(groupColumns[0]);
  const picks = groupColumns.length > 1 ? make("div", { class: "tools" }, choice("Group by", groupColumns.map((name) => [name, name]), groupColumns[0], draw)) : null;
  return card("Who leans on it", picks, place);
}

function leaningPart(j) {
  const own = weightsOn(j);
  const best = ranked(count.examples, (i) => own[i]).filter((i) => own[i] > 0).slice(0, 12);
  const worst = ranked(count.examples, (i) => -own[i]).filter((i) => own[i] < 0).slice(0, 12);
  const cards = (rows) => rows.map((i) => exampleCard(i, `weight ${shown(own[i], 3, { sign: true })}`));
  return make("div", { class: "pair" },
    card("Examples that it supports most", gallery(cards(best), "Examples that it supports most")),
    card("Examples that it opposes most", gallery(cards(worst), "Examples that it opposes most")));
}

let excitingPlaces = null;
let excitingValues = null;
let excitingMaps = null;

/** The examples with the largest activations of the component, and where in them. */
function excitingPart(j) {
  const { exciting } = content.components;
  if (!exciting) return null;
  excitingPlaces ??= numbers(exciting.places);
  excitingValues ??= numbers(exciting.values);
  excitingMaps ??= numbers(exciting.maps);
  const top = exciting.values.shape[1];
  const cards = exciting.rows[j]
    .map((row, k) => {
      const at = j * top + k;
      const place = Array.from(excitingPlaces.subarray(4 * at, 4 * at + 4));
      const inPicture = content.examples.sheet && place.every((share) => share >= 0);
      return row < 0 ? null : exampleCard(row, `activation ${shown(excitingValues[at], 2)}`,
        { box: inPicture ? place : null, marked: place[1] === -1 ? place[0] : -1, map: inPicture || place[1] === -1 ? excitingMaps.subarray(CELLS * at, CELLS * (at + 1)) : null });
    })
    .filter(Boolean);
  if (!cards.length) return null;
  const where = content.examples.sheet
    ? " Amber shows where it is active, and the frame is the cell of the feature map with the largest activation; the component sees more around it."
    : content.examples.words ? " The marked token has the largest activation; amber lines show the others." : "";
  return card("What excites it most", make("p", { class: "caption" }, `The examples with its largest activations in the unablated model.${where}`),
    gallery(cards, "Most exciting examples"));
}

const reader = { text: 0 };
let patterns = null;

/** The attention pattern of a head on a chosen text. */
function attentionPart(j) {
  const { attention } = content;
  const h = attention ? attention.heads.indexOf(j) : -1;
  if (h < 0) return null;
  patterns ??= numbers(attention.values);
  const [, heads, side] = attention.values.shape;
  const place = make("div", {});
  const draw = () => {
    const t = reader.text;
    const [length, example] = [attention.lengths[t], attention.examples[t]];
    const words = (content.examples.words?.[example] ?? []).slice(0, length);
    const names = Array.from({ length }, (_, i) => inert((words[i] ?? `token ${i + 1}`).trim().slice(0, 14) || "␣"));
    const rows = names.map((_, q) => Array.from(patterns.subarray(((t * heads + h) * side + q) * side, ((t * heads + h) * side + q) * side + length)));
    const ticks = { tickvals: names.map((_, i) => i), ticktext: names, showgrid: false, zeroline: false };
    const heat = {
      type: "heatmap", z: rows, zmin: 0, zmax: 1, colorscale: rising(), colorbar: { thickness: 10, outlinewidth: 0 },
      text: rows.map((_, q) => names.map((name) => `${names[q]} to ${name}`)), hovertemplate: "%{text}: %{z:.2f}<extra></extra>",
    };
    const drawn = chart(`Attention of ${content.components.names[j]}`, [heat], { xaxis: axis("attended token", { ...ticks, tickangle: -45 }), yaxis: axis("token that attends", { ...ticks, autorange: "reversed" }) },
      { height: Math.max(300, 17 * length + 130), caption: "Each row shows where one token looks; a row adds up to 1 over the whole text." });
    place.replaceChildren(make("p", {}, make("a", { href: `#example/${example}` }, nameOf(example)), ": ", words.length ? tokens(words) : `${length} tokens`), drawn, headsOfLayer(j, t, length));
  };
  draw();
  const texts = attention.examples.map((example, t) => [t, nameOf(example)]);
  return card("Attention pattern", make("div", { class: "tools" }, choice("Text", texts, reader.text, (value) => { reader.text = Number(value); draw(); })), place);
}

/** The patterns of all heads of a layer on a text, each a link to its head. */
function headsOfLayer(j, t, length) {
  const { attention } = content;
  const { site, index, names } = content.components;
  const [, heads, side] = attention.values.shape;
  const own = attention.heads.map((k, h) => [k, h]).filter(([k]) => site[k] === site[j]);
  if (own.length < 2) return null;
  const links = own.map(([k, h]) => {
    const canvas = make("canvas", { class: "pattern", width: length, height: length, "aria-hidden": "true" });
    const pixels = new ImageData(length, length);
    for (let q = 0; q < length; q += 1) {
      for (let i = 0; i < length; i += 1) {
        const share = patterns[((t * heads + h) * side + q) * side + i];
        pixels.data.set([...BLUE, Math.round(255 * share)], 4 * (q * length + i));
      }
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return make("li", {}, make("a", { class: "like", href: `#component/${k}`, "aria-label": names[k], "aria-current": k === j ? "true" : null }, canvas, `head ${index[k]}`));
  });
  return make("div", {}, make("h3", {}, "All heads of this layer"), make("ul", { class: "gallery", "aria-label": "Patterns of all heads of this layer" }, links));
}

function similarPart(j) {
  const own = weightsOn(j);
  const similar = content.components.names.map((_, k) => cosine(own, weightsOn(k)));
  const near = ranked(count.components, (k) => similar[k]).filter((k) => k !== j).slice(0, 10);
  const columns = [
    { title: "component", text: true, value: componentLink },
    { title: "cosine similarity", value: (k) => shown(similar[k]) },
    { title: "mean weight", value: (k) => shown(meanOf(weightsOn(k)).mean, 3, { sign: true }) },
  ];
  return card("Ten most similar components", make("p", { class: "caption" }, "By the cosine similarity of their weights over all examples on the page."),
    tableOf(columns, near, "Most similar components"));
}

function placePart(j) {
  const maps = grids("Mean weight of every component", (k) => meanOf(weightsOn(k)).mean,
    "Mean weights over examples: blue raises outputs, orange lowers them. The frame marks this component.", j);
  return maps.length ? card("Where it is in the model", maps) : null;
}
