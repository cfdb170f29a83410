"use strict";

// The report's page: draws cards of photos with their captions from the JSON that visualization/report.py embeds.
// All text of the data becomes text nodes, so no name or caption is ever read as HTML.

const report = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const BINS = 24; // bars of the histogram
const MAX_PHOTO_HEIGHT = 24; // rem
const PLAY_MS = 700; // for each word
const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const isDrawing = ["svg", "rect", "line", "text", "g", "marker", "path"].includes(tag);
  const node = isDrawing ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

// ------------------------------------------------------------------------------------------------- attention

// Decode the weights of a caption: base64 of bytes, each 255 times the square root of a weight.
function decodeWeights(text) {
  return Float32Array.from(atob(text), (character) => (character.charCodeAt(0) / 255) ** 2);
}

// Return the weights (R) at word t of the chosen layer and head; null if the model does not have these.
function weightsAt(caption, t) {
  const regions = caption.cells + caption.boxes.length;
  const layer = Number(byId("layer").value), head = Number(byId("head").value);
  if (caption.heads && layer) {
    caption.allHeads ??= decodeWeights(caption.heads);
    const [layers, heads] = caption.layers;
    if (layer > layers || head > heads) return null;
    const words = caption.words.length, mean = new Float32Array(regions);
    for (let h = 0; h < heads; h++) {
      if (head && h !== head - 1) continue;
      const start = (((layer - 1) * heads + h) * words + t) * regions;
      for (let r = 0; r < regions; r++) mean[r] += caption.allHeads[start + r] / (head ? 1 : heads);
    }
    return mean;
  }
  caption.weights ??= decodeWeights(caption.alpha);
  return caption.weights.subarray(t * regions, (t + 1) * regions);
}

// Return the brightness (height * width) from 0 to 1; 1 means at least `full_brightness` times the uniform weight.
// The brightness of cells is interpolated between their centers; objects are as bright as their weights.
function brightness(caption, weights, width, height) {
  const light = new Float32Array(width * height), side = Math.sqrt(caption.cells);
  const scale = weights.length / report.full_brightness;
  if (side) {
    const along = (pixels) => Array.from({ length: pixels }, (_, i) => {
      const x = Math.min(Math.max((i + 0.5) / pixels * side - 0.5, 0), side - 1), first = Math.floor(x);
      return [first, Math.min(first + 1, side - 1), x - first];
    });
    const columns = along(width);
    along(height).forEach(([top, bottom, down], y) => columns.forEach(([left, right, over], x) => {
      const upper = weights[top * side + left] * (1 - over) + weights[top * side + right] * over;
      const lower = weights[bottom * side + left] * (1 - over) + weights[bottom * side + right] * over;
      light[y * width + x] = upper * (1 - down) + lower * down;
    }));
  }
  caption.boxes.forEach(([left, top, right, bottom], i) => {
    const weight = weights[caption.cells + i];
    for (let y = Math.round(top * height); y < Math.round(bottom * height); y++) {
      for (let x = Math.round(left * width); x < Math.round(right * width); x++) {
        light[y * width + x] = Math.max(light[y * width + x], weight);
      }
    }
  });
  return light.map((weight) => Math.min(1, weight * scale));
}

// Return true if the positions of the regions are unknown: region features without boxes.
const lacksBoxes = (caption) => caption.boxes.length > 1 && !caption.cells && caption.boxes.every(isWhole);

const isWhole = ([left, top, right, bottom]) => left === 0 && top === 0 && right === 1 && bottom === 1;

// ------------------------------------------------------------------------------------------------- text

const ngramsOf = (words, n) => words.slice(n - 1).map((_, i) => words.slice(i, i + n).join(" "));

// Return for each word of a reference the length of the longest n-gram with it, up to 4, that a caption shares.
function matches(reference, caption) {
  const longest = reference.map(() => 0);
  for (let n = 1; n <= 4; n++) {
    const known = new Set(ngramsOf(caption, n));
    ngramsOf(reference, n).forEach((ngram, i) => {
      if (known.has(ngram)) longest.fill(n, i, i + n);
    });
  }
  return longest;
}

