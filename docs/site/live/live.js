// The live page. Of drawings: it runs look.onnx, write.onnx and compare.onnx in the browser; data.json is made at build
// time. Of photographs: `python -m minblip2 demo --run FOLDER` answers, and data.json says so.
const FINE = 4; // shapes are drawn this many times larger and averaged down, as `minblip2.data.scenes` does
const $ = (id) => document.getElementById(id);
const state = { things: [], background: "", shape: "", colour: "", size: "", way: "greedy", block: 0, mask: "bi-directional",
                hidden: new Set(), tokens: [], looked: null, seen: null, photograph: null };
let data, ort, models, engine, running = Promise.resolve();

// --- words and ids ---------------------------------------------------------------------------------------------------

function tokenize(text, side) {
  const cleaned = side === "lm" ? text.replace(/[?!.:;]/g, " ") : text.replace(/[.!"()*#:;~]/g, " ");
  const words = cleaned.toLowerCase().match(/[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];
  const vocabulary = data[side].ids;
  return { ids: words.map((word) => vocabulary.get(word) ?? data[side].unknown),
           unknown: words.filter((word) => !vocabulary.has(word)) };
}

const words = (ids) => ids.map((id) => data.lm.words[id]).join(" ").replace(/ ([,.])/g, "$1");
const int64 = (rows) => new ort.Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);

// --- drawing ---------------------------------------------------------------------------------------------------------

function fine(things, background) { // the drawing at FINE times its size, without smoothing: 0..255 (side side 3)
  const side = data.side * FINE, pixels = new Uint8Array(side * side * 3);
  const [r, g, b] = data.backgrounds[background];
  for (let i = 0; i < pixels.length; i += 3) pixels.set([r, g, b], i);
  for (const thing of things) {
    const radius = data.sizes[thing.size] * FINE, x0 = thing.x * FINE, y0 = thing.y * FINE;
    for (let y = Math.max(0, Math.floor(y0 - radius)); y < Math.min(side, y0 + radius + 1); y++)
      for (let x = Math.max(0, Math.floor(x0 - radius)); x < Math.min(side, x0 + radius + 1); x++)
        if (covers(thing.shape, (x + 0.5 - x0) / radius, (y + 0.5 - y0) / radius))
          pixels.set(data.colours[thing.colour], (y * side + x) * 3);
  }
  return pixels;
}

function covers(shape, x, y) {
  const far = Math.hypot(x, y);
  if (shape === "circle") return far <= 1;
  if (shape === "ring") return far <= 1 && far >= data.hole;
  let inside = false; // even-odd rule
  const corners = data.outlines[shape];
  for (let i = 0, j = corners.length - 1; i < corners.length; j = i++) {
    const [xi, yi] = corners[i], [xj, yj] = corners[j];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) inside = !inside;
  }
  return inside;
}

function draw() {
  const large = fine(state.things, state.background), side = data.side, pixels = new Uint8ClampedArray(side * side * 4);
  for (let y = 0; y < side; y++)
    for (let x = 0; x < side; x++) {
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let i = 0; i < FINE * FINE; i++)
          sum += large[((y * FINE + (i >> 2)) * side * FINE + x * FINE + (i & 3)) * 3 + c];
        pixels[(y * side + x) * 4 + c] = Math.round(sum / (FINE * FINE));
      }
      pixels[(y * side + x) * 4 + 3] = 255;
    }
  $("scene").getContext("2d").putImageData(new ImageData(pixels, side, side), 0, 0);
  const said = state.things.map((thing) => `${thing.size} ${thing.colour} ${thing.shape}`).join(", ") || "nothing";
  $("scene").setAttribute("aria-label", `your drawing on ${state.background}: ${said}`);
}

function place(x, y) {
  if (state.things.length === 3) { $("hint").textContent = "Three things are the most it has seen: remove one first."; return; }
  const edge = data.sizes[state.size];
  const within = (value) => Math.min(Math.max(value, edge), data.side - edge);
  state.things.push({ shape: state.shape, colour: state.colour, size: state.size, x: within(x), y: within(y) });
  changed();
}

function byChance() {
  const pick = (list) => list[Math.floor(Math.random() * list.length)];
  const cells = [...Array(9).keys()].sort(() => Math.random() - 0.5).slice(0, 1 + Math.floor(Math.random() * 3));
  state.background = pick(Object.keys(data.backgrounds));
  state.things = cells.map((cell) => ({ shape: pick(data.shapes), colour: pick(Object.keys(data.colours)),
    size: pick(Object.keys(data.sizes)), x: data.side * ((cell % 3) + 0.5) / 3, y: data.side * (Math.floor(cell / 3) + 0.5) / 3 }));
  mark("backgrounds", state.background);
  changed();
}

