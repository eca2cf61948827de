// An image pair and its registrations in linked planes. The kernel sent the volumes once; the rest happens here.
// A position is a sample's index along each axis; the last axis runs fastest. A 2-D pair is a volume of one slice.

const FIXED_LINE = "#56B4E9", WARPED_LINE = "#E69F00", GRID_LINE = "#F0E442";
const HINTS = {
  checkerboard: "edges should run on from square to square",
  overlay: "green: fixed alone; magenta: the other alone; grey: both",
  difference: "the other minus fixed: orange is too bright, purple too dark",
  "deformation grid": "a square grid on the moving image, seen through the transform",
  Jacobian: "volume of a piece of the fixed image in the moving one: orange grows, purple shrinks, black is folded",
  blend: "0: fixed; 1: the other",
  flicker: "fixed and the other in turn: what jumps does not fit",
};
const HELP = "Click or drag: crosshair. Arrow keys: one sample.", WHEEL = " Wheel, Page Up, Page Down: slices.";
const SLIDES = /^(Arrow|Page|Home$|End$)/; // keys of a slider, with which VS Code would go to another cell
const STATE = ["view", "plane", "at", "strength", "squares", "blend", "labels", "crosshair"];

// What the kernel sent, ready to be looked up.
function unpack(facts, volumes) {
  const solid = facts.shape.length === 3, shape = solid ? facts.shape : [...facts.shape, 1];
  const unsigned = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array }; // by the bytes of a sample
  const array = (name, Type = unsigned[volumes[name]?.byteLength / volumes.fixed.byteLength]) => {
    const view = volumes[name], wide = Type?.BYTES_PER_ELEMENT;
    if (!view) return undefined;
    if (view.byteOffset % wide === 0) return new Type(view.buffer, view.byteOffset, view.byteLength / wide);
    return new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength)); // from an odd address
  };
  return {
    ...facts, solid, shape,
    dim: facts.shape.length,
    strides: [shape[1] * shape[2], shape[2], 1],
    spacing: solid ? facts.spacing : [...facts.spacing, 1],
    colours: facts.colours.map(([r, g, b]) => 0xff000000 | (b << 16) | (g << 8) | r),
    fixed: array("fixed"), moving: array("moving"),
    fixedLabel: array("fixed_label"), movingLabel: array("moving_label"),
    steps: facts.maps.map((_, n) => array(String(n), Int16Array)),
  };
}

// Where a sample lies in the moving image under map n: writes its position into `to`.
function follow(pair, n, strength, index, position, to) {
  const size = pair.fixed.length, scale = strength * (pair.scales[n] ?? 0);
  for (let a = 0; a < 3; a++) to[a] = position[a];
  if (scale) for (let a = 0; a < pair.dim; a++) to[a] += scale * pair.steps[n][a * size + index];
}

// Linear interpolation in the moving image; 0 outside it.
function look(pair, to) {
  const x = to[0], y = to[1], z = to[2], X = pair.shape[0], Y = pair.shape[1], Z = pair.shape[2];
  const i = Math.floor(x), j = Math.floor(y), k = Math.floor(z);
  let sum = 0;
  for (let a = Math.max(i, 0); a < Math.min(i + 2, X); a++) {
    const along = 1 - Math.abs(x - a);
    for (let b = Math.max(j, 0); b < Math.min(j + 2, Y); b++) {
      const weight = along * (1 - Math.abs(y - b)), at = (a * Y + b) * Z;
      for (let c = Math.max(k, 0); c < Math.min(k + 2, Z); c++) {
        sum += weight * (1 - Math.abs(z - c)) * pair.moving[at + c];
      }
    }
  }
  return sum;
}

// The moving image's label nearest to a position, background outside.
function nearest({ shape, movingLabel }, to) {
  const i = Math.round(to[0]), j = Math.round(to[1]), k = Math.round(to[2]);
  if (i < 0 || j < 0 || k < 0 || i >= shape[0] || j >= shape[1] || k >= shape[2]) return 0;
  return movingLabel[(i * shape[1] + j) * shape[2] + k];
}