// Return for each word of a caption true if it is not in the longest common subsequence with another caption.
function differing(words, other) {
  const common = Array.from({ length: words.length + 1 }, () => new Uint16Array(other.length + 1));
  for (let i = words.length - 1; i >= 0; i--) {
    for (let j = other.length - 1; j >= 0; j--) {
      common[i][j] = words[i] === other[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    }
  }
  const differs = words.map(() => true);
  for (let i = 0, j = 0; i < words.length && j < other.length;) {
    if (words[i] === other[j]) {
      differs[i] = false;
      i++;
      j++;
    } else if (common[i + 1][j] >= common[i][j + 1]) i++;
    else j++;
  }
  return differs;
}

// ------------------------------------------------------------------------------------------------- cards

class Card {
  constructor(record, index) {
    this.record = record;
    this.index = index;
    const texts = [...record.captions.map((caption) => caption.words.join(" ")), ...record.references];
    this.text = ` ${texts.join(" ")}`.toLowerCase(); // a space before each word
    this.node = element("article", { class: "card", tabindex: -1, "aria-label": record.name });
    this.node.card = this;
    this.isFilled = false;
  }

  // Fill the card only when it comes near the window, so that a page of a thousand photos opens at once.
  fill() {
    if (this.isFilled) return;
    this.isFilled = true;
    const { record } = this, { width, height } = record;
    this.canvas = element("canvas", { width, height });
    this.drawing = element("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": true });
    const alt = record.captions.map((caption) => caption.words.join(" ")).join("; ");
    const src = `data:image/jpeg;base64,${record.photo}`;
    this.image = element("img", { src, width, height, alt, decoding: "async" });
    const photo = element("div", { class: "photo" }, this.image, this.canvas, this.drawing);
    photo.style.width = `${MAX_PHOTO_HEIGHT * width / height}rem`; // tall photos are narrow
    this.status = element("p", { class: "status", "aria-live": "polite" });
    this.words = [];
    this.node.append(
      element("h2", { dir: "auto", title: record.name }, record.name.split(/[\\/]/).pop()),
      photo,
      this.status,
      ...record.captions.flatMap((caption, model) => this.captionNodes(caption, model)),
    );
    if (record.references.length) this.node.append(this.referencesNode());
    if (this.words.length) this.words[0].tabIndex = 0; // only one word is a tab stop; arrow keys reach the others
  }

  captionNodes(caption, model) {
    const { captions } = this.record, several = report.models.length > 1;
    const differs = several ? differing(caption.words, captions[1 - model]?.words ?? []) : [];
    const buttons = caption.words.map((word, t) => {
      const gate = caption.gates ? [element("small", {}, caption.gates[t].toFixed(2))] : [];
      const spoken = caption.gates ? `${word}, gate ${caption.gates[t].toFixed(2)}` : word;
      const button = element("button", {
        type: "button", class: differs[t] ? "word differs" : "word", tabindex: -1, "aria-pressed": "false",
        "aria-label": spoken, onpointerenter: () => this.show(button), onfocus: () => this.show(button),
        onclick: () => this.show(button),
      }, element("span", { dir: "auto" }, word), ...gate);
      Object.assign(button, { caption, t });
      return button;
    });
    this.words.push(...buttons);
    const play = element("button", {
      type: "button", class: "play", "aria-label": "Play the caption word by word", onclick: () => this.play(buttons),
    }, "▶");
    const group = element("div", { class: "caption", role: "group", "aria-label": "Caption", dir: "auto",
      onpointerleave: () => this.clear() }, ...buttons);
    if (caption.alpha && buttons.length) group.append(play);
    const numbers = [];
    if (caption.log_prob !== undefined) numbers.push(`log-probability ${caption.log_prob.toFixed(2)}`);
    for (const [name, title] of report.metrics) {
      if (name in caption.scores) numbers.push(`${title} ${caption.scores[name].toFixed(3)}`);
    }
    const nodes = several ? [element("p", { class: "model-name" }, report.models[model])] : [];
    nodes.push(group, element("p", { class: "numbers" }, numbers.join(" · ")));
    if (caption.n_best?.length > 1) {
      const items = caption.n_best.map(([text, logProb]) =>
        element("li", { dir: "auto" }, `${text} (${logProb.toFixed(2)})`));
      const summary = element("summary", {}, `${items.length} best captions`);
      nodes.push(element("details", {}, summary, element("ol", {}, ...items)));
    }
    return nodes;
  }

  referencesNode() {
    const { references, captions } = this.record, items = references.map((reference) => {
      const words = reference.split(" "), longest = matches(words, captions[0].words);
      const marked = (word, i) => longest[i] ? element("mark", { "data-n": longest[i] }, word) : word;
      const parts = words.flatMap((word, i) => [marked(word, i), " "]);
      return element("li", { dir: "auto" }, ...parts);
    });
    const summary = `${items.length} reference caption${items.length > 1 ? "s" : ""}`;
    return element("details", { class: "references" }, element("summary", {}, summary), element("ul", {}, ...items));
  }

  // Show the attention at the word of a button.
  show(button) {
    for (const other of this.words) {
      other.setAttribute("aria-pressed", String(other === button));
      other.tabIndex = other === button ? 0 : -1;
    }
    this.shown = button;
    const { caption, t } = button, { width, height } = this.record;
    if (!caption.alpha) return this.erase(`${caption.words[t]}: the attention of this caption is unknown`);
    const weights = weightsAt(caption, t);
    if (!weights) return this.erase(`${caption.words[t]}: this model has no such layer or head`);
    if (lacksBoxes(caption)) return this.erase(describe(caption, t, weights));
    const light = brightness(caption, weights, width, height);
    const pixels = new ImageData(width, height);
    light.forEach((value, i) => {
      pixels.data[4 * i + 3] = Math.round(255 * 0.8 * (1 - value)); // black over the photo
    });
    this.canvas.getContext("2d").putImageData(pixels, 0, 0);
    this.drawing.replaceChildren(...this.frames(caption, weights), ...this.arrows(caption, t));
    this.status.textContent = describe(caption, t, weights);
  }

  // Return frames of the objects with the largest weights, if these exceed the uniform weight.
  frames(caption, weights) {
    const { width, height } = this.record, uniform = 1 / weights.length;
    return caption.boxes
      .map((box, i) => ({ box, name: caption.names[i], weight: weights[caption.cells + i] }))
      .filter(({ box, weight }) => weight > uniform && !isWhole(box))
      .sort((a, b) => b.weight - a.weight)
      .slice(0, report.max_frames)
      .flatMap(({ box: [left, top, right, bottom], name, weight }, i) => [
        element("rect", {
          x: left * width, y: top * height, width: (right - left) * width, height: (bottom - top) * height,
          "stroke-width": 1 + 2 * Math.min(1, weight / uniform / report.full_brightness),
        }),
        // Names go to different corners, because objects of the same name often overlap.
        element("text", i === 1 ? { x: right * width - 3, y: bottom * height - 4, "text-anchor": "end" }
          : { x: left * width + 3, y: i ? bottom * height - 4 : top * height + 10 }, name),
      ]);
  }

  // Return arrows of the graph's edges that mattered for a word, with their relations.
  arrows(caption, t) {
    if (!caption.edges || !byId("edges").checked) return [];
    const { width, height } = this.record, at = (i) => [caption.centers[i][0] * width, caption.centers[i][1] * height];
    return caption.edges[t].flatMap(([source, target, share, relation]) => {
      const [x1, y1] = at(source), [x2, y2] = at(target), strength = share / caption.edges[t][0][2];
      const length = Math.hypot(x2 - x1, y2 - y1) || 1, dx = (x2 - x1) / length, dy = (y2 - y1) / length;
      const side = (turn) => ({ x1: x2, y1: y2, x2: x2 - 7 * dx + turn * 4 * dy, y2: y2 - 7 * dy - turn * 4 * dx });
      const style = { "stroke-width": 0.5 + 2 * strength, "stroke-opacity": 0.3 + 0.7 * strength };
      return [
        ...[{ x1, y1, x2, y2 }, side(1), side(-1)].map((line) => element("line", { ...line, ...style })),
        element("text", { x: 0.6 * x1 + 0.4 * x2, y: 0.6 * y1 + 0.4 * y2, "text-anchor": "middle" },
          report.relations[relation]),
      ];
    });
  }

  erase(status = "") {
    this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.drawing.replaceChildren();
    this.status.textContent = status;
  }

  // Show the photo alone again, unless a word has the keyboard's focus.
  clear() {
    if (!this.shown || this.timer || this.node.contains(document.activeElement?.closest(".word"))) return;
    this.shown.setAttribute("aria-pressed", "false");
    this.shown = null;
    this.erase();
  }

  play(buttons) {
    this.stop();
    let t = 0;
    const next = () => {
      if (t === buttons.length) return this.stop();
      this.show(buttons[t++]);
    };
    next();
    this.timer = setInterval(next, PLAY_MS);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
  }
}

