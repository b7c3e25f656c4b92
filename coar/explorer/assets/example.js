// The view of one example: its prediction, its strongest components, its layers and its neighbours.

const reading = { strongest: 10 };
const CELLS = 64; // of a map of an example: parts of a picture, or tokens of a text
let inputMaps = null;

function exampleView(panel, argument) {
  const i = Math.min(Math.max(Number.parseInt(argument, 10) || 0, 0), count.examples - 1);
  panel.append(make("div", { class: "tools" }, stepper("example", i, count.examples), make("a", { href: "#examples" }, "All examples")));
  panel.append(exampleHead(i));
  if (!fit) {
    panel.append(missing("This run has no fit, so there are no attributions to show; make one with coar fit."));
    return;
  }
  panel.append(strongestPart(i), choicesPart(i), make("div", { class: "pair" }, removalPart(i), above ? layersPart(i) : null));
  const maps = grids(`Weights of all components on ${nameOf(i)}`, (j) => weightsOf(i)[j],
    "Each cell is a component: blue raises the output of this example, orange lowers it. Click one to open it.");
  if (maps.length) panel.append(card("Where in the model", maps));
  panel.append(neighboursPart(i));
}

function exampleHead(i) {
  const predicted = content.examples.predicted?.[i];
  const rows = [
    ["prediction", predicted === undefined ? null : `${predicted}, with probability ${shown(probability[i])}`],
    ["output of the model", shown(output[i])],
    ["by the fit, all components kept", fit ? shown(full[i]) : null],
    ["held-out correlation", heldOut ? shown(heldOut.pearson[i]) : null],
    ["held-out slope", heldOut ? shown(heldOut.slope[i], 2) : null],
    ...Object.entries(metadata).map(([name, column]) => [name, String(column[i])]),
  ];
  return card(`Example ${content.examples.rows[i]}`, make("div", { class: "profile" }, facesOf(i), make("div", {},
    make("p", { class: "lead" }, verdictSentence(i)), facts(rows))));
}

/** How the example looks, and which parts of it the output depends on, where that is known. */
function facesOf(i) {
  const { inputs, sheet, words } = content.examples;
  if (!inputs || (!sheet && !words)) return look(i, 190);
  inputMaps ??= numbers(inputs);
  const map = inputMaps.subarray(CELLS * i, CELLS * (i + 1));
  const note = "what the output depends on: blue parts raise it, orange parts lower it (gradient times input)";
  if (sheet) {
    const part = (shownMap, caption) => make("figure", { style: { width: "190px" } }, look(i, 190, { map: shownMap, signed: true }), make("figcaption", {}, caption));
    return [part(null, "input"), part(map, note)];
  }
  return make("figure", { class: "text" }, look(i, 190, { map, signed: true }), make("figcaption", {}, `Lines show ${note}.`));
}

/** One sentence on the example, from its label, prediction and strongest components. */
function verdictSentence(i) {
  const predicted = content.examples.predicted?.[i];
  const label = metadata.label?.[i];
  let first = `The model's output is ${shown(output[i], 2)}.`;
  if (predicted !== undefined && label !== undefined) {
    first = predicted === label ? `The model reads this ${label} correctly.` : `The model reads this ${label} as ${predicted}.`;
  }
  if (!fit) return first;
  const own = weightsOf(i);
  const [best] = ranked(count.components, (j) => own[j]);
  const [worst] = ranked(count.components, (j) => -own[j]);
  const names = content.components.names;
  return `${first} ${names[best]} supports the output most (${shown(own[best], 2, { sign: true })}), ${names[worst]} opposes it most (${shown(own[worst], 2, { sign: true })}).`;
}

/** Bars of components with their 95 % intervals; a click opens a component. */
function componentBars(label, chosen, value, half, caption) {
  const names = content.components.names;
  const trace = {
    type: "bar", orientation: "h", y: chosen.map((j) => inert(names[j])), x: chosen.map(value), customdata: chosen,
    marker: { color: chosen.map((j) => colour(value(j) < 0 ? "against" : "for")) }, hovertemplate: "%{y}: %{x:.3f}<extra></extra>",
  };
  if (half) trace.error_x = { type: "data", array: chosen.map(half), color: colour("ink"), thickness: 1.2, width: 3 };
  const layout = { xaxis: axis("weight"), yaxis: axis("", { autorange: "reversed", type: "category" }) };
  return chart(label, [trace], layout, { height: 70 + 19 * chosen.length, caption, clicked: (point) => go(`component/${point.customdata}`) });
}

function strongestPart(i) {
  const own = weightsOf(i);
  const half = errors ? (j) => 1.96 * errorOf(i, j) : null;
  const place = make("div", {});
  const draw = () => {
    const n = Math.min(reading.strongest, Math.floor(count.components / 2));
    const best = ranked(count.components, (j) => own[j]).slice(0, n);
    const worst = ranked(count.components, (j) => -own[j]).slice(0, n).reverse();
    const rows = [...best, ...worst];
    const columns = [
      { title: "component", text: true, value: componentLink },
      { title: "weight", value: (j) => shown(own[j], 3, { sign: true }) },
      ...(half ? [{ title: "95 % interval", value: (j) => `${shown(own[j] - half(j))} to ${shown(own[j] + half(j))}` }] : []),
    ];
    const words = `A weight is the change of the output when the component is kept: blue bars raise the output of this example, orange bars lower it${half ? "; lines are 95 % intervals" : ""}.`;
    place.replaceChildren(
      componentBars(`Strongest components for and against ${nameOf(i)}`, rows, (j) => own[j], half, words),
      make("details", {}, make("summary", {}, "As a table"), tableOf(columns, rows, "Strongest components")),
    );
  };
  draw();
  const tools = make("div", { class: "tools" }, slider("components on each side", { min: 3, max: 30, value: reading.strongest }, (value) => {
    reading.strongest = value;
    draw();
  }));
  return card("Strongest components for and against", tools, place);
}

