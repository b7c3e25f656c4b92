// The view of predictions: components are chosen, and the outputs without them are predicted.

const trial = { chosen: new Set(), warning: "", strongest: 10, group: "all", direction: "for" };

function whatifView(panel) {
  if (!fit) {
    panel.append(missing("This run has no fit, so nothing can be predicted; make one with coar fit."));
    return;
  }
  const result = make("div", { class: "panel", id: "predicted", "aria-live": "polite" });
  const chosen = make("div", {});
  const draw = () => {
    chosen.replaceChildren(chosenPart(draw));
    result.replaceChildren(...(trial.chosen.size ? predictedParts([...trial.chosen]) : [make("p", { class: "note" }, "Choose components above: the predicted outputs of all examples without them appear here.")]));
  };
  panel.append(make("p", { class: "lead" }, "Which examples change if these components are ablated? Choose some, by hand or by rule."), trialTools(draw), chosen, trustPart(), result);
  draw();
}

/** Ways to choose: by name, by layer, by strength on a group, or as an edit does. */
function trialTools(draw) {
  const add = (components, warning = "") => {
    components.forEach((j) => trial.chosen.add(j));
    trial.warning = warning;
    draw();
  };
  const { sites, site } = content.components;
  const layers = [["", "choose"], ...sites.map((name, s) => [s, name])];
  const ofLayer = (value) => value !== "" && add(site.flatMap((s, j) => (s === Number(value) ? [j] : [])));
  const targets = [["all", "all examples"], ...(content.examples.correct ? [["wrong", "wrong examples"]] : []),
    ...groupColumns.flatMap((name) => [...groupsBy(name).keys()].map((value) => [`${name}=${value}`, `${name} ${value}`]))];
  const number = make("input", { type: "number", min: 1, max: count.components, value: trial.strongest, on: { change: (event) => (trial.strongest = Number(event.target.value)) } });
  const strongest = make("button", { type: "button", class: "strong", on: { click: () => add(strongestOn(trial.group, trial.direction, trial.strongest)) } }, "Add strongest");
  const edits = content.edits.tasks.flatMap((task) => task.edits.map((edit, n) => ({ edit, title: task.all > 1 ? `${task.name} ${n}` : task.name })));
  const chooseEdit = edits.length
    ? choice("An edit", [["", "choose"], ...edits.map(({ title }, n) => [n, title])], "", (value) => value !== "" && addEdit(edits[Number(value)].edit, add))
    : null;
  return make("div", { class: "card tools" },
    componentField("By name", (j) => add([j])), choice("A layer", layers, "", ofLayer), chooseEdit,
    field("Strongest", number),
    choice("for or against", [["for", "for"], ["against", "against"]], trial.direction, (value) => (trial.direction = value)),
    choice("the output of", targets, trial.group, (value) => (trial.group = value)), strongest,
    make("button", { type: "button", on: { click: () => { trial.chosen.clear(); trial.warning = ""; draw(); } } }, "Clear"));
}

/** Choose what an edit ablates, with a warning where the edit does more than the prediction covers. */
function addEdit(edit, add) {
  trial.chosen.clear();
  const warnings = [];
  if (edit.strengths.some((strength) => strength < 1)) warnings.push("this edit ablates in part, and the prediction is for full ablation");
  if (edit.own_constants) warnings.push("this edit has constants of its own, and the prediction is for the run's");
  const left = edit.names.length - edit.components.length;
  if (left) warnings.push(`${plural(left, "component")} of it are not on this page, and not in the prediction`);
  add(edit.components, warnings.join("; "));
}

/** The components with the largest mean weight, or the smallest, over a group of examples. */
function strongestOn(group, direction, number) {
  const [column, value] = group.split(/=(.*)/s);
  const rows = content.examples.rows.map((_, i) => i).filter((i) => {
    if (group === "all") return true;
    return group === "wrong" ? isRight(i) === false : String(metadata[column][i]) === value;
  });
  const sums = new Float64Array(count.components);
  for (const i of rows) weightsOf(i).forEach((weight, j) => (sums[j] += weight));
  const sign = direction === "for" ? 1 : -1;
  return ranked(count.components, (j) => sign * sums[j]).slice(0, number);
}

function chosenPart(draw) {
  const names = content.components.names;
  const drop = (j) => { trial.chosen.delete(j); draw(); };
  const chips = [...trial.chosen].map((j) => make("li", {}, make("button", { type: "button", "aria-label": `Keep ${names[j]}`, on: { click: () => drop(j) } }, `${names[j]} ×`)));
  const share = trial.chosen.size / content.components.of;
  const far = share > 2 * fit.fraction;
  return make("div", { class: "card" }, make("h2", {}, `${plural(trial.chosen.size, "component")} ablated`),
    make("p", { class: "caption" }, `${percent(share)} of all; the run's masks ablate ${percent(fit.fraction)}.`),
    make("ul", { class: "chips", "aria-label": "Ablated components" }, chips),
    far ? missing(`More than twice as many components as in the run's masks are ablated, so the linear prediction is unreliable here.`) : null,
    trial.warning ? missing(`Careful: ${trial.warning}.`) : null);
}