// Return the status line of a word: the positions and values of its largest weights.
function describe(caption, t, weights) {
  const order = [...weights.keys()].sort((i, j) => weights[j] - weights[i]), side = Math.sqrt(caption.cells);
  const regionName = (i) => {
    if (i < caption.cells) return `row ${Math.floor(i / side) + 1}, column ${i % side + 1} of ${side}`;
    const [box, name] = [caption.boxes[i - caption.cells], caption.names[i - caption.cells]];
    return isWhole(box) && !lacksBoxes(caption) ? "the whole photo" : name || `region ${i - caption.cells + 1}`;
  };
  const largest = order.slice(0, caption.boxes.length ? 3 : 1).map((i) => `${regionName(i)}: ${weights[i].toFixed(3)}`);
  const gate = caption.gates ? `, gate ${caption.gates[t].toFixed(2)}` : "";
  const uniform = (1 / weights.length).toFixed(3);
  return `“${caption.words[t]}”${gate} – largest weight at ${largest.join("; ")} (uniform: ${uniform})`;
}

// ------------------------------------------------------------------------------------------------- sort and filter

// Return what cards can be sorted and filtered by: a name, a title, and a function that returns a card's value.
function makeKeys() {
  const order = report.serve ? ["order", "Newest first", (card) => -card.index]
    : ["order", "Order in the data", (card) => card.index];
  const keys = [order], first = (card) => card.record.captions[0];
  for (const [name, title] of report.metrics) {
    keys.push([name, title, (card) => first(card).scores[name] ?? 0]);
    if (report.models.length > 1) {
      keys.push([`${name} difference`, `${title}: ${report.models[0]} minus ${report.models[1]}`,
        (card) => (first(card).scores[name] ?? 0) - (card.record.captions[1].scores[name] ?? 0)]);
    }
  }
  if (report.serve || report.cards.some((record) => record.captions[0].log_prob !== undefined)) {
    keys.push(["log_prob", "Log-probability", (card) => first(card).log_prob ?? 0]);
  }
  keys.push(["length", "Length in words", (card) => first(card).words.length]);
  return keys;
}