// det d phi / d x of the cell that starts at a position; of the last cell at the far borders.
function determinant({ shape, strides, steps, scales, dim, fixed }, n, strength, position) {
  const size = fixed.length, scale = strength * scales[n], u = steps[n], d = [1, 0, 0, 0, 1, 0, 0, 0, 1];
  let index = 0;
  for (let a = 0; a < dim; a++) index += Math.max(0, Math.min(position[a], shape[a] - 2)) * strides[a];
  for (let c = 0; c < dim; c++) {
    const at = c * size + index;
    for (let a = 0; a < dim; a++) d[3 * c + a] += scale * (u[at + strides[a]] - u[at]);
  }
  return d[0] * (d[4] * d[8] - d[5] * d[7]) - d[1] * (d[3] * d[8] - d[5] * d[6]) + d[2] * (d[3] * d[7] - d[4] * d[6]);
}

// A square grid on the moving image, one part for each of its directions: how places there are counted in squares.
function grid({ shape, spacing }, directions, size) {
  const extent = directions.map((a) => (shape[a] - 1) * spacing[a]);
  const apart = Math.max(Math.max(...extent) / 20, ...directions.map((a) => 2 * spacing[a]));
  return directions.map((a, i) => {
    const arrays = { values: new Float32Array(size), numbers: new Int32Array(size) };
    return { a, scale: spacing[a] / apart, offset: extent[i] / apart, ...arrays };
  });
}

// The plane across an axis through a position, as arrays whose rows go up: what all its pictures are made of.
function cut(pair, axis, at, n, strength, view) {
  const [x, y] = [0, 1, 2].filter((a) => a !== axis), columns = pair.shape[x], rows = pair.shape[y];
  const plane = { x, y, columns, rows, paths: {} }, position = [...at], to = [0, 0, 0], size = columns * rows;
  for (const name of ["fixed", "moving", "warped"]) plane[name] = new Uint8Array(size);
  if (pair.fixedLabel) plane.fixedLabel = new Uint32Array(size);
  if (pair.movingLabel) for (const name of ["movingLabel", "warpedLabel"]) plane[name] = new Uint32Array(size);
  const unmoved = view === "side by side"; // the only view that shows it
  if (view === "deformation grid") plane.grid = grid(pair, [x, y], size);
  if (view === "Jacobian") plane.jacobian = new Float32Array(size);
  for (let p = 0; p < size; p++) { // up first, where samples lie closer together in memory: half the time
    position[x] = Math.floor(p / rows);
    position[y] = p % rows;
    const q = position[y] * columns + position[x];
    const index = position[0] * pair.strides[0] + position[1] * pair.strides[1] + position[2];
    follow(pair, n, strength, index, position, to);
    plane.fixed[q] = pair.fixed[index];
    if (unmoved) plane.moving[q] = pair.moving[index];
    plane.warped[q] = look(pair, to) + 0.5;
    if (plane.fixedLabel) plane.fixedLabel[q] = pair.fixedLabel[index];
    if (plane.movingLabel && unmoved) plane.movingLabel[q] = pair.movingLabel[index];
    if (plane.movingLabel) plane.warpedLabel[q] = nearest(pair, to);
    for (const { a, scale, offset, values, numbers } of plane.grid ?? []) {
      values[q] = scale * to[a] + offset;
      numbers[q] = Math.floor(values[q]);
    }
    if (plane.jacobian) plane.jacobian[q] = determinant(pair, n, strength, position);
  }
  return plane;
}

