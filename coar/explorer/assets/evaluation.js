// The view of the evaluation: how well fits and baselines predict outputs under masks that they have not seen.

const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];

/** The look of the nth fit: its colour, dashes and mark; every fit differs in two of them. */
function fitStyle(n) {
  return { color: colour(["for", "against", "third", "muted"][n % 4]), dash: DASHES[n % 6], symbol: n };
}

/** Means with their intervals: over ablated fractions, or fit by fit where there is only one fraction. */
function meansChart(rows, names) {
  const single = new Set(rows.map((row) => row.ablated_fraction)).size === 1;
  const traces = names.map((name, n) => {
    const { color, dash, symbol } = fitStyle(n);
    const own = rows.filter((row) => row.fit === name).sort((a, b) => a.ablated_fraction - b.ablated_fraction);
    const scores = own.map((row) => row.pearson);
    const interval = { type: "data", symmetric: false, array: own.map((row) => row.high - row.pearson), arrayminus: own.map((row) => row.pearson - row.low), color };
    const places = single
      ? { x: scores, y: [inert(name)], error_x: interval, hovertemplate: "%{y}: %{x:.3f}<extra></extra>" }
      : { x: own.map((row) => row.ablated_fraction), y: scores, error_y: interval, hovertemplate: `${inert(name)}: %{y:.3f}<extra></extra>` };
    return { type: "scatter", mode: "lines+markers", name: inert(name), marker: { color, symbol, size: 9 }, line: { color, dash }, ...places };
  });
  const score = "mean held-out correlation";
  const layout = single
    ? { xaxis: axis(score), yaxis: axis("", { type: "category", autorange: "reversed" }) }
    : { xaxis: axis("ablated fraction"), yaxis: axis(score), showlegend: true };
  return chart("Mean held-out correlation", traces, layout, { height: 360, caption: "With 95 % bootstrap intervals over examples." });
}

function evaluationView(panel) {
  if (!content.evaluation) {
    panel.append(missing("The run has no evaluation: it needs all its units, test masks and a fit."));
    return;
  }
  const { table, fits, fraction } = content.evaluation;
  const names = Object.keys(fits);
  const curve = (name, n) => {
    const { color, dash } = fitStyle(n);
    const values = Array.from(numbers(fits[name].pearson)).filter((value) => !Number.isNaN(value)).sort((a, b) => a - b);
    return {
      type: "scatter", mode: "lines", name: inert(name), x: values, y: values.map((_, i) => (i + 1) / values.length),
      line: { shape: "hv", color, dash }, hovertemplate: `${inert(name)}: %{x:.3f}<extra></extra>`,
    };
  };
  panel.append(
    make("p", { class: "lead" }, "Each fit predicts the outputs under test masks, which no fit has read. Scores are taken per example over masks, then averaged."),
    make("div", { class: "pair" },
      card("Over examples", chart("Distribution of held-out correlations", names.map(curve), { xaxis: axis("held-out correlation"), yaxis: axis("share of examples below"), showlegend: true },
        { height: 360, caption: `At an ablated fraction of ${fraction}; further right is better.` })),
      card("On average", meansChart(records(table), names))),
    card("All scores", plainTable(table, "Scores of all fits")),
  );
}

function aboutView(panel) {
  panel.append(
    card("This run", facts(Object.entries(content.facts)), fit ? facts([["fit on this page", `${fit.name} (${fit.method}), from ${plural(fit.gradients, "mask gradient")} and ${plural(fit.masks, "mask")}`]]) : null),
    card("How to read it",
      make("p", {}, "A component is a part of the model, such as a filter or a head. Ablating it replaces what it computes by the run's replacement."),
      make("p", {}, "The output is one number per example. A weight is the estimated change of an example's output when the component is kept instead of ablated, while others are ablated at random: above 0 it supports the output, below 0 it opposes it."),
      make("p", {}, "Predictions for several components are sums of weights. They ignore interactions; the evaluation shows how well they hold for random sets.")),
    ...(content.notes.length ? [card("What this page leaves out", make("ul", {}, content.notes.map((note) => make("li", {}, note))))] : []),
  );
}
