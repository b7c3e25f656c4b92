// The view of all examples: a gallery, sorted and filtered.

const browsing = { sort: "position", descending: false, verdict: "all", groups: {}, least: -1, words: "", limit: 120 };

/** What examples can be sorted by: title and value of each key. */
function sortKeys() {
  const keys = { position: ["position", (i) => content.examples.rows[i]], output: ["output of the model", (i) => output[i]] };
  if (heldOut) keys.pearson = ["held-out correlation", (i) => heldOut.pearson[i]];
  if (probability) keys.probability = ["probability of the prediction", (i) => probability[i]];
  for (const name of Object.keys(metadata)) keys[`column ${name}`] = [name, (i) => metadata[name][i]];
  return keys;
}

/** The examples that pass all filters, in order. */
function browsed() {
  const [, value] = sortKeys()[browsing.sort];
  const sought = browsing.words.trim().toLowerCase();
  const text = (i) => [...Object.values(metadata).map((column) => column[i]), ...(content.examples.words?.[i] ?? [])].join(" ").toLowerCase();
  const kept = content.examples.rows
    .map((_, i) => i)
    .filter((i) => browsing.verdict === "all" || (isRight(i) ?? output[i] > 0) === (browsing.verdict === "right"))
    .filter((i) => Object.entries(browsing.groups).every(([name, wanted]) => wanted === "" || String(metadata[name][i]) === wanted))
    .filter((i) => browsing.least <= -1 || heldOut.pearson[i] >= browsing.least)
    .filter((i) => !sought || text(i).includes(sought));
  const compare = (a, b) => (value(a) > value(b)) - (value(a) < value(b)) || a - b;
  return kept.sort((a, b) => (browsing.descending ? compare(b, a) : compare(a, b)));
}

function examplesView(panel) {
  const found = make("div", {});
  const total = make("p", { "aria-live": "polite", class: "muted", id: "found" });
  const draw = () => {
    const rows = browsed();
    const part = rows.slice(0, browsing.limit);
    total.textContent = `${rows.length.toLocaleString("en")} of ${plural(count.examples, "example")}`;
    const note = (i) => [`output ${shown(output[i], 2)}`, ...(heldOut ? [`fit r ${shown(heldOut.pearson[i], 2)}`] : [])];
    const { sheet, words } = content.examples;
    const list = sheet || words ? gallery(part.map((i) => exampleCard(i, note(i))), "Examples") : examplesTable(part);
    const more = make("button", { type: "button", on: { click: () => { browsing.limit += 240; draw(); } } }, `Show more of ${rows.length}`);
    found.replaceChildren(list, ...(rows.length > part.length ? [more] : []));
  };
  panel.append(welcome(), examplesTools(draw), total, found);
  draw();
}

/** What the page answers, and where to begin. */
function welcome() {
  const wrong = content.examples.rows.filter((_, i) => isRight(i) === false).length;
  const begin = wrong && browsing.verdict !== "wrong"
    ? make("button", { type: "button", class: "strong", on: { click: () => { browsing.verdict = "wrong"; draw(); } } }, `Show the ${wrong} that the model gets wrong`)
    : null;
  const what = `Which of the model's ${count.components.toLocaleString("en")} components made each prediction, and what would happen without them? Choose an example to see.`;
  const read = `Each card has the model's output${heldOut ? " and fit r, the correlation of predicted and measured outputs of this example under held-out masks" : ""}.`;
  return make("div", { class: "welcome" }, make("div", {}, make("p", { class: "lead" }, what), make("p", { class: "muted" }, read)), begin);
}

function examplesTools(draw) {
  const set = (name, value) => { browsing[name] = value; browsing.limit = 120; draw(); };
  const keys = Object.entries(sortKeys()).map(([key, [title]]) => [key, title]);
  const known = content.examples.correct;
  const verdicts = known
    ? [["all", "all"], ["right", "right ✓"], ["wrong", "wrong ✗"]]
    : [["all", "all"], ["right", "output above 0"], ["wrong", "output up to 0"]];
  const groups = groupColumns.map((name) =>
    choice(name, [["", "all"], ...[...groupsBy(name).keys()].map((value) => [value, value])], browsing.groups[name] ?? "", (value) => {
      set("groups", { ...browsing.groups, [name]: value });
    }),
  );
  const order = make("button", { type: "button", "aria-pressed": String(browsing.descending) }, browsing.descending ? "Largest first" : "Smallest first");
  order.addEventListener("click", () => {
    set("descending", !browsing.descending);
    order.textContent = browsing.descending ? "Largest first" : "Smallest first";
    order.setAttribute("aria-pressed", String(browsing.descending));
  });
  const search = make("input", { type: "search", value: browsing.words, on: { input: (event) => set("words", event.target.value) } });
  const quality = heldOut
    ? slider("held-out correlation at least", { min: -1, max: 1, step: 0.05, value: browsing.least }, (value) => set("least", value))
    : null;
  return make("form", { class: "card tools", "aria-label": "Sort and filter", on: { submit: (event) => event.preventDefault() } },
    choice("Sort by", keys, browsing.sort, (value) => set("sort", value)), order,
    choice("Show", verdicts, browsing.verdict, (value) => set("verdict", value)), groups, quality,
    field("Search", search));
}

/** Examples without a look, as a table. */
function examplesTable(rows) {
  const link = (i) => make("a", { href: `#example/${i}`, "data-example": i }, nameOf(i));
  const columns = [
    { title: "example", text: true, value: link },
    ...Object.keys(metadata).filter((name) => name !== "id").map((name) => ({
      title: name, text: typeof metadata[name][0] === "string", value: (i) => String(metadata[name][i]),
    })),
    { title: "output", value: (i) => shown(output[i]) },
    ...(heldOut ? [{ title: "held-out correlation", value: (i) => shown(heldOut.pearson[i]) }] : []),
  ];
  return make("div", { class: "card" }, tableOf(columns, rows, "Examples"));
}