// --- the model -------------------------------------------------------------------------------------------------------

async function look(rgba) { // what the encoder and the query branch make of the drawing
  const side = data.side, plane = side * side, pixels = new Float32Array(3 * plane);
  for (let i = 0; i < plane; i++)
    for (let c = 0; c < 3; c++) pixels[c * plane + i] = (rgba[i * 4 + c] / 255 - data.mean[c]) / data.std[c];
  return models.look.run({ pixels: new ort.Tensor("float32", pixels, [1, 3, side, side]) });
}

async function nextWord(rows) { // log-probabilities and attention to queries for each row of ids
  const q = data.queries, shown = Uint8Array.from({ length: q }, (_, i) => (state.hidden.has(i) ? 0 : 1));
  const result = await models.write.run({ soft: state.seen.soft, shown: new ort.Tensor("bool", shown, [1, q]), ids: int64(rows) });
  const slice = (tensor, i) => tensor.data.slice(i * tensor.dims[1], (i + 1) * tensor.dims[1]);
  return rows.map((_, i) => ({ logP: slice(result.log_p, i), looked: slice(result.looked, i) }));
}

const order = (logP) => [...logP.keys()].sort((a, b) => logP[b] - logP[a]);

function choose(logP) {
  const best = order(logP);
  if (state.way === "greedy") return best[0];
  const nucleus = []; // the likeliest words that together hold a probability of 0.9
  let held = 0;
  while (held < 0.9) { nucleus.push(best[nucleus.length]); held += Math.exp(logP[nucleus.at(-1)]); }
  let left = Math.random() * held;
  return nucleus.find((id) => (left -= Math.exp(logP[id])) <= 0) ?? nucleus[0];
}

async function write(prompt, beams = 1) { // [{id, logP, looked, all}] for the words after a prompt
  const start = [...data.lm.bos, ...tokenize(prompt, "lm").ids];
  let running = [{ ids: start, score: 0, steps: [] }], finished = [];
  for (let length = 1; length <= data.longest; length++) {
    const next = await nextWord(running.map((beam) => beam.ids)), grown = [];
    running.forEach((beam, i) => {
      const { logP, looked } = next[i];
      for (const id of beams === 1 ? [choose(logP)] : order(logP).slice(0, 2 * beams))
        grown.push({ ids: [...beam.ids, id], score: beam.score + logP[id],
                     steps: [...beam.steps, { id, logP: logP[id], looked, all: logP }] });
    });
    grown.sort((a, b) => b.score - a.score);
    const ended = (beam) => beam.ids.at(-1) === data.lm.end;
    grown.slice(0, beams).filter(ended).forEach((beam) => finished.push({ ...beam, final: beam.score / length }));
    running = grown.filter((beam) => !ended(beam)).slice(0, beams);
    finished.sort((a, b) => b.final - a.final);
    finished = finished.slice(0, beams);
    if (!running.length || (finished.length === beams && running[0].score / length <= finished.at(-1).final)) break;
  }
  const best = finished[0] ?? running[0], ids = best.steps.map((step) => step.id).filter((id) => id !== data.lm.end);
  const word = (id) => (id === data.lm.end ? "(end)" : data.lm.words[id]);
  return { text: words(ids), steps: best.steps.map(({ id, logP, looked, all }) => ({ text: word(id), p: Math.exp(logP), looked,
    best: order(all).slice(0, 5).map((other) => [word(other), Math.exp(all[other]), other === id]) })) };
}

const inBrowser = { // what answers about drawings
  async look() {
    const { maps } = (state.seen = await look($("scene").getContext("2d").getImageData(0, 0, data.side, data.side).data));
    state.maps = { dims: maps.dims, data: maps.data };
  },
  say: () => write(data.prompt, state.way.startsWith("beams") ? 5 : 1),
  async ask(question) {
    return { ...(await write(data.question.replace("{}", question))), unknown: tokenize(question, "lm").unknown };
  },
  async compare(sentence) {
    const { ids, unknown } = tokenize(sentence, "qformer");
    if (!ids.length) throw new Refusal("Write a sentence first.");
    const result = await models.compare.run({ features: state.seen.features, ids: int64([[data.qformer.bos, ...ids, data.qformer.end].flat()]) });
    return { cosines: [...result.cosines.data], match: result.match.data[0], unknown, tokens: ids.map((id) => data.qformer.words[id]) };
  },
};