// One picture of a plane: its pixels, the first row at the bottom.
function pixels({ colours }, { columns, rows, fixed, moving, warped, jacobian }, what, squares, blend) {
  const image = new ImageData(columns, rows), words = new Uint32Array(image.data.buffer);
  const grey = (v) => 0xff000000 | (v * 0x010101);
  const side = Math.max(1, Math.ceil(Math.max(columns, rows) / squares));
  const odd = (q) => (Math.floor((q % columns) / side) + Math.floor(q / columns / side)) % 2;
  const log3 = (v) => Math.floor(128 + 128 * Math.log(v) / Math.log(3)); // 1/2 is as far from 1 as 2
  const paint = {
    fixed: (q) => grey(fixed[q]),
    moving: (q) => grey(moving[q]),
    warped: (q) => grey(warped[q]),
    checkerboard: (q) => grey(odd(q) ? warped[q] : fixed[q]),
    overlay: (q) => 0xff000000 | (warped[q] << 16) | (fixed[q] << 8) | warped[q],
    difference: (q) => colours[(warped[q] - fixed[q] + 256) >> 1],
    blend: (q) => grey(Math.round(fixed[q] + blend * (warped[q] - fixed[q]))),
    Jacobian: (q) => jacobian[q] <= 0 ? 0xff000000 : colours[Math.max(0, Math.min(255, log3(jacobian[q])))],
  }[what];
  for (let q = 0; q < words.length; q++) words[words.length - columns - q + 2 * (q % columns)] = paint(q);
  return image;
}

// The path where neighbouring numbers differ: halfway between samples, or where `values` cross the larger number.
function border({ columns, rows }, numbers, { values, dashed } = {}) {
  const points = [], path = new Path2D();
  const cross = (a, b, c, r, dc, dr) => {
    if (numbers[a] === numbers[b]) return;
    const t = values ? (Math.max(numbers[a], numbers[b]) - values[a]) / (values[b] - values[a]) : 0.5;
    points.push(c + t * dc + 0.5, rows - (r + t * dr + 0.5));
  };
  for (let r = 0; r < rows - 1; r++) {
    for (let c = 0; c < columns - 1; c++) {
      const q = r * columns + c, up = q + columns, first = numbers[q];
      if (first === numbers[q + 1] && first === numbers[up] && first === numbers[up + 1]) continue;
      if (dashed && (2 * c + 3 * r) % 8 > 3) continue; // gaps in whichever direction the line runs
      points.length = 0;
      cross(q, q + 1, c, r, 1, 0);
      cross(q + 1, up + 1, c + 1, r, 0, 1);
      cross(up, up + 1, c, r + 1, 1, 0);
      cross(q, up, c, r, 0, 1);
      const simple = points.length === 4, ends = simple ? 1 : points.length / 2; // others meet in the middle
      for (let p = 0; p < ends; p++) {
        path.moveTo(points[2 * p], points[2 * p + 1]);
        path.lineTo(simple ? points[2] : c + 1, simple ? points[3] : rows - r - 1);
      }
    }
  }
  return path;
}

