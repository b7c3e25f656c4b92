// Requests to the model, where the page is served by coar explore: measure, judge and save what is chosen.

const live = Boolean(content.live);

/** Ask the server; throw an error with its reason when it refuses. */
async function ask(path, given) {
  const response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(given) });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

/** A button that asks the server and shows the answer below, or the reason why there is none. */
function asking(title, strong, request, answered) {
  const place = make("div", { "aria-live": "polite" });
  const button = make("button", { type: "button", class: strong ? "strong" : null }, title);
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      place.replaceChildren(...[answered(await request())].flat());
    } catch (error) {
      place.replaceChildren(missing(`Not done: ${error.message}`));
    }
    button.disabled = false;
  });
  return [button, place];
}

/** The measured outputs beside the predicted ones, a judgement on other examples, and a form that saves an edit. */
function measuredPart(chosen, change) {
  const predicted = Array.from(output, (value, i) => value + change[i]);
  const [measure, measured] = asking("Measure with the model", true, () => ask("measure", { components: chosen }), (answer) => measuredResult(predicted, numbers(answer.output)));
  const [judge, judged] = asking("Judge on other examples", false, () => ask("judge", { components: chosen }), (answer) => plainTable(answer.table, "Judged by the model"));
  const name = make("input", { type: "text", maxlength: 40, value: "by-hand", autocomplete: "off" });
  const [save, saved] = asking("Save as an edit", false, () => ask("save", { components: chosen, name: name.value }), (answer) => {
    const t = content.edits.tasks.push(answer.task) - 1;
    return make("p", { class: "note" }, `Wrote ${answer.files.join(", ")}. It is under `, make("a", { href: `#edits/${t}/0` }, "Edits"), ".");
  });
  const measuring = make("div", { class: "tools" }, measure, judge, field("Name", name), save);
  return card("Measured by the model", measuring, measured, judged, saved, content.live.texts ? completionPart(chosen) : null);
}

/** A field for a text, of the length that the server takes. */
function textField() {
  const box = make("textarea", { rows: 2, maxlength: 4000 });
  const made = field("A text of your own", box);
  made.classList.add("wide");
  return [made, () => box.value];
}

/** How the model continues a text with all components, and without those that are chosen. */
function completionPart(chosen) {
  const [place, text] = textField();
  const [ask1, answered] = asking("Continue it with and without them", false, () => ask("complete", { components: chosen, text: text() }), (answer) => {
    const words = (side) => answer[side].next.map(([word, share]) => `${JSON.stringify(word)} ${percent(share)}`).join(", ");
    const columns = [
      { title: "model", text: true, value: (side) => (side === "with" ? "with all components" : "without the chosen") },
      { title: "most probable next tokens", text: true, value: words },
      { title: "continuation", text: true, value: (side) => answer[side].text },
    ];
    return tableOf(columns, ["with", "without"], "Continuations");
  });
  return make("div", { class: "tools" }, place, ask1, answered);
}

/** The activation of a component at each token of a text that is typed. */
function readingForm(j) {
  if (!live || !content.live.texts) return null;
  const [place, text] = textField();
  const [read, shownText] = asking("Read it", false, () => ask("read", { components: [j], text: text() }), (answer) => {
    const values = numbers(answer.values);
    const largest = Math.max(...values, 1e-12);
    const shares = Array.from(values, (value) => Math.max(0, value / largest));
    const at = values.indexOf(Math.max(...values));
    return [make("p", { id: "read" }, tokens(answer.words, { marked: at, map: shares, limit: 256 })),
      make("p", { class: "caption" }, `The marked token has the largest activation, ${shown(values[at], 2)}; lines show the others.`)];
  });
  return card("On another text", make("div", { class: "tools" }, place, read), shownText);
}

function measuredResult(predicted, measured) {
  const n = measured.length;
  const error = predicted.reduce((sum, value, i) => sum + Math.abs(value - measured[i]), 0) / n;
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / n;
  const [left, right, base] = [mean(predicted), mean(Array.from(measured)), mean(Array.from(output))];
  const r = cosine(predicted.map((value) => value - left), Array.from(measured, (value) => value - right));
  const above0 = Array.from(measured).filter((value) => value > 0).length / n;
  const number = (title, value) => make("div", {}, make("strong", {}, value), title);
  const low = Math.min(...predicted, ...measured);
  const high = Math.max(...predicted, ...measured);
  const trace = {
    type: "scatter", mode: "markers", x: predicted, y: Array.from(measured), text: predicted.map((_, i) => inert(nameOf(i))), customdata: predicted.map((_, i) => i),
    marker: { color: colour("for"), size: 7, opacity: 0.75 }, hovertemplate: "%{text}: %{x:.2f} predicted, %{y:.2f} measured<extra></extra>",
  };
  const line = { type: "line", x0: low, y0: low, x1: high, y1: high, line: { color: colour("muted"), width: 1, dash: "dot" } };
  return [
    make("div", { class: "big", id: "measured" }, number("measured mean change of the output", shown(right - base, 3, { sign: true })),
      number("examples with output above 0, measured", percent(above0)), number("correlation of predicted and measured outputs", shown(r)),
      number("mean error of the prediction", shown(error))),
    chart("Predicted and measured outputs", [trace], { xaxis: axis("predicted output"), yaxis: axis("measured output"), shapes: [line] },
      { height: 380, caption: "Each mark is an example. On the dotted line the prediction is exact.", clicked: (point) => go(`example/${point.customdata}`) }),
  ];
}
