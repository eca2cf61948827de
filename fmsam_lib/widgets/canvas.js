// Panels of pixels and lines, and facts below them; with a surface, a point that is dragged over it, or over its points.
// Places in a panel run from 0 to 1, to the right and up.

const WIDE = 600; // samples of a canvas from left to right; it is shown at about half of that
const STYLE = `
.fmsam-canvas { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; margin: 4px 0;
  color: var(--jp-ui-font-color1, inherit); }
.fmsam-canvas .surface { position: relative; flex: 0 1 460px; touch-action: none; user-select: none; cursor: crosshair; }
.fmsam-canvas .surface:focus-visible { outline: 2px solid #0072B2; }
.fmsam-canvas .surface img { width: 100%; display: block; pointer-events: none; }
.fmsam-canvas .point { position: absolute; width: 14px; height: 14px; margin: -9px; border-radius: 50%;
  background: #D55E00; border: 2px solid white; box-shadow: 0 0 0 1px black; pointer-events: none; }
.fmsam-canvas .side { flex: 1 1 330px; max-width: 560px; }
.fmsam-canvas .panels { display: flex; gap: 8px; }
.fmsam-canvas figure { margin: 0; flex: 1 1 0; min-width: 0; max-width: 270px; }
.fmsam-canvas canvas { width: 100%; display: block; }
.fmsam-canvas figcaption, .fmsam-canvas td { font-size: 13px; text-align: left; padding: 1px 10px 1px 0; margin: 0; }
.fmsam-canvas td + td { font-variant-numeric: tabular-nums; }
.fmsam-canvas button { margin: 4px 6px 4px 0; }`;

function add(parent, tag, properties = {}) {
  const element = document.createElement(tag);
  Object.assign(element, properties);
  return parent.appendChild(element);
}

// The kernel's bytes come as views into a longer message.
const bytes = (view) => view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);

function paint(canvas, { tall, pixels, columns, lines, texts }) {
  canvas.width = WIDE;
  canvas.height = Math.round(WIDE * tall);
  const context = canvas.getContext("2d");
  canvas.style.background = "white";
  if (columns) {
    const image = new ImageData(new Uint8ClampedArray(bytes(pixels)), columns);
    const small = new OffscreenCanvas(columns, image.height);
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
  }
  const place = (x, y) => [x * canvas.width, (1 - y) * canvas.height];
  for (const { points, color, width, dashed } of lines) {
    const xy = new Float32Array(bytes(points));
    context.strokeStyle = color;
    context.lineWidth = 2.5 * width;
    context.setLineDash(dashed ? [10, 6] : []);
    context.beginPath();
    for (let i = 0, down = false; i < xy.length; i += 2) {
      const broken = Number.isNaN(xy[i]);
      if (!broken) context[down ? "lineTo" : "moveTo"](...place(xy[i], xy[i + 1]));
      down = !broken;
    }
    context.stroke();
  }
  context.font = "40px sans-serif";
  context.fillStyle = "black";
  for (const [x, y, text] of texts) context.fillText(text, ...place(x, y));
}

// A point on the surface. One move at a time goes to the kernel; of those made meanwhile, only the last one goes next.
function walkable(model, parent) {
  const { picture, box, extent, places, points } = model.get("surface");
  const [left, top, width, height] = box; // of the axes, as shares of the picture
  const [low, high, bottom, up] = extent;
  const stage = add(parent, "div", { className: "surface", tabIndex: 0, role: "application" });
  stage.ariaLabel = "picture with a point: drag it, or move it with the arrow keys";
  stage.dataset.lmSuppressShortcuts = true; // arrow keys are for the point, not for the notebook
  const src = URL.createObjectURL(new Blob([bytes(picture)], { type: "image/png" }));
  add(stage, "img", { src, alt: "", onload: () => URL.revokeObjectURL(src) });
  const point = add(stage, "div", { className: "point" });
  let here = model.get("point"), sent = null;

  const mark = () => {
    stage.dataset.point = here;
    point.style.left = `${100 * (left + (width * (here[0] - low)) / (high - low))}%`;
    point.style.top = `${100 * (top + (height * (up - here[1])) / (up - bottom))}%`;
  };
  const send = () => {
    if (sent || String(here) === String(model.get("answered"))) return;
    sent = performance.now();
    model.set("point", here);
    model.save_changes();
  };
  const move = (x, y, number) => {
    const apart = (p) => Math.hypot((p[0] - x) / (high - low), (p[1] - y) / (up - bottom));
    if (points) here = points[number] ?? points.reduce((best, p) => (apart(p) < apart(best) ? p : best));
    else here = [Math.min(high, Math.max(low, x)), Math.min(up, Math.max(bottom, y))];
    mark();
    send();
  };
  const follow = (event) => {
    const area = stage.getBoundingClientRect();
    const x = (event.clientX - area.left) / area.width, y = (event.clientY - area.top) / area.height;
    move(low + ((x - left) / width) * (high - low), up - ((y - top) / height) * (up - bottom));
  };
  stage.onpointerdown = (event) => {
    stage.setPointerCapture(event.pointerId);
    follow(event);
  };
  stage.onpointermove = (event) => event.buttons & 1 && follow(event);
  stage.onkeydown = (event) => {
    const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] || [];
    if (x === undefined) return;
    event.preventDefault();
    event.stopPropagation(); // else VS Code goes to another cell
    const step = event.shiftKey ? 0.1 : 0.02;
    if (points) move(...(points[here[2] + x + y] ?? here));
    else move(here[0] + x * step * (high - low), here[1] + y * step * (up - bottom));
  };
  mark();
  const answered = () => {
    stage.dataset.drawn = model.get("answered");
    if (sent) stage.dataset.milliseconds = performance.now() - sent; // from the move to its drawing
    else here = model.get("answered"); // moved by the kernel
    sent = null;
    mark();
    send();
  };
  return { move, answered, places };
}

function render({ model, el }) {
  add(el, "style", { textContent: STYLE });
  const root = add(el, "div", { className: "fmsam-canvas" });
  const walk = model.get("surface") && walkable(model, root);
  const side = add(root, "div", { className: "side" });
  for (const [name, place] of Object.entries(walk ? walk.places : {}))
    add(side, "button", { textContent: `go to ${name}`, className: "jupyter-button", onclick: () => walk.move(...place) });
  const panels = add(side, "div", { className: "panels" });
  const facts = add(add(side, "table", { ariaLive: walk ? "polite" : "off" }), "tbody");
  const draw = () => {
    panels.replaceChildren();
    for (const panel of model.get("panels")) {
      const figure = add(panels, "figure");
      paint(add(figure, "canvas", { role: "img", ariaLabel: panel.title }), panel);
      add(figure, "figcaption", { textContent: panel.title });
    }
    facts.replaceChildren();
    for (const pair of Object.entries(model.get("facts"))) {
      const row = add(facts, "tr");
      for (const text of pair) add(row, "td", { textContent: text });
    }
    if (walk) walk.answered();
  };
  draw();
  const when = walk ? "change:answered" : "change:facts";
  model.on(when, draw);
  return () => model.off(when, draw);
}

export default { render };