// A picture on its canvas: pixels, then the lines and letters over them.
function show(pair, { canvas, what, scratch }, plane, { at, squares, blend, labels, crosshair }) {
  const { x, y, columns, rows } = plane, context = canvas.getContext("2d"), dpr = window.devicePixelRatio;
  const width = Math.round(canvas.clientWidth * dpr), height = Math.round(canvas.clientHeight * dpr);
  if (!width || !height) return; // not on the screen yet
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  scratch.getContext("2d").putImageData(pixels(pair, plane, what, squares, blend), 0, 0);
  const stroke = (path, strokeStyle, wide) => {
    const scaled = new Path2D(); // so that lines are as wide everywhere, whatever the samples' shape
    scaled.addPath(path, new DOMMatrix([width / columns, 0, 0, height / rows, 0, 0]));
    Object.assign(context, { strokeStyle, lineWidth: wide * dpr }).stroke(scaled);
  };
  const outline = (name, colour, dashed) => {
    if (!labels || !plane[name]) return;
    plane.paths[name] ??= border(plane, plane[name], { dashed });
    stroke(plane.paths[name], colour, 1.4);
  };
  context.imageSmoothingEnabled = width < columns;
  context.drawImage(scratch, 0, 0, width, height);
  for (const { numbers, values } of plane.grid ?? []) stroke(border(plane, numbers, { values }), GRID_LINE, 0.9);
  if (what !== "moving") outline("fixedLabel", FIXED_LINE, false);
  if (what !== "fixed") outline(what === "moving" ? "movingLabel" : "warpedLabel", WARPED_LINE, true);
  if (crosshair) {
    const lines = new Path2D(`M 0 ${rows - at[y] - 0.5} h ${columns} M ${at[x] + 0.5} 0 v ${rows}`);
    stroke(lines, "rgba(0, 0, 0, 0.4)", 3);
    stroke(lines, "rgba(255, 255, 255, 0.8)", 1);
  }
  Object.assign(context, { font: `bold ${11 * dpr}px sans-serif`, textAlign: "center", textBaseline: "middle" });
  Object.assign(context, { strokeStyle: "black", lineWidth: 3 * dpr, fillStyle: "white" });
  const edge = 9 * dpr, [left, right] = pair.ends[x] ?? "", [bottom, top] = pair.ends[y] ?? "";
  const across = [[left, edge, height / 2], [right, width - edge, height / 2]];
  for (const end of [...across, [bottom, width / 2, height - edge], [top, width / 2, edge]]) {
    if (end[0]) context.strokeText(...end);
    if (end[0]) context.fillText(...end);
  }
}

// What is known of one point, as the rows of a table: fixed, moving, and each registration.
function read(pair, at, strength) {
  const index = at.reduce((sum, i, a) => sum + i * pair.strides[a], 0), grid = at.slice(0, pair.dim);
  const ends = pair.maps.map((_, n) => {
    const to = [0, 0, 0];
    follow(pair, n, strength, index, at, to);
    return to;
  });
  const intensities = [pair.fixed[index], pair.moving[index], ...ends.map((to) => look(pair, to))];
  const table = [
    [`at (${grid.join(", ")})`, "fixed", "moving", ...pair.maps],
    ["intensity", ...intensities.map((v) => (v / 255).toFixed(2))],
  ];
  if (pair.fixedLabel || pair.movingLabel) {
    const here = [pair.fixedLabel?.[index], pair.movingLabel?.[index]];
    const there = ends.map((to) => pair.movingLabel && nearest(pair, to));
    table.push(["label", ...[...here, ...there].map((number) => pair.names[number] ?? "")]);
  }
  if (!pair.maps.length) return table;
  const moved = ends.map((to) => grid.map((i, a) => (to[a] - i) * pair.moving_spacing[a]));
  const row = (name, ...values) => table.push([name, "", "", ...values]);
  row(`displacement, ${pair.unit}`, ...moved.map((u) => `(${u.map((v) => v.toFixed(2)).join(", ")})`));
  row("its length", ...moved.map((u) => Math.hypot(...u).toFixed(2)));
  row("Jacobian", ...ends.map((_, n) => determinant(pair, n, strength, at).toFixed(2)));
  return table;
}

