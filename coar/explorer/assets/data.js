// The data of the page: what `gather` in content.py returned, decoded.

const content = JSON.parse(document.getElementById("data").textContent);
const fit = content.fit ?? null;
const count = { examples: content.examples.rows.length, components: content.components.rows.length };

/** Decode base64 to an ArrayBuffer. */
function decoded(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
  return bytes.buffer;
}

/** Return the numbers of a packed array, row after row; rows of int16 are multiplied by their scale, bytes are shares. */
function numbers(packed) {
  if (packed.f32 !== undefined) return new Float32Array(decoded(packed.f32));
  if (packed.u8 !== undefined) return Float32Array.from(new Uint8Array(decoded(packed.u8)), (value) => value / 255);
  const whole = new Int16Array(decoded(packed.i16));
  const scale = numbers(packed.scale);
  const columns = packed.shape[1];
  return Float32Array.from(whole, (value, i) => value * scale[Math.floor(i / columns)]);
}

const output = numbers(content.examples.output);
const probability = content.examples.probability ? numbers(content.examples.probability) : null;
const weights = fit ? numbers(fit.weights) : null;
const errors = fit?.errors ? numbers(fit.errors) : null;
const full = fit ? numbers(fit.full) : null;
const above = fit?.above ? numbers(fit.above) : null;
const below = fit?.below ? numbers(fit.below) : null;
const heldOut = fit && content.evaluation?.fits[fit.name] ? scoresOf(content.evaluation.fits[fit.name]) : null;
const metadata = content.examples.metadata;

function scoresOf(packed) {
  return Object.fromEntries(Object.entries(packed).map(([name, values]) => [name, numbers(values)]));
}

/** The row of the evaluation's table for the fit on the page, at the fraction of its training masks. */
function heldOutRow() {
  if (!heldOut) return null;
  return records(content.evaluation.table).find(
    (row) => row.fit === fit.name && row.ablated_fraction === content.evaluation.fraction,
  );
}

/** Return a packed table as objects by column. */
function records(packed) {
  return packed.rows.map((row) => Object.fromEntries(packed.columns.map((name, i) => [name, row[i]])));
}

/** The weights of one example, over the components on the page. */
function weightsOf(example) {
  return weights.subarray(example * count.components, (example + 1) * count.components);
}

/** The weights of one component, over the examples on the page. */
function weightsOn(component) {
  return Float32Array.from({ length: count.examples }, (_, i) => weights[i * count.components + component]);
}

/** The standard error of a weight; null where the fit has none. */
function errorOf(example, component) {
  return errors ? errors[example * count.components + component] : null;
}

/** Whether the model is right on an example; null where that is unknown. */
function isRight(example) {
  return content.examples.correct ? content.examples.correct[example] : null;
}

/** Return the indices 0 to length - 1 in the order of `value`, the largest first. */
function ranked(length, value) {
  return Array.from({ length }, (_, i) => i).sort((a, b) => value(b) - value(a) || a - b);
}

/** Cosine similarity of two rows of numbers. */
function cosine(a, b) {
  let [product, left, right] = [0, 0, 0];
  for (let i = 0; i < a.length; i += 1) {
    product += a[i] * b[i];
    left += a[i] * a[i];
    right += b[i] * b[i];
  }
  return left && right ? product / Math.sqrt(left * right) : 0;
}

/** Mean and 95 % interval of the mean, from the standard error over the values. */
function meanOf(values) {
  const n = values.length;
  const mean = values.reduce((sum, value) => sum + value, 0) / n;
  const spread = n > 1 ? values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (n - 1) : NaN;
  return { n, mean, half: 1.96 * Math.sqrt(spread / n) };
}

/** Metadata columns that sort examples into 2 to 60 groups, of three or more on average; `label` first. */
const groupColumns = Object.keys(metadata)
  .filter((name) => {
    const values = new Set(metadata[name]).size;
    return values > 1 && values <= 60 && 3 * values <= count.examples;
  })
  .sort((a, b) => (b === "label") - (a === "label"));

/** The examples of each group of a column, groups in order. */
function groupsBy(column) {
  const groups = new Map();
  metadata[column].forEach((value, i) => groups.set(value, [...(groups.get(value) ?? []), i]));
  return new Map([...groups].sort(([a], [b]) => (a > b ? 1 : -1)));
}

/** Predicted change of every example's output when components are ablated: less the sum of their weights. */
function predictedChange(components) {
  const change = new Float64Array(count.examples);
  const variance = errors ? new Float64Array(count.examples) : null;
  for (let i = 0; i < count.examples; i += 1) {
    const start = i * count.components;
    for (const j of components) {
      change[i] -= weights[start + j];
      if (variance) variance[i] += errors[start + j] ** 2;
    }
  }
  return { change, half: variance ? variance.map((value) => 1.96 * Math.sqrt(value)) : null };
}