class Refusal extends Error {} // what the person can mend: shown, and no fault of the page

async function post(path, given) { // the photograph and what is wanted of it, to Python on this machine
  if (!state.photograph) throw new Refusal("Choose a photograph first.");
  const answer = await fetch(`${path}?${new URLSearchParams(given)}`, { method: "POST", body: state.photograph, headers: { "Content-Type": data.kind } });
  if (!answer.ok) throw new Refusal(await answer.text());
  return answer.json();
}

const inPython = { // what answers about photographs
  async look() {},
  async say() {
    const said = await post("caption", { way: state.way, hidden: [...state.hidden].join(",") });
    state.maps = said.maps;
    Object.assign($("seen"), { src: said.seen, alt: `what the encoder sees of your photograph: ${said.text}`, hidden: false });
    return said;
  },
  ask: (question) => post("ask", { question }),
  compare: (sentence) => post("match", { sentence }),
};

// --- what is shown ---------------------------------------------------------------------------------------------------

const percent = (p) => `${p > 0.0995 ? Math.round(100 * p) : (100 * p).toFixed(1)} %`;

function bars(target, rows) { // rows: [label, share of the longest, text, winner]
  target.replaceChildren(...rows.flatMap(([label, share, text, winner]) => {
    const parts = [document.createElement("span"), document.createElement("span"), document.createElement("span")];
    parts[0].textContent = label;
    parts[0].className = winner ? "winner" : "";
    parts[1].className = "bar";
    parts[1].style.width = `${Math.max(0, 100 * share)}%`;
    parts[2].textContent = text;
    return parts;
  }));
}

function showWords(target, steps) {
  target.replaceChildren(...steps.map((step, i) => {
    const button = document.createElement("button"), small = document.createElement("small");
    button.type = "button";
    button.textContent = step.text;
    small.textContent = percent(step.p);
    button.append(small);
    const open = () => {
      bars($("next"), step.best.map(([text, p, chosen]) => [text, p, percent(p), chosen]));
      state.looked = step.looked;
      showQueries();
    };
    for (const event of ["click", "focus", "mouseenter"]) button.addEventListener(event, open);
    return button;
  }));
}

