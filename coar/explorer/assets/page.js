// Pieces of the page: elements, numbers, pictures and links. All text enters as text, never as HTML.

/** Make an element; attributes in `on` are event handlers, and children are elements or text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") Object.entries(value).forEach(([event, handler]) => element.addEventListener(event, handler));
    else if (name === "style") Object.assign(element.style, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

/** Write a number with some decimals, and with a sign where asked for. */
function shown(value, digits = 3, { sign = false } = {}) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const text = Math.abs(value).toFixed(digits);
  if (value < 0 && Number(text) !== 0) return `−${text}`;
  return sign ? `+${text}` : text;
}

function percent(share, digits = 1) {
  return Number.isNaN(share) ? "–" : `${(100 * share).toFixed(digits)} %`;
}

function plural(number, word) {
  return `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
}

const stylesheet = document.styleSheets[0];
const sheets = new Map();

/** Return the class of a sheet of pictures; the rule with the picture is made once. */
function sheetClass(sheet) {
  if (!sheets.has(sheet)) {
    const name = `sheet${sheets.size}`;
    stylesheet.insertRule(`.${name} { background-image: url("${sheet.url}"); }`, stylesheet.cssRules.length);
    sheets.set(sheet, name);
  }
  return sheets.get(sheet);
}

/** One picture of a sheet, `side` pixels on its longer side, with a box given as shares of it, and a map over it. */
function picture(sheet, at, side, label = "", { box = null, map = null, signed = false } = {}) {
  const scale = side / Math.max(sheet.width, sheet.height);
  const [width, height] = [sheet.width * scale, sheet.height * scale];
  const [column, row] = [at % sheet.columns, Math.floor(at / sheet.columns)];
  const style = {
    width: `${width}px`,
    height: `${height}px`,
    backgroundSize: `${width * sheet.columns}px ${height * sheet.rows}px`,
    backgroundPosition: `${-column * width}px ${-row * height}px`,
  };
  const crisp = sheet.pixelated ? " crisp" : "";
  const name = label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" };
  const element = make("span", { class: `picture ${sheetClass(sheet)}${crisp}`, style, ...name });
  if (map) element.append(overlay(map, signed));
  if (box) {
    const [left, top, wide, high] = box.map((share) => `${100 * share}%`);
    element.append(make("span", { class: "box", style: { left, top, width: wide, height: high } }));
  }
  return element;
}

const [AMBER, BLUE, ORANGE] = [[255, 176, 0], [86, 180, 233], [230, 110, 30]];

/** The colour of a share: of an activation amber, of a signed map blue above 0 and orange below. */
function shareColour(share, signed) {
  return signed ? (share < 0 ? ORANGE : BLUE) : AMBER;
}

/** A square map of shares, drawn over a picture. */
function overlay(map, signed) {
  const side = Math.round(Math.sqrt(map.length));
  const canvas = make("canvas", { class: "overlay", width: side, height: side, "aria-hidden": "true" });
  const pixels = new ImageData(side, side);
  map.forEach((share, i) => pixels.data.set([...shareColour(share, signed), Math.round((signed ? 215 : 150) * Math.abs(share))], 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

/** The words of an example, one of them marked, and each underlined as much as its share of a map. */
function tokens(words, { marked = -1, map = null, signed = false, limit = 60 } = {}) {
  const first = Math.max(0, Math.min(marked - Math.floor(limit / 2), words.length - limit));
  const line = (i) => (map?.[i] ? { boxShadow: `inset 0 -3px 0 rgba(${shareColour(map[i], signed)}, ${Math.abs(map[i]).toFixed(2)})` } : {});
  const spans = words.slice(first, first + limit).map((word, k) => make("span", { class: first + k === marked ? "marked" : null, style: line(first + k) }, word));
  const before = first > 0 ? [`${first} more, `] : [];
  const after = words.length > first + limit ? [` and ${words.length - first - limit} more`] : [];
  return make("span", { class: "tokens" }, before, spans, after);
}

/** How an example looks: a picture, words, or nothing. */
function look(example, side, { box = null, marked = -1, map = null, signed = false } = {}) {
  const { sheet, words } = content.examples;
  if (sheet) return picture(sheet, example, side, "", { box, map, signed });
  return words ? tokens(words[example], { marked, map, signed, limit: side > 100 ? 400 : 30 }) : null;
}

/** What an example is called: its id, or its position. */
function nameOf(example) {
  return metadata.id ? `id ${metadata.id[example]}` : `example ${content.examples.rows[example]}`;
}

/** Label and prediction of an example, with a sign for right and wrong that does not depend on colour. */
function verdict(example) {
  const label = metadata.label?.[example];
  const predicted = content.examples.predicted?.[example];
  const right = isRight(example);
  const words = [];
  if (label !== undefined) words.push(predicted !== undefined && predicted !== label ? `${label} read as ${predicted}` : `${label}`);
  const mark = right === null ? null : make("span", { class: right ? "right" : "wrong" }, right ? " ✓" : " ✗");
  if (mark) mark.append(make("span", { class: "sr" }, right ? " right" : " wrong"));
  return [words.join(""), mark];
}

/** A card that leads to an example; the note has one or several lines. */
function exampleCard(example, note, looks = {}) {
  const lines = [note].flat().map((line) => make("span", { class: "line muted" }, line));
  const link = make("a", { class: "like", href: `#example/${example}`, "data-example": example },
    look(example, 80, looks), make("span", { class: "line" }, nameOf(example), " · ", verdict(example)), lines);
  return make("li", {}, link);
}

