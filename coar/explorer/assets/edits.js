// The view of edits: before and after on judging examples, who was harmed, and the commands to use an edit.

function editsView(panel, argument) {
  const { tasks } = content.edits;
  if (!tasks.length) {
    panel.append(make("p", { class: "note" }, "No edit has been written for this run. One is made by:"),
      command(`coar edit ${content.run} --pipeline ${content.pipeline ?? "FILE"} --task forget --label 3`));
    return;
  }
  const [wantedTask, wantedEdit] = (argument ?? "").split("/").map((part) => Number.parseInt(part, 10) || 0);
  const t = Math.min(wantedTask, tasks.length - 1);
  const task = tasks[t];
  const e = Math.min(wantedEdit ?? 0, Math.max(task.edits.length - 1, 0));
  panel.append(make("div", { class: "tools" },
    choice("Task", tasks.map((one, n) => [n, one.name]), t, (value) => go(`edits/${value}/0`)),
    task.edits.length > 1 ? choice("Edit", task.edits.map((one, n) => [n, `${n}: ${plural(one.names.length, "component")}`]), e, (value) => go(`edits/${t}/${value}`)) : null));
  if (task.all > task.edits.length) panel.append(missing(`The page has the first ${task.edits.length} of ${task.all} edits.`));
  const judge = judgeOf(task);
  if (judge && judge.of > judge.before.shape[0]) panel.append(missing(`Charts show ${judge.before.shape[0].toLocaleString("en")} of ${judge.of.toLocaleString("en")} judging examples, evenly spaced; the table is over all.`));
  if (task.table) panel.append(card(`Judged: ${task.name}`, plainTable(task.table, `Table of ${task.name}`)));
  const edit = task.edits[e];
  panel.append(make("div", { class: "pair" }, ...(task.curve ? [curvePart(task)] : []), ...(edit?.after ? [effectOfEdit(edit, judge)] : [])));
  if (!edit) return;
  if (edit.after) panel.append(harmedPart(edit, judge));
  else if (edit.refused) panel.append(missing(`There are no margins of single examples: ${edit.refused}.`));
  else panel.append(missing("Margins of single examples need the model: make the page with --pipeline, of a pipeline with judging examples."));
  panel.append(contentsPart(edit), commandsPart(edit));
}

function curvePart(task) {
  const rows = records(task.curve);
  const groups = [...new Set(rows.map((row) => row.group))];
  const traces = groups.map((group, n) => {
    const own = rows.filter((row) => row.group === group);
    return {
      type: "scatter", mode: "lines", name: inert(group), x: own.map((row) => row.components), y: own.map((row) => 100 * row.accuracy),
      line: { color: colour(["against", "for", "third"][n % 3]), dash: ["solid", "dash", "dot"][n % 3], width: 2.5 }, hovertemplate: "%{x} ablated: %{y:.1f} %<extra></extra>",
    };
  });
  return card("Trade-off", chart(`Accuracy against ablated components in ${task.name}`, traces,
    { xaxis: axis("components ablated"), yaxis: axis("accuracy (%)", { range: [-3, 103] }), showlegend: true },
    { height: 380, caption: "Measured on examples that no choice has seen." }));
}

/** Targets that a goal names by position, and their margins. */
function ownTargets(edit) {
  if (!edit.own) return null;
  const [before, after] = [numbers(edit.own.before), numbers(edit.own.after)];
  const words = edit.own.rows.map((row, k) => {
    const at = content.examples.rows.indexOf(row);
    const name = at >= 0 ? make("a", { href: `#example/${at}` }, nameOf(at)) : `example ${row}`;
    return make("li", {}, name, `: margin ${shown(before[k], 2)} before, ${shown(after[k], 2)} after`);
  });
  return make("div", {}, make("h3", {}, "Its own targets"), make("ul", {}, words));
}

/** The judging examples of a task: an edit that was saved on this page has its own. */
function judgeOf(task) {
  return task.judge ?? content.edits.judge;
}

function judgeName(judge, row) {
  const { metadata: columns } = judge;
  return `${columns.id ? `id ${columns.id[row]}` : `example ${row}`}${columns.label ? `, label ${columns.label[row]}` : ""}`;
}

function effectOfEdit(edit, judge) {
  const before = Array.from(numbers(judge.before));
  const after = Array.from(numbers(edit.after));
  return card("Every judging example", scatterOf("Margins before and after the edit", before, after, (row) => judgeName(judge, row),
    "Measured margins against the runner-up; above 0 the model is right.", ["margin before", "margin after"]), ownTargets(edit));
}

function harmedPart(edit, judge) {
  const before = numbers(judge.before);
  const after = numbers(edit.after);
  const targets = new Set(edit.targets);
  const rows = Array.from(before, (_, i) => i);
  const harmed = rows.filter((i) => before[i] > 0 && after[i] <= 0 && !targets.has(i)).sort((a, b) => after[a] - after[b]);
  const mended = rows.filter((i) => before[i] <= 0 && after[i] > 0 && !targets.has(i));
  const wrongTargets = edit.targets.filter((i) => after[i] <= 0).length;
  const { shown: kept, sheet, words } = judge;
  const face = (i) => {
    const at = kept.indexOf(i);
    if (at < 0) return null;
    return sheet ? picture(sheet, at, 80) : words ? tokens(words[at], { limit: 30 }) : null;
  };
  const one = (i) => make("li", {}, make("div", { class: "like" }, face(i), judgeName(judge, i), make("br"), make("span", { class: "muted" }, `${shown(before[i], 2)} to ${shown(after[i], 2)}`)));
  const list = (title, found) => [make("h3", {}, `${title}: ${found.length}`),
    found.length ? make("ul", { class: `gallery${sheet ? "" : " words"}`, "aria-label": title }, found.slice(0, 24).map(one)) : make("p", { class: "muted" }, "none")];
  return card("Who is harmed", edit.targets.length ? make("p", {}, `${wrongTargets} of ${plural(edit.targets.length, "target")} are wrong after the edit.`) : null,
    list("Others that are right before and wrong after", harmed), list("Others that are wrong before and right after", mended));
}

function contentsPart(edit) {
  const goal = edit.goal ? Object.entries(edit.goal).map(([name, value]) => [name, Array.isArray(value) ? plural(value.length, "position") : String(value)]) : [];
  const columns = [
    { title: "component", text: true, value: (row) => (row.at >= 0 ? componentLink(row.at) : row.name) },
    { title: "strength", value: (row) => shown(row.strength, 2) },
  ];
  const rows = edit.names.map((name, n) => ({ name, strength: edit.strengths[n], at: content.components.names.indexOf(name) }));
  return card("Contents", facts(goal), make("details", {}, make("summary", {}, plural(rows.length, "component")), tableOf(columns, rows, "Components of the edit")));
}

/** Commands and code that use the edit; names of files are quoted for the shell. */
function commandsPart(edit) {
  const quoted = (text) => (/^[\w./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  const python = `coar.Edit.load(${JSON.stringify(edit.file)}).apply(model)`;
  return card("Use it", make("h3", {}, "Apply it to the model, in Python"), command(python),
    edit.weights && edit.undo ? [make("h3", {}, "Undo it, bit for bit"), command(`coar undo ${quoted(edit.weights)} --edit ${quoted(edit.file)} --out original.safetensors`)] : null);
}