/** Predicted output as the components that support it most are ablated one after another. */
function removalPart(i) {
  const own = weightsOf(i);
  const order = ranked(count.components, (j) => own[j]).slice(0, 40);
  const predicted = [output[i]];
  order.forEach((j) => predicted.push(predicted.at(-1) - own[j]));
  const turns = predicted.findIndex((value) => value <= 0);
  const margin = content.examples.correct && output[i] > 0;
  const without = `Without its 5 strongest components the predicted output is ${shown(predicted[Math.min(5, order.length)])}.`;
  const flip = margin ? (turns > 0 ? ` It reaches 0 after ${plural(turns, "component")}.` : ` It stays above 0 without ${order.length}.`) : "";
  const trace = { type: "scatter", mode: "lines+markers", y: predicted, marker: { size: 4 }, line: { color: colour("for") }, hovertemplate: "without %{x}: %{y:.3f}<extra></extra>" };
  return card("Without the strongest components", make("p", {}, without + flip),
    chart(`Predicted output of ${nameOf(i)} without its strongest components`, [trace],
      { xaxis: axis("components ablated, the strongest first"), yaxis: axis("predicted output") },
      { height: 280, caption: "The model's output less the weights of the ablated components; a prediction, not a measurement." }));
}

/** Sums of weights above and below 0 in each layer. */
function layersPart(i) {
  const { sites } = content.components;
  const names = layerNames(sites).map(inert);
  const bar = (values, side, title) => ({
    type: "bar", orientation: "h", y: names, x: sites.map((_, s) => values[i * sites.length + s]), name: title, marker: { color: colour(side) },
    hovertemplate: `%{y}: %{x:.3f}<extra>${title}</extra>`,
  });
  const layout = { barmode: "relative", xaxis: axis("sum of weights"), yaxis: axis("", { autorange: "reversed", type: "category" }), showlegend: true };
  return card("Layer by layer", chart(`Sums of weights by layer on ${nameOf(i)}`, [bar(above, "for", "for"), bar(below, "against", "against")], layout,
    { height: Math.max(230, 20 * sites.length + 90), caption: "Sums over all components of a layer, in the order of the model." }));
}

const RIVALS = 10; // single components whose ablation is predicted

/** Each of the strongest components alone: what its ablation is predicted to do here, and to all other examples. */
function choicesPart(i) {
  const place = make("div", {});
  const draw = (side) => {
    const own = weightsOf(i);
    const sign = side === "against" ? -1 : 1;
    const chosen = ranked(count.components, (j) => sign * own[j]).slice(0, RIVALS).filter((j) => sign * own[j] > 0);
    const others = content.examples.rows.map((_, k) => k).filter((k) => k !== i);
    const rows = chosen.map((j) => {
      const change = weightsOn(j).map((weight) => -weight);
      const falls = others.filter((k) => output[k] > 0 && output[k] + change[k] <= 0).length;
      const rises = others.filter((k) => output[k] <= 0 && output[k] + change[k] > 0).length;
      return { j, here: output[i] + change[i], falls, rises, mean: meanOf(change).mean, worst: groupColumns.length ? mostHarmed(change) : null };
    });
    const add = (j) => make("button", { type: "button", "aria-label": `What if ${content.components.names[j]} were ablated?`, on: { click: () => { trial.chosen = new Set([j]); trial.warning = ""; go("whatif"); } } }, "What if?");
    const columns = [
      { title: "without", text: true, value: (row) => componentLink(row.j) },
      { title: "output here", value: (row) => shown(row.here, 2, { sign: true }) },
      { title: "fall below 0", value: (row) => String(row.falls) },
      { title: "rise above 0", value: (row) => String(row.rises) },
      { title: "mean change", value: (row) => shown(row.mean, 2, { sign: true }) },
      ...(groupColumns.length ? [{ title: `most harmed ${groupColumns[0]}`, text: true, value: (row) => row.worst }] : []),
      { title: "", text: true, value: (row) => add(row.j) },
    ];
    place.replaceChildren(tableOf(columns, rows, "Predictions without one component"));
  };
  const side = output[i] > 0 ? "for" : "against";
  draw(side);
  return card("Which one would you remove?", make("p", { class: "caption" }, `The predicted output of this example, ${shown(output[i], 2)} now, without one component, and what its ablation would do to the others: how many fall below 0 or rise above it.`),
    make("div", { class: "tools" }, choice("components that are", [["against", "against this output"], ["for", "for this output"]], side, draw)), place);
}

/** The group whose mean output falls most, with that change. */
function mostHarmed(change) {
  const means = [...groupsBy(groupColumns[0])].map(([value, rows]) => [value, meanOf(rows.map((k) => change[k])).mean]);
  const [value, mean] = means.reduce((a, b) => (b[1] < a[1] ? b : a));
  return mean < 0 ? `${value} (${shown(mean, 2, { sign: true })})` : "none";
}

function neighboursPart(i) {
  const own = weightsOf(i);
  const similar = content.examples.rows.map((_, k) => cosine(own, weightsOf(k)));
  const near = ranked(count.examples, (k) => similar[k]).filter((k) => k !== i).slice(0, 12);
  return card("Nearest examples by attribution", make("p", { class: "caption" }, "The examples whose weights have the largest cosine similarity with these."),
    gallery(near.map((k) => exampleCard(k, `cosine ${shown(similar[k], 2)}`)), "Nearest examples"));
}
