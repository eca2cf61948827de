// An image pair and its registrations in linked planes. The kernel sent the volumes once; everything else happens here.
// A position is a sample's index along each axis; a volume's last axis runs fastest. A 2-D pair is a volume of one slice.

const FIXED_LINE = "#56B4E9", WARPED_LINE = "#E69F00", GRID_LINE = "#F0E442";
const HINTS = {
  "side by side": "",
  checkerboard: "edges should run on from square to square",
  overlay: "green: fixed alone; magenta: the other alone; grey: both",
  difference: "the other minus fixed: orange is too bright, purple too dark",
  "deformation grid": "a square grid on the moving image, seen through the transform",
  Jacobian: "volume of a piece of the fixed image in the moving one: purple shrinks, orange grows (to 3 times), black is folded",
  blend: "0: fixed; 1: the other",
  flicker: "fixed and the other in turn: what moves does not fit",
};
const HELP = "Click or drag: crosshair. Wheel, Page Up, Page Down: slices. Arrow keys: one sample.";

// What the kernel sent, ready to be looked up.
function unpack(model) {
  const facts = model.get("facts"), volumes = model.get("volumes");
  const solid = facts.shape.length === 3;
  const shape = solid ? facts.shape : [...facts.shape, 1];
  const array = (name, Type) => {
    const view = volumes[name], wide = Type.BYTES_PER_ELEMENT;
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
    fixed: array("fixed", Uint8Array), moving: array("moving", Uint8Array),
    fixedLabel: array("fixed_label", Uint16Array), movingLabel: array("moving_label", Uint16Array),
    steps: facts.maps.map((_, n) => array(String(n), Int16Array)),
  };
}

// Where the sample of this index lies in the moving image: writes its position into `to`.
function follow(pair, n, strength, index, position, to) {
  const size = pair.fixed.length, scale = strength * (pair.scales[n] ?? 0), steps = pair.steps[n];
  for (let a = 0; a < 3; a++) to[a] = position[a] + (scale && a < pair.dim ? scale * steps[a * size + index] : 0);
}

// Linear interpolation in the moving image; nothing, 0, outside it.
function look(pair, p) {
  const [X, Y, Z] = pair.shape, [sx, sy] = pair.strides, m = pair.moving;
  const i = Math.floor(p[0]), j = Math.floor(p[1]), k = Math.floor(p[2]);
  const x = p[0] - i, y = p[1] - j, z = p[2] - k;
  let sum = 0;
  for (let a = 0; a < 2; a++) {
    const wx = a ? x : 1 - x;
    if (!wx || i + a < 0 || i + a >= X) continue;
    for (let b = 0; b < 2; b++) {
      const wy = wx * (b ? y : 1 - y);
      if (!wy || j + b < 0 || j + b >= Y) continue;
      const at = (i + a) * sx + (j + b) * sy + k;
      if (k >= 0 && k < Z) sum += wy * (1 - z) * m[at];
      if (z && k + 1 >= 0 && k + 1 < Z) sum += wy * z * m[at + 1];
    }
  }
  return sum;
}

// The moving image's label nearest to a position, background outside.
function nearest(pair, p) {
  const i = Math.round(p[0]), j = Math.round(p[1]), k = Math.round(p[2]), [X, Y, Z] = pair.shape;
  if (i < 0 || j < 0 || k < 0 || i >= X || j >= Y || k >= Z) return 0;
  return pair.movingLabel[i * pair.strides[0] + j * pair.strides[1] + k];
}

// det d phi / d x of the cell that starts at a position; of the last cell at the far borders.
function determinant(pair, n, strength, position) {
  const { shape, strides, steps, scales, dim } = pair, size = pair.fixed.length;
  let index = 0;
  for (let a = 0; a < dim; a++) index += Math.max(0, Math.min(position[a], shape[a] - 2)) * strides[a];
  const scale = strength * scales[n], u = steps[n];
  const d = (c, a) => {
    const edge = c < dim && a < dim ? u[c * size + index + strides[a]] - u[c * size + index] : 0;
    return (c === a ? 1 : 0) + scale * edge;
  };
  return d(0, 0) * (d(1, 1) * d(2, 2) - d(1, 2) * d(2, 1)) - d(0, 1) * (d(1, 0) * d(2, 2) - d(1, 2) * d(2, 0))
    + d(0, 2) * (d(1, 0) * d(2, 1) - d(1, 1) * d(2, 0));
}