const keys = makeKeys(), cards = report.cards.map((record, i) => new Card(record, i));
let visible = [], isAscending = true;

const chosenKey = () => keys[byId("key").selectedIndex];

function range() {
  const [, , value] = chosenKey(), values = cards.map(value);
  return [Math.min(...values), Math.max(...values)];
}

function histogram() {
  const [least, most] = range(), [name, title, value] = chosenKey(), counts = new Array(BINS).fill(0);
  byId("filter").hidden = name === "order" || least === most;
  for (const card of cards) {
    counts[Math.min(BINS - 1, Math.floor((value(card) - least) / (most - least || 1) * BINS))]++;
  }
  const [low, high] = limits(), tallest = Math.max(...counts);
  byId("histogram").replaceChildren(...counts.map((count, i) => {
    const height = count ? Math.max(2, 46 * count / tallest) : 0;
    return element("rect", { x: 10 * i + 1, y: 48 - height, width: 8, height, class: i >= low && i < high && "in" });
  }));
  const edge = (bin) => (least + (most - least) * bin / BINS).toFixed(2);
  byId("filter-title").textContent = `${title}: ${edge(low)} to ${edge(high)}`;
  for (const id of ["low", "high"]) byId(id).setAttribute("aria-valuetext", edge(Number(byId(id).value)));
}