function gallery(cards, label) {
  return make("ul", { class: `gallery${content.examples.sheet ? "" : " words"}`, "aria-label": label }, cards);
}

function componentLink(component) {
  return make("a", { href: `#component/${component}` }, content.components.names[component]);
}

function card(title, ...children) {
  return make("section", { class: "card", "aria-label": title }, make("h2", {}, title), ...children);
}

function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined);
  return make("dl", { class: "facts" }, known.map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

/** A table from columns of {title, text, value(row)}. */
function tableOf(columns, rows, caption) {
  const cell = (tag, column, value) => make(tag, { class: column.text ? "text" : null, scope: tag === "th" ? "col" : null }, value);
  const head = make("tr", {}, columns.map((column) => cell("th", column, column.title)));
  const body = rows.map((row) => make("tr", {}, columns.map((column) => cell("td", column, column.value(row)))));
  const table = make("table", {}, make("caption", { class: "sr" }, caption), make("thead", {}, head), make("tbody", {}, body));
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table);
}

/** A packed table as it is. */
function plainTable(packed, caption) {
  const columns = packed.columns.map((title, i) => {
    const numeric = packed.rows.every((row) => row[i] === null || typeof row[i] === "number");
    const digits = packed.rows.every((row) => row[i] === null || Number.isInteger(row[i])) ? 0 : 3;
    return { title: title.replaceAll("_", " "), text: !numeric, value: (row) => (numeric ? shown(row[i], digits) : String(row[i])) };
  });
  return tableOf(columns, packed.rows, caption);
}

let fields = 0;

/** A control with its label. */
function field(label, control) {
  fields += 1;
  control.id = `field${fields}`;
  return make("div", { class: "field" }, make("label", { for: control.id }, label), control);
}

/** A labelled select; options are [value, text]. */
function choice(label, options, value, changed) {
  const items = options.map(([key, text]) => make("option", { value: key, selected: String(key) === String(value) }, String(text)));
  return field(label, make("select", { on: { change: (event) => changed(event.target.value) } }, items));
}

function slider(label, { min, max, step = 1, value }, changed) {
  const text = make("span", { "aria-hidden": "true" }, ` ${value}`);
  const react = (event) => {
    text.textContent = ` ${event.target.value}`;
    changed(Number(event.target.value));
  };
  const made = field(label, make("input", { type: "range", min, max, step, value, on: { input: react } }));
  made.firstChild.after(text);
  return made;
}

/** Links to the item before and after, and to one by number. */
function stepper(view, at, length) {
  const link = (to, text) =>
    make("button", { type: "button", disabled: to < 0 || to >= length, on: { click: () => go(`${view}/${to}`) } }, text);
  return [link(at - 1, "‹ Previous"), link(at + 1, "Next ›")];
}

function go(address) {
  window.location.hash = address;
}

/** A paragraph that stands where a part of the page has no data. */
function missing(text) {
  return make("p", { class: "note warning" }, text);
}

/** A command with a button that copies it, or selects it where the browser does not allow copying. */
function command(text) {
  const code = make("code", { tabindex: "0" }, text);
  const button = make("button", { type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    const done = (word) => {
      button.textContent = word;
      setTimeout(() => (button.textContent = "Copy"), 1500);
    };
    try {
      await navigator.clipboard.writeText(text);
      done("Copied");
    } catch {
      window.getSelection().selectAllChildren(code);
      done("Selected");
    }
  });
  return make("div", { class: "command" }, code, button);
}