// The plane across an axis through a position, as arrays whose rows go up: what all its pictures are made of.
function cut(pair, axis, at, n, strength, view) {
  const [x, y] = [0, 1, 2].filter((a) => a !== axis);
  const columns = pair.shape[x], rows = pair.shape[y], size = columns * rows;
  const plane = { axis, x, y, columns, rows };
  for (const name of ["fixed", "moving", "warped"]) plane[name] = new Uint8Array(size);
  if (pair.fixedLabel) plane.fixedLabel = new Uint16Array(size);
  if (pair.movingLabel) for (const name of ["movingLabel", "warpedLabel"]) plane[name] = new Uint16Array(size);
  if (view === "deformation grid") plane.phi = [new Float32Array(size), new Float32Array(size)];
  if (view === "Jacobian") plane.jacobian = new Float32Array(size);
  const position = [...at], to = [0, 0, 0];
  for (let row = 0, q = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, q++) {
      position[x] = column;
      position[y] = row;
      const index = position[0] * pair.strides[0] + position[1] * pair.strides[1] + position[2];
      plane.fixed[q] = pair.fixed[index];
      plane.moving[q] = pair.moving[index];
      follow(pair, n, strength, index, position, to);
      plane.warped[q] = look(pair, to) + 0.5;
      if (plane.fixedLabel) plane.fixedLabel[q] = pair.fixedLabel[index];
      if (plane.movingLabel) plane.movingLabel[q] = pair.movingLabel[index];
      if (plane.movingLabel) plane.warpedLabel[q] = nearest(pair, to);
      if (plane.phi) [x, y].forEach((a, i) => { plane.phi[i][q] = to[a] * pair.spacing[a]; });
      if (plane.jacobian) plane.jacobian[q] = determinant(pair, n, strength, position);
    }
  }
  return plane;
}

// One picture of a plane: its pixels, the first row at the bottom.
function pixels(pair, plane, what, squares, blend) {
  const { columns, rows, fixed, moving, warped, jacobian } = plane;
  const image = new ImageData(columns, rows), words = new Uint32Array(image.data.buffer);
  const grey = (v) => 0xff000000 | (v * 0x010101);
  const side = Math.max(1, Math.ceil(Math.max(columns, rows) / squares));
  const inverted = (c, r) => (Math.floor(c / side) + Math.floor(r / side)) % 2;
  const log3 = (v) => Math.floor(128 + 128 * Math.log(v) / Math.log(3)); // 1/2 is as far from 1 as 2
  const paint = {
    fixed: (q) => grey(fixed[q]),
    moving: (q) => grey(moving[q]),
    warped: (q) => grey(warped[q]),
    checkerboard: (q, c, r) => grey(inverted(c, r) ? warped[q] : fixed[q]),
    overlay: (q) => 0xff000000 | (warped[q] << 16) | (fixed[q] << 8) | warped[q],
    difference: (q) => pair.colours[(warped[q] - fixed[q] + 256) >> 1],
    blend: (q) => grey(Math.round(fixed[q] + blend * (warped[q] - fixed[q]))),
    Jacobian: (q) => jacobian[q] <= 0 ? 0xff000000 : pair.colours[Math.max(0, Math.min(255, log3(jacobian[q])))],
  }[what];
  for (let row = 0, q = 0; row < rows; row++) {
    const start = (rows - 1 - row) * columns;
    for (let column = 0; column < columns; column++, q++) words[start + column] = paint(q, column, row);
  }
  return image;
}

// The path where neighbouring numbers differ: halfway between samples, or where `values` cross the larger number.
function border(context, plane, numbers, { values, dashed } = {}) {
  const { columns, rows } = plane, points = [];
  const cross = (a, b, c, r, dc, dr) => {
    if (numbers[a] === numbers[b]) return;
    const t = values ? (Math.max(numbers[a], numbers[b]) - values[a]) / (values[b] - values[a]) : 0.5;
    points.push([c + t * dc + 0.5, rows - (r + t * dr + 0.5)]);
  };
  context.beginPath();
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
      const meet = points.length === 2 ? points.pop() : [c + 1, rows - r - 1]; // three structures or more: in the middle
      for (const point of points) {
        context.moveTo(...point);
        context.lineTo(...meet);
      }
    }
  }
}