function paint(canvas, side, values, highest) { // a map (side side), from black over orange to white: lightness alone carries the value
  canvas.width = canvas.height = side;
  const image = new ImageData(side, side);
  values.forEach((value, k) => {
    const light = highest > 0 ? Math.sqrt(value / highest) : 0;
    image.data.set([255 * Math.min(1, 1.6 * light), 255 * Math.max(0, 1.5 * light - 0.4), 255 * Math.max(0, 3 * light - 2), 255], k * 4);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function showQueries() {
  const { maps } = state;
  if (!maps) return;
  const [, q, v] = maps.dims, side = Math.sqrt(v), most = state.looked?.length ? Math.max(...state.looked) : 1;
  const offset = state.block * q * v, highest = Math.max(...maps.data.slice(offset, offset + q * v));
  const focused = document.activeElement?.dataset?.query;
  $("queries").replaceChildren(...[...Array(q).keys()].map((i) => {
    const button = document.createElement("button"), canvas = document.createElement("canvas"), bar = document.createElement("span");
    paint(canvas, side, maps.data.slice(offset + i * v, offset + (i + 1) * v), highest);
    canvas.setAttribute("aria-hidden", "true");
    bar.className = "looked";
    bar.style.width = state.looked?.length ? `${(100 * state.looked[i]) / most}%` : "0";
    button.type = "button";
    button.dataset.query = i;
    button.setAttribute("aria-pressed", state.hidden.has(i));
    button.setAttribute("aria-label", `hide query ${i + 1}` + (state.looked?.length ? `, the word attends to it ${percent(state.looked[i])}` : ""));
    button.append(canvas, `q${i + 1}`, bar);
    button.addEventListener("click", () => { state.hidden.has(i) ? state.hidden.delete(i) : state.hidden.add(i); speak(); });
    return button;
  }));
  if (focused !== undefined) $("queries").children[focused]?.focus();
}

function showMask() {
  const q = 4, text = ["[CLS]", ...state.tokens, "[SEP]"];
  const generating = state.mask === "multimodal causal";
  if (generating) text[0] = "[DEC]";
  const names = [...Array(q).keys()].map((i) => `q${i + 1}`).concat(text), isQuery = (i) => i < q;
  const may = { "bi-directional": () => true, "uni-modal": (row, column) => isQuery(row) === isQuery(column),
                "multimodal causal": (row, column) => (isQuery(row) ? isQuery(column) : isQuery(column) || column <= row) }[state.mask];
  $("mask-says").textContent = { "bi-directional": "ITM: all see all, so that details can be compared. Four of the queries are drawn.",
    "uni-modal": "ITC: queries and text must not see each other, or contrast would be too easy.",
    "multimodal causal": "ITG: words see the queries and earlier words; queries see no word, or they could carry the answer." }[state.mask];
  const table = document.createElement("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  head.append(document.createElement("td"), ...names.map((name) => Object.assign(document.createElement("th"), { textContent: name, scope: "col" })));
  names.forEach((name, row) => {
    const line = body.insertRow();
    line.append(Object.assign(document.createElement("th"), { textContent: name, scope: "row" }));
    names.forEach((_, column) => {
      const cell = line.insertCell(), yes = may(row, column);
      cell.className = yes ? (isQuery(column) ? "q" : "t") : "";
      cell.setAttribute("aria-label", `${name} ${yes ? "sees" : "does not see"} ${names[column]}`);
    });
  });
  $("mask").replaceChildren(table);
}

async function compare() {
  const { cosines, match, unknown, tokens, map } = await engine.compare($("sentence").value);
  const best = cosines.indexOf(Math.max(...cosines));
  $("match").textContent = `ITM: it matches with ${percent(match)}. ITC: cosine ${cosines[best].toFixed(2)}, by query ${best + 1}.`
    + (unknown?.length ? ` It does not know: ${unknown.join(", ")}.` : "");
  bars($("cosines"), cosines.map((value, i) => [`q${i + 1}`, value, value.toFixed(2), i === best]));
  state.tokens = tokens;
  if (map) paint($("fits"), map.side, map.data, Math.max(...map.data));
  showMask();
}

function swap() {
  const found = $("sentence").value.split(" ").map((word, i) => [word, i]).filter(([word]) => word in data.colours);
  const other = found.find(([word]) => word !== found[0][0]);
  if (!other) { $("match").textContent = "Name two different colours first."; return; }
  const parts = $("sentence").value.split(" ");
  [parts[found[0][1]], parts[other[1]]] = [other[0], found[0][0]];
  $("sentence").value = parts.join(" ");
  later(compare, "match");
}

function speak() {
  return later(async () => {
    const { text, steps } = await engine.say();
    showWords($("caption"), steps);
    $("caption").dataset.text = text;
    state.looked = null;
    showQueries();
  }, "caption");
}

async function ask() {
  const { steps, unknown } = await engine.ask($("question").value.trim().replace(/\?+$/, data.photographs ? "?" : ""));
  showWords($("answer"), steps);
  if (unknown?.length) $("answer").append(` It has never read: ${unknown.join(", ")}.`);
}

function changed() {
  draw();
  later(async () => { await engine.look(); showQueries(); });
  speak();
  later(compare, "match");
}

function choosePhotograph() {
  state.photograph = $("file").files[0] ?? null;
  state.hidden.clear();
  if (state.photograph?.size > data.most_bytes) {
    $("photograph-says").textContent = `This photograph is larger than ${data.most_bytes >> 20} MB: save it smaller.`;
    state.photograph = null;
  }
  if (!state.photograph) return;
  $("photograph-says").textContent = "Looking …";
  speak().then(() => { $("photograph-says").textContent = $("seen").hidden ? "" : "This is what the encoder sees."; });
  if (data.compares) later(compare, "match");
}

function later(task, place = "status") { // one after another: a session runs one input at a time
  running = running.then(task).catch((error) => {
    if (error instanceof Refusal) { $(place).textContent = error.message; return; }
    $("status").textContent = `Something failed: ${error.message}`;
    throw error;
  });
  window.bridge = running; // tests wait for it
  return running;
}

// --- controls --------------------------------------------------------------------------------------------------------

function mark(id, value) {
  for (const button of $(id).querySelectorAll("button")) button.setAttribute("aria-checked", button.value === value);
}

function radios(id, values, set, first, style) {
  $(id).setAttribute("role", "radiogroup");
  for (const value of values) {
    const button = Object.assign(document.createElement("button"), { type: "button", value, textContent: value });
    button.setAttribute("role", "radio");
    style?.(button, value);
    button.addEventListener("click", () => { mark(id, value); set(value); });
    $(id).append(button);
  }
  mark(id, first);
}

function beginPhotographs() {
  engine = inPython;
  $("about").textContent = `${data.name}, running in Python on this machine: your photograph goes there, is not kept, and goes nowhere else.`;
  $("draw-title").textContent = "1. Choose a photograph";
  $("photograph").hidden = $("fits").hidden = false;
  $("drawing").hidden = $("swap").hidden = true;
  $("comparing").hidden = !data.compares;
  $("question").value = "what is in the picture?";
  $("sentence").value = "a dog";
  $("file").addEventListener("change", choosePhotograph);
  controls(data.ways);
  showMask();
  $("status").textContent = "Ready.";
}

async function load() {
  data = await (await fetch("data.json")).json();
  await (data.photographs ? beginPhotographs() : beginDrawings());
}

function controls(ways) { // what both have
  radios("ways", ways, (value) => { state.way = value; speak(); }, "greedy");
  radios("blocks", data.blocks.map(String), (value) => { state.block = data.blocks.indexOf(Number(value)); showQueries(); }, String(data.blocks[0]),
         (button, value) => (button.textContent = `block ${value}`));
  radios("masks", ["bi-directional", "uni-modal", "multimodal causal"], (value) => { state.mask = value; showMask(); }, state.mask);
  $("asking").addEventListener("submit", (event) => { event.preventDefault(); later(ask, "answer"); });
  $("matching").addEventListener("submit", (event) => { event.preventDefault(); later(compare, "match"); });
}

async function beginDrawings() {
  engine = inBrowser;
  ort = await import("./ort.wasm.min.mjs");
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;
  for (const side of ["lm", "qformer"]) data[side].ids = new Map(data[side].words.map((word, id) => [word, id]));
  const names = ["look", "write", "compare"];
  const sessions = await Promise.all(names.map((name) => ort.InferenceSession.create(`${name}.onnx`, { executionProviders: ["wasm"] })));
  models = Object.fromEntries(names.map((name, i) => [name, sessions[i]]));
  Object.assign(state, { background: "white", shape: "circle", colour: "red", size: "large" });
  const swatch = (table) => (button, value) => { button.className = "swatch"; button.style.setProperty("--colour", `rgb(${table[value]})`); };
  radios("shapes", data.shapes, (value) => (state.shape = value), state.shape);
  radios("colours", Object.keys(data.colours), (value) => (state.colour = value), state.colour, swatch(data.colours));
  radios("sizes", Object.keys(data.sizes), (value) => (state.size = value), state.size);
  radios("backgrounds", Object.keys(data.backgrounds), (value) => { state.background = value; changed(); }, state.background, swatch(data.backgrounds));
  controls(["greedy", "nucleus 0.9", "beams 5"]);
  ["top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right"].forEach((name, i) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
    button.addEventListener("click", () => place(data.side * ((i % 3) + 0.5) / 3, data.side * (Math.floor(i / 3) + 0.5) / 3));
    $("places").append(button);
  });
  $("scene").addEventListener("click", (event) => {
    const box = $("scene").getBoundingClientRect();
    place(((event.clientX - box.left) / box.width) * data.side, ((event.clientY - box.top) / box.height) * data.side);
  });
  $("undo").addEventListener("click", () => { state.things.pop(); changed(); });
  $("clear").addEventListener("click", () => { state.things = []; state.hidden.clear(); changed(); });
  $("random").addEventListener("click", byChance);
  $("swap").addEventListener("click", swap);
  state.things = [{ shape: "circle", colour: "red", size: "large", x: 16, y: 16 }, { shape: "star", colour: "blue", size: "large", x: 48, y: 44 }];
  changed();
  await later(ask);
  $("status").textContent = "Ready. Everything runs in this page, offline once loaded.";
}

window.bridge = load().catch((error) => { $("status").textContent = `The model could not be loaded: ${error.message}`; throw error; });
window.captionOf = async (rgba) => { // for tests: the greedy caption of 64 x 64 pixels (rgba)
  state.seen = await look(Uint8ClampedArray.from(rgba));
  return (await write(data.prompt)).text;
};
