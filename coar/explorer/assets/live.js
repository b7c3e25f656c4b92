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
  return card("Measured by the model", make("div", { class: "tools" }, measure, judge, field("Name", name), save), measured, judged, saved);
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