// A picture on its canvas: pixels, then the lines over them.
function show(pair, panel, plane, { view, at, squares, blend, labels, crosshair, second }) {
  const { canvas, what } = panel, { x, y, columns, rows } = plane, context = canvas.getContext("2d");
  const dpr = window.devicePixelRatio, width = Math.round(canvas.clientWidth * dpr);
  const height = Math.round(canvas.clientHeight * dpr);
  if (!width || !height) return; // not on the screen yet
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const scratch = panel.scratch ??= new OffscreenCanvas(columns, rows);
  scratch.getContext("2d").putImageData(pixels(pair, plane, what ?? (second ? "warped" : "fixed"), squares, blend), 0, 0);
  context.imageSmoothingEnabled = width < columns;
  const samples = () => context.setTransform(width / columns, 0, 0, height / rows, 0, 0);
  const stroke = (colour, wide) => {
    context.resetTransform(); // lines are as wide everywhere, whatever the samples' shape
    Object.assign(context, { strokeStyle: colour, lineWidth: wide * dpr });
    context.stroke();
    samples();
  };
  samples();
  context.drawImage(scratch, 0, 0);
  if (plane.phi) {
    const extent = [x, y].map((a) => (pair.shape[a] - 1) * pair.spacing[a]), apart = Math.max(...extent) / 20;
    plane.phi.forEach((phi, i) => {
      const values = phi.map((mm) => (mm + extent[i]) / apart);
      border(context, plane, values.map(Math.floor), { values });
      stroke(GRID_LINE, 0.9);
    });
  }
  const outline = (numbers, colour, dashed) => {
    if (!labels || !numbers) return;
    border(context, plane, numbers, { dashed });
    stroke(colour, 1.4);
  };
  if (what !== "moving") outline(plane.fixedLabel, FIXED_LINE, false);
  if (what !== "fixed") outline(what === "moving" ? plane.movingLabel : plane.warpedLabel, WARPED_LINE, true);
  if (crosshair) {
    const column = at[x] + 0.5, row = rows - at[y] - 0.5, gap = 6 * columns / width, tall = 6 * rows / height;
    context.beginPath();
    for (const [from, to] of [[0, column - gap], [column + gap, columns]]) {
      context.moveTo(from, row);
      context.lineTo(to, row);
    }
    for (const [from, to] of [[0, row - tall], [row + tall, rows]]) {
      context.moveTo(column, from);
      context.lineTo(column, to);
    }
    stroke("rgba(0, 0, 0, 0.5)", 3);
    stroke("rgba(255, 255, 255, 0.8)", 1);
  }
  context.resetTransform();
  Object.assign(context, { font: `${11 * dpr}px system-ui, sans-serif`, textAlign: "center", textBaseline: "middle" });
  const edge = 9 * dpr, [left, right] = pair.ends[x] ?? "", [bottom, top] = pair.ends[y] ?? "";
  const sides = [[left, edge, height / 2], [right, width - edge, height / 2], [bottom, width / 2, height - edge], [top, width / 2, edge]];
  for (const [side, across, down] of sides) {
    if (!side) continue;
    context.fillStyle = "rgba(0, 0, 0, 0.55)";
    context.fillRect(across - 6 * dpr, down - 7 * dpr, 12 * dpr, 14 * dpr);
    context.fillStyle = "white";
    context.fillText(side, across, down);
  }
}