/** How far predictions can be trusted: scores on masks that no fit has seen. */
function trustPart() {
  const row = heldOutRow();
  if (!row) return missing("The run has no evaluation of this fit, so nothing says how good these predictions are; collect test masks.");
  return make("p", { class: "note", id: "trust" },
    `How far to trust this: on ${plural(row.test_masks, "held-out mask")} that ablate ${percent(row.ablated_fraction)} at random, predictions and outputs correlate with r = ${shown(row.pearson)} `,
    `(95 % interval ${shown(row.low)} to ${shown(row.high)}) and the slope is ${shown(row.slope, 2)}. `,
    "Chosen components interact more than random ones, so judge an edit by the model itself.");
}

function predictedParts(chosen) {
  const { change, half } = predictedChange(chosen);
  const after = Array.from(output, (value, i) => value + change[i]);
  return [
    make("div", { class: "card big" }, bigNumbers(change, after)),
    ...(live ? [measuredPart(chosen, change)] : []),
    make("div", { class: "pair" }, beforeAfterPart(after, half), predictedGroups(change, after)),
    movedPart(change, after),
  ];
}

function bigNumbers(change, after) {
  const { mean } = meanOf(change);
  const above0 = (values) => Array.from(values).filter((value) => value > 0).length / count.examples;
  const number = (title, value) => make("div", {}, make("strong", {}, value), title);
  return [
    number("predicted mean change of the output", shown(mean, 3, { sign: true })),
    number("examples with output above 0, before", percent(above0(output))),
    number("examples with output above 0, predicted", percent(above0(after))),
  ];
}

/** Outputs before against predicted outputs after. */
function scatterOf(label, before, after, text, caption, titles, clicked = null, half = null) {
  const low = Math.min(...before, ...after);
  const high = Math.max(...before, ...after);
  const crossed = before.map((value, i) => (value > 0) !== (after[i] > 0));
  const trace = (title, keep, side, symbol) => {
    const rows = before.map((_, i) => i).filter(keep);
    return {
      type: "scatter", mode: "markers", name: title, x: rows.map((i) => before[i]), y: rows.map((i) => after[i]), text: rows.map((i) => inert(text(i))), customdata: rows,
      marker: { color: colour(side), symbol, size: 7, opacity: 0.75 }, hovertemplate: "%{text}: %{x:.2f} to %{y:.2f}<extra></extra>",
      error_y: half ? { type: "data", array: rows.map((i) => half[i]), color: colour("muted"), thickness: 1, width: 0 } : undefined,
    };
  };
  const traces = [
    trace("stays on its side of 0", (i) => !crossed[i], "for", "circle"),
    trace("falls below 0", (i) => crossed[i] && after[i] <= 0, "against", "x"),
    trace("rises above 0", (i) => crossed[i] && after[i] > 0, "third", "diamond"),
  ];
  const line = { type: "line", x0: low, y0: low, x1: high, y1: high, line: { color: colour("muted"), width: 1, dash: "dot" } };
  return chart(label, traces, { xaxis: axis(titles[0]), yaxis: axis(titles[1]), shapes: [line], showlegend: true },
    { height: 380, caption, clicked: clicked && ((point) => clicked(point.customdata)) });
}

function beforeAfterPart(after, half) {
  const words = half ? " Lines are 95 % intervals from the errors of the weights alone." : "";
  return card("Every example", scatterOf("Outputs before and predicted outputs after", Array.from(output), after, nameOf,
    `Each mark is an example. On the dotted line nothing changes.${words}`, ["output of the model", "predicted output"], (i) => go(`example/${i}`), half));
}

function predictedGroups(change, after) {
  const column = groupColumns[0];
  const groups = column ? [...groupsBy(column)] : [["all", content.examples.rows.map((_, i) => i)]];
  const share = (rows, values) => rows.filter((i) => values[i] > 0).length / rows.length;
  const rows = groups.map(([value, members]) => ({ value, members, ...meanOf(members.map((i) => change[i])) }));
  const columns = [
    { title: column ?? "group", text: true, value: (row) => String(row.value) },
    { title: "examples", value: (row) => String(row.n) },
    { title: "mean change", value: (row) => shown(row.mean, 3, { sign: true }) },
    { title: "±", value: (row) => shown(row.half) },
    { title: "above 0", value: (row) => percent(share(row.members, output)) },
    { title: "predicted", value: (row) => percent(share(row.members, after)) },
  ];
  return card(column ? `By ${column}` : "All examples", tableOf(columns, rows, "Predicted change by group"),
    make("p", { class: "caption" }, "Predicted mean change of the output, with the 95 % interval of a mean over examples, and the share of examples with an output above 0 before and by prediction."));
}

function movedPart(change, after) {
  const cards = (rows) => rows.map((i) => exampleCard(i, `${shown(output[i], 2)} to ${shown(after[i], 2)}`));
  return make("div", { class: "pair" },
    card("Falls most", gallery(cards(ranked(count.examples, (i) => -change[i]).slice(0, 12)), "Examples that fall most")),
    card("Rises most", gallery(cards(ranked(count.examples, (i) => change[i]).slice(0, 12)), "Examples that rise most")));
}