function limits() {
  const edges = [Number(byId("low").value), Number(byId("high").value)];
  return [Math.min(...edges), Math.max(...edges)];
}

function setLimits(low, high) {
  byId("low").value = low;
  byId("high").value = high;
  update();
}

// Show the cards that fit, sorted.
function update() {
  byId("controls").hidden = !cards.length;
  histogram();
  const [name, , value] = chosenKey(), [least, most] = range(), [low, high] = limits();
  const terms = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const bin = (card) => (value(card) - least) / (most - least || 1) * BINS;
  const fits = (card) => terms.every((term) => card.text.includes(` ${term}`)) && // words that start with the term
    (name === "order" || (bin(card) >= low && (bin(card) < high || high === BINS)));
  const sign = isAscending ? 1 : -1;
  const sorted = [...cards].sort((a, b) => sign * (value(a) - value(b)) || a.index - b.index);
  visible = sorted.filter(fits);
  for (const card of cards) card.node.hidden = true;
  for (const card of visible) card.node.hidden = false;
  const focused = document.activeElement;
  byId("cards").replaceChildren(...sorted.map((card) => card.node));
  if (focused !== document.activeElement) focused.focus({ preventScroll: true }); // a node loses the focus when it moves
  byId("count").textContent = `${visible.length} of ${cards.length} photos`;
}

// ------------------------------------------------------------------------------------------------- the page

function redraw() {
  for (const card of cards) if (card.shown) card.show(card.shown);
}

function brush(event) {
  if (event.button !== 0) return;
  const box = byId("histogram").getBoundingClientRect();
  const bin = (x) => Math.min(BINS, Math.max(0, (x - box.left) / box.width * BINS));
  const start = bin(event.clientX);
  const move = (now) => {
    const edges = [start, bin(now.clientX)];
    const low = Math.floor(Math.min(...edges));
    setLimits(low, Math.max(low + 1, Math.ceil(Math.max(...edges))));
  };
  byId("histogram").setPointerCapture(event.pointerId);
  byId("histogram").addEventListener("pointermove", move);
  byId("histogram").addEventListener("lostpointercapture", () => {
    byId("histogram").removeEventListener("pointermove", move);
  }, { once: true });
  move(event);
}

function focusCard(step) {
  const current = document.activeElement?.closest(".card")?.card;
  const next = visible[current ? visible.indexOf(current) + step : 0];
  if (!next) return;
  next.fill();
  next.node.scrollIntoView({ block: "nearest" });
  (next.words[0] ?? next.node).focus();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const card = document.activeElement?.closest(".card")?.card;
  if (event.key === "Escape") {
    document.activeElement?.blur();
    for (const each of cards) {
      each.stop();
      each.clear();
    }
  }
  if (event.target.closest("input:not([type=file]), select")) return;
  const word = document.activeElement?.closest(".word");
  if (word && (event.key === "ArrowRight" || event.key === "ArrowLeft")) {
    const step = event.key === "ArrowRight" ? 1 : -1;
    card.words[card.words.indexOf(word) + step]?.focus();
  } else if (event.key === "j" || event.key === "k") focusCard(event.key === "j" ? 1 : -1);
  else if (event.key === "p" && card) {
    const { caption } = word ?? card.words[0];
    card.play(card.words.filter((each) => each.caption === caption));
  }
  else if (event.key === "/") byId("search").focus();
  else return;
  event.preventDefault();
}

function choices(select, names) {
  byId(select).replaceChildren(...names.map((name, i) => element("option", { value: i }, name)));
}

// Offer the layers, heads and relations that the captions have.
function offerChoices() {
  const captions = cards.flatMap((card) => card.record.captions), heads = captions.filter((caption) => caption.layers);
  const [layers, perLayer] = [0, 1].map((i) => Math.max(0, ...heads.map((caption) => caption.layers[i])));
  choices("layer", [report.attention, ...Array.from({ length: layers }, (_, i) => String(i + 1))]);
  choices("head", ["mean", ...Array.from({ length: perLayer }, (_, i) => String(i + 1))]);
  byId("layer-field").hidden = byId("head-field").hidden = !layers;
  byId("edges-field").hidden = !captions.some((caption) => caption.edges);
}