function render({ model, el }) {
  const pair = unpack(model.get("facts"), model.get("volumes")), axes = pair.solid ? [2, 1, 0] : [2], controls = {};
  const make = (tag, parent, given = {}) => parent.appendChild(Object.assign(document.createElement(tag), given));
  const get = (name) => model.get(name), position = () => (pair.solid ? get("at") : [...get("at"), 0]);
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const move = (to) => {
    const inside = (i, a) => Math.max(0, Math.min(pair.shape[a] - 1, to[a] ?? i));
    set("at", position().map(inside).slice(0, pair.dim));
  };

  // The controls are the browser's own: Tab reaches them, arrows move them.
  const root = make("div", el, { className: "fmsam-explorer" });
  make("h4", root, { textContent: pair.title });
  const [above, below] = [0, 1].map(() => make("div", root, { className: "controls" }));
  const control = (row, name, input, value = () => get(name), write = (value) => set(name, value)) => {
    const label = make("label", row, { textContent: name }), field = input.type === "checkbox" ? "checked" : "value";
    label.append(input);
    input.dataset.lmSuppressShortcuts = true; // else JupyterLab takes the arrow keys for its own
    const said = input.type === "range" ? make("span", label, { className: "value" }) : null;
    input.addEventListener("input", () => write(said ? Number(input.value) : input[field]));
    if (said) input.addEventListener("keydown", (event) => SLIDES.test(event.key) && event.stopPropagation());
    const update = () => {
      input[field] = value();
      if (said) said.textContent = value();
    };
    controls[name] = { label, update };
  };
  const input = (given) => Object.assign(document.createElement("input"), given);
  const range = (min, max, step) => input({ type: "range", min, max, step });
  const menu = (options) => {
    const select = document.createElement("select");
    for (const textContent of options) make("option", select, { textContent });
    return select;
  };
  control(above, "view", menu(pair.views));
  if (pair.solid) control(above, "plane", menu(["all three", ...axes.map((a) => pair.planes[a])]));
  if (pair.fixedLabel || pair.movingLabel) control(above, "labels", input({ type: "checkbox" }));
  control(above, "crosshair", input({ type: "checkbox" }));
  if (pair.maps.length) control(below, "strength", range(0, 1, 0.05));
  control(below, "squares", range(2, 24, 1));
  control(below, "blend", range(0, 1, 0.05));
  for (const a of pair.solid ? axes : []) {
    const slider = range(0, pair.shape[a] - 1, 1);
    control(below, pair.planes[a], slider, () => get("at")[a], (value) => move({ [a]: value }));
  }
  const hint = make("div", root, { className: "hint" }), legend = make("div", root, { className: "hint legend" });
  make("span", legend, { textContent: "fixed labels" }).style.borderColor = FIXED_LINE;
  make("span", legend, { textContent: "the other's labels" }).style.borderColor = WARPED_LINE;
  const body = make("div", root, { className: "body" });
  const pictures = make("div", body, { className: "pictures" }), table = make("table", body, { ariaLive: "polite" });

  function canvas(figure, axis, name) {
    const [x, y] = [0, 1, 2].filter((a) => a !== axis);
    const ariaLabel = [name, pair.planes[axis]].filter(Boolean).join(", ") || "picture";
    const made = make("canvas", figure, { tabIndex: 0, role: "application", ariaLabel, ariaDescription: HELP });
    Object.assign(made.dataset, { columns: pair.shape[x], rows: pair.shape[y], lmSuppressShortcuts: true });
    made.style.aspectRatio = `${pair.shape[x] * pair.spacing[x]} / ${pair.shape[y] * pair.spacing[y]}`;
    const point = ({ clientX, clientY }) => {
      const { left, top, width, height } = made.getBoundingClientRect(), up = 1 - (clientY - top) / height;
      move({ [x]: Math.floor((clientX - left) / width * pair.shape[x]), [y]: Math.floor(up * pair.shape[y]) });
    };
    made.addEventListener("pointerdown", (event) => {
      made.setPointerCapture(event.pointerId);
      point(event);
    });
    made.addEventListener("pointermove", (event) => event.buttons & 1 && point(event));
    const keys = { ArrowLeft: [x, -1], ArrowRight: [x, 1], ArrowDown: [y, -1], ArrowUp: [y, 1] };
    if (pair.solid) Object.assign(keys, { PageUp: [axis, 1], PageDown: [axis, -1] });
    made.addEventListener("keydown", (event) => {
      if (!keys[event.key]) return;
      const [a, step] = keys[event.key];
      event.preventDefault();
      event.stopPropagation(); // else VS Code goes to another cell
      move({ [a]: get("at")[a] + step });
    });
    let turned = 0;
    const wheel = (event) => {
      event.preventDefault();
      turned += event.deltaMode ? 33 * event.deltaY : event.deltaY; // lines or pixels; a notch is about 100 of these
      const slices = Math.trunc(turned / 100);
      turned -= 100 * slices;
      if (slices) move({ [axis]: get("at")[axis] - slices });
    };
    if (pair.solid) made.addEventListener("wheel", wheel, { passive: false });
    return made;
  }

  // One picture a plane: the planes in a row. Several: a column each, and a row for each plane.
  let panels = [], arranged = "", written = "", planes = {}, second = false, due = 0;
  function arrange(pictured, shown) {
    const row = pictured.length === 1, columns = row ? shown.length : pictured.length;
    const wide = columns === 1 ? 520 : shown.length === 1 ? 360 : row ? 300 : 230;
    pictures.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    pictures.style.width = `min(100%, ${columns * wide}px)`;
    pictures.replaceChildren();
    observer.disconnect();
    panels = shown.flatMap((axis) => pictured.map((picture) => {
      const figure = make("figure", pictures), made = canvas(figure, axis, picture.name);
      observer.observe(made);
      const scratch = new OffscreenCanvas(made.dataset.columns, made.dataset.rows);
      return { ...picture, axis, canvas: made, scratch, caption: make("figcaption", figure) };
    }));
  }

  function draw() {
    due = 0;
    const state = { ...Object.fromEntries(STATE.map((name) => [name, get(name)])), at: position() };
    const { view, at, plane, labels } = state, strength = pair.maps.length ? state.strength : 0;
    const shown = pair.solid && plane !== "all three" ? [pair.planes.indexOf(plane)] : axes;
    let pictured = (pair.maps.length > 1 ? pair.maps : [""]).map((name, n) => ({ name, n }));
    if (view === "side by side") {
      pictured = ["fixed", "moving"].map((name) => ({ name, n: 0, what: name }));
      pictured.push(...pair.maps.map((name, n) => ({ name, n, what: "warped" })));
    }
    const wanted = JSON.stringify([pictured, shown]);
    if (wanted !== arranged) arrange(pictured, shown);
    arranged = wanted;
    for (const { update } of Object.values(controls)) update();
    controls.squares.label.hidden = view !== "checkerboard";
    controls.blend.label.hidden = view !== "blend";
    legend.hidden = !controls.labels || !labels;
    hint.textContent = (HINTS[view] ? `${HINTS[view]}. ` : "") + HELP + (pair.solid ? WHEEL : "");
    const alone = { "deformation grid": "warped", flicker: second ? "warped" : "fixed" }[view] ?? view;
    const fresh = {}; // the planes in view: what has not changed need not be cut again
    for (const panel of panels) {
      const key = [panel.axis, at[panel.axis], panel.n, strength, view].join();
      fresh[key] ??= planes[key] ?? cut(pair, panel.axis, at, panel.n, strength, view);
      show(pair, { what: alone, ...panel }, fresh[key], state);
      const place = pair.solid ? `${pair.planes[panel.axis]} ${at[panel.axis]}` : "";
      const turn = view !== "flicker" ? "" : second ? "the other" : "fixed";
      panel.caption.textContent = [panel.name, turn, place].filter(Boolean).join(", ");
    }
    planes = fresh;
    const lines = read(pair, at, strength);
    if (written === JSON.stringify(lines)) return; // a screen reader need not hear it again
    written = JSON.stringify(lines);
    table.replaceChildren();
    const parts = [make("thead", table), make("tbody", table)];
    lines.forEach((line, i) => {
      const row = make("tr", parts[Math.min(i, 1)]);
      line.forEach((textContent, j) => make(i && j ? "td" : "th", row, { textContent }));
    });
  }

  const later = () => { due ||= requestAnimationFrame(draw); };
  const observer = new ResizeObserver(later);
  for (const name of STATE) model.on(`change:${name}`, later);
  const timer = setInterval(() => {
    if (get("view") !== "flicker") return;
    second = !second;
    later();
  }, 400);
  later();
  return () => {
    for (const name of STATE) model.off(`change:${name}`, later);
    clearInterval(timer);
    cancelAnimationFrame(due);
    observer.disconnect();
  };
}

export default { render };