// What is known of one point, as the rows of a table: a heading, fixed, moving, and each registration.
function facts(pair, at, strength) {
  const index = at.reduce((sum, i, a) => sum + i * pair.strides[a], 0);
  const ends = pair.maps.map((_, n) => {
    const to = [0, 0, 0];
    follow(pair, n, strength, index, at, to);
    return to;
  });
  const intensity = (v) => (v / 255).toFixed(2), short = at.slice(0, pair.dim);
  const label = (numbers, number) => (numbers ? pair.names[number()] : "");
  const lines = [
    [`at (${short.join(", ")})`, "fixed", "moving", ...pair.maps],
    ["intensity", ...[pair.fixed[index], pair.moving[index], ...ends.map((to) => look(pair, to))].map(intensity)],
  ];
  if (pair.fixedLabel || pair.movingLabel) {
    const there = ends.map((to) => label(pair.movingLabel, () => nearest(pair, to)));
    const here = [pair.fixedLabel, pair.movingLabel].map((numbers) => label(numbers, () => numbers[index]));
    lines.push(["label", ...here, ...there]);
  }
  if (pair.maps.length) {
    const moved = ends.map((to) => short.map((i, a) => (to[a] - i) * pair.moving_spacing[a]));
    const written = moved.map((u) => `(${u.map((v) => v.toFixed(2)).join(", ")}), ${Math.hypot(...u).toFixed(2)} long`);
    lines.push([`displacement, ${pair.unit}`, "", "", ...written]);
    lines.push(["Jacobian", "", "", ...ends.map((_, n) => determinant(pair, n, strength, at).toFixed(2))]);
  }
  return lines;
}