// ------------------------------------------------------------------------------------------------- photos to caption

let sent = 0, total = 0, lastUpload = Promise.resolve();

// Caption files one after the other; more may be added meanwhile.
function upload(files) {
  if (!files.length) return;
  if (sent === total) {
    sent = total = 0;
    byId("errors").replaceChildren();
  }
  total += files.length;
  for (const file of files) lastUpload = lastUpload.then(() => captionFile(file));
}

async function captionFile(file) {
  byId("progress").textContent = `Captioning ${sent + 1} of ${total}: ${file.name}`;
  byId("upload").classList.add("busy");
  try {
    const headers = { "X-Photo-Name": encodeURIComponent(file.name) };
    const response = await fetch("/caption", { method: "POST", headers, body: file }), answer = await response.json();
    if (response.ok) addCard(answer);
    else showError(answer.error.startsWith(file.name) ? answer.error : `${file.name}: ${answer.error}`);
  } catch (error) {
    showError(`${file.name}: not captioned (${error.message}): check that it is a file and that tools/serve.py is still running`);
  }
  sent++;
  if (sent < total) return;
  byId("upload").classList.remove("busy");
  byId("progress").textContent = `${total - byId("errors").childElementCount} of ${total} captioned`;
}

function showError(text) {
  byId("errors").append(element("li", { dir: "auto" }, text));
}

function addCard(record) {
  const card = new Card(record, cards.length);
  cards.push(card);
  if (cards.length === 1) offerChoices(); // the same for all cards, which come from one model
  card.fill();
  update();
}

function acceptPhotos() {
  byId("upload").hidden = false;
  byId("photos").addEventListener("change", () => {
    upload([...byId("photos").files]);
    byId("photos").value = ""; // so that the same photo can be chosen again
  });
  const highlight = (isOver) => byId("upload").classList.toggle("over", isOver);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    highlight(true);
  });
  document.addEventListener("dragleave", () => highlight(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault(); // otherwise the browser opens the file in place of this page
    highlight(false);
    upload([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => upload([...event.clipboardData.files]));
}

function start() {
  document.title = report.title;
  byId("title").textContent = report.title;
  const [titles = [], ...rows] = report.table;
  byId("scores").append(
    element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title))),
    ...rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell)))),
  );
  for (const [name, value] of report.details) {
    byId("details").append(element("dt", {}, name), element("dd", {}, value));
  }
  byId("about").hidden = !(rows.length || report.details.length);
  choices("key", keys.map(([, title]) => title));
  // When two models are compared, start with the photos on which the first model loses most.
  byId("key").selectedIndex = Math.max(0, keys.findIndex(([name]) => name.endsWith(" difference")));
  offerChoices();
  byId("head").addEventListener("change", () => {
    if (byId("layer").value === "0") byId("layer").selectedIndex = byId("layer").length - 1; // a head needs a layer
  });
  byId("layer").addEventListener("change", () => {
    if (byId("layer").value === "0") byId("head").value = "0";
  });
  for (const id of ["layer", "head", "edges"]) byId(id).addEventListener("change", redraw);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("search").addEventListener("input", update);
  for (const id of ["low", "high"]) byId(id).addEventListener("input", update);
  byId("key").addEventListener("change", () => setLimits(0, BINS));
  byId("reset").addEventListener("click", () => setLimits(0, BINS));
  byId("direction").addEventListener("click", () => {
    isAscending = !isAscending;
    byId("direction").textContent = isAscending ? "Ascending" : "Descending";
    update();
  });
  byId("histogram").addEventListener("pointerdown", brush);
  document.addEventListener("keydown", onKey);
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) entry.target.card.fill();
  }, { rootMargin: "900px" });
  for (const card of cards) observer.observe(card.node);
  if (report.serve) acceptPhotos();
  update();
}

start();