function render({ model, el }) {
  const pair = unpack(model), axes = pair.solid ? [2, 1, 0] : [2];
  const make = (tag, parent, properties = {}) => parent.appendChild(Object.assign(document.createElement(tag), properties));
  const get = (name) => model.get(name);
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const position = () => (pair.solid ? get("at") : [...get("at"), 0]);
  const move = (changes) => {
    const at = position();
    set("at", at.map((i, a) => Math.max(0, Math.min(pair.shape[a] - 1, changes[a] ?? i))).slice(0, pair.dim));
  };
  const root = make("div", el, { className: "fmsam" });
  make("h4", root, { textContent: pair.title });

  // The controls are the browser's own: Tab reaches them, arrows move them.
  const controls = {};
  const control = (row, name, input, read = () => get(name), write = (value) => set(name, value)) => {
    const label = make("label", row, { textContent: name });
    label.append(input);
    const field = input.type === "checkbox" ? "checked" : "value";
    const said = input.type === "range" ? make("span", label, { className: "value" }) : {};
    const value = () => (input.type === "range" ? Number(input.value) : input[field]);
    input.addEventListener("input", () => write(value()));
    const update = () => { said.textContent = input[field] = read(); };
    controls[name] = { label, update };
  };
  const input = (properties) => Object.assign(document.createElement("input"), properties);
  const range = (min, max, step) => input({ type: "range", min, max, step });
  const menu = (options) => {
    const select = document.createElement("select");
    for (const option of options) make("option", select, { textContent: option });
    return select;
  };
  const [above, below] = [0, 1].map(() => make("div", root, { className: "controls" }));
  control(above, "view", menu(pair.views));
  if (pair.solid) control(above, "plane", menu(["all three", ...axes.map((a) => pair.planes[a])]));
  if (pair.fixedLabel || pair.movingLabel) control(above, "labels", input({ type: "checkbox" }));
  control(above, "crosshair", input({ type: "checkbox" }));
  if (pair.maps.length) control(below, "strength", range(0, 1, 0.05));
  control(below, "squares", range(2, 24, 1));
  control(below, "blend", range(0, 1, 0.05));
  for (const a of pair.solid ? axes : []) {
    control(below, pair.planes[a], range(0, pair.shape[a] - 1, 1), () => get("at")[a], (value) => move({ [a]: value }));
  }
  const hint = make("div", root, { className: "hint" }), legend = make("div", root, { className: "hint legend" });
  make("span", legend, { textContent: "fixed labels" }).style.borderColor = FIXED_LINE;
  make("span", legend, { textContent: "the other's labels", className: "dashed" }).style.borderColor = WARPED_LINE;
  const body = make("div", root, { className: "body" });
  const pictures = make("div", body, { className: "pictures" }), table = make("table", body);
  table.setAttribute("aria-live", "polite");

  let panels = [], arranged = "", written = "", planes = {}, second = false, due = 0;

  function canvas(figure, axis, name) {
    const [x, y] = [0, 1, 2].filter((a) => a !== axis), made = make("canvas", figure, { tabIndex: 0 });
    made.setAttribute("aria-label", [name, pair.planes[axis]].filter(Boolean).join(", "));
    Object.assign(made.dataset, { columns: pair.shape[x], rows: pair.shape[y] });
    made.style.aspectRatio = `${pair.shape[x] * pair.spacing[x]} / ${pair.shape[y] * pair.spacing[y]}`;
    const point = ({ clientX, clientY }) => {
      const box = made.getBoundingClientRect();
      const across = (clientX - box.left) / box.width, up = 1 - (clientY - box.top) / box.height;
      move({ [x]: Math.floor(across * pair.shape[x]), [y]: Math.floor(up * pair.shape[y]) });
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
      event.stopPropagation(); // the notebook has its own use for arrows
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

  // One registration: its planes in a row. More pictures: a column each, and a row for each plane.
  function arrange(pictured, shown) {
    const columns = pictured.length === 1 ? shown.length : pictured.length;
    const wide = columns === 1 ? 520 : columns === shown.length && pictured.length === 1 ? 300 : shown.length === 1 ? 360 : 230;
    pictures.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    pictures.style.width = `min(100%, ${columns * wide}px)`;
    pictures.replaceChildren();
    panels = shown.flatMap((axis) => pictured.map((one) => {
      const figure = make("figure", pictures);
      return { ...one, axis, canvas: canvas(figure, axis, one.name), caption: make("figcaption", figure) };
    }));
    observer.disconnect();
    panels.forEach((panel) => observer.observe(panel.canvas));
  }

  function draw() {
    due = 0;
    const names = ["view", "strength", "squares", "blend", "labels", "crosshair"];
    const state = { ...Object.fromEntries(names.map((name) => [name, get(name)])), at: position(), second };
    const { view, at } = state, strength = pair.maps.length ? state.strength : 0;
    const shown = pair.solid && get("plane") !== "all three" ? [pair.planes.indexOf(get("plane"))] : axes;
    const what = view === "deformation grid" ? "warped" : view === "flicker" ? null : view;
    let pictured = (pair.maps.length > 1 ? pair.maps : [""]).map((name, n) => ({ name, n, what }));
    if (view === "side by side") {
      pictured = ["fixed", "moving"].map((name) => ({ name, n: 0, what: name }));
      pictured.push(...pair.maps.map((name, n) => ({ name, n, what: "warped" })));
    }
    if (arranged !== (arranged = JSON.stringify([pictured, shown]))) arrange(pictured, shown);
    for (const { update } of Object.values(controls)) update();
    controls.squares.label.hidden = view !== "checkerboard";
    controls.blend.label.hidden = view !== "blend";
    legend.hidden = !controls.labels || !state.labels;
    hint.textContent = [HINTS[view], HELP].filter(Boolean).join(". ");
    const fresh = {};
    for (const panel of panels) {
      const key = [panel.axis, at[panel.axis], panel.n, strength, view].join();
      const plane = fresh[key] ??= planes[key] ?? cut(pair, panel.axis, at, panel.n, strength, view);
      show(pair, panel, plane, state);
      const said = [panel.name, what ? "" : second ? "the other" : "fixed", pair.solid ? `${pair.planes[panel.axis]} ${at[panel.axis]}` : ""];
      panel.caption.textContent = said.filter(Boolean).join(", ");
    }
    planes = fresh;
    const lines = facts(pair, at, strength);
    if (written === (written = JSON.stringify(lines))) return; // a screen reader need not hear it again
    table.replaceChildren();
    const parts = [make("thead", table), make("tbody", table)];
    lines.forEach((line, i) => {
      const row = make("tr", parts[Math.min(i, 1)]);
      line.forEach((textContent, j) => make(i && j ? "td" : "th", row, { textContent }));
    });
  }

  const later = () => { due ||= requestAnimationFrame(draw); };
  const observer = new ResizeObserver(later);
  const watched = ["view", "plane", "at", "strength", "squares", "blend", "labels", "crosshair"];
  for (const name of watched) model.on(`change:${name}`, later);
  const timer = setInterval(() => {
    if (get("view") !== "flicker") return;
    second = !second;
    later();
  }, 400);
  later();
  return () => {
    for (const name of watched) model.off(`change:${name}`, later);
    clearInterval(timer);
    cancelAnimationFrame(due);
    observer.disconnect();
  };
}

export default { render };
