// A canvas to draw on with a mouse, a finger, a pen or the keyboard.

const LINE = 0.085; // width of a line, as a share of the canvas
const STEP = 0.05; // of the keyboard's pen, likewise
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class Pad {
  strokes = []; // {x, y}[][], in the canvas's own pixels
  #canvas;
  #changed;
  #pointer; // id of the one that draws
  #keyboard; // {x, y, down} of the keyboard's pen, once it is used

  /** @param {(strokes) => void} changed called when a stroke is finished, or grows by keyboard */
  constructor(canvas, changed) {
    this.#canvas = canvas;
    this.#changed = changed;
    canvas.addEventListener("pointerdown", (event) => this.#start(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#end(event));
    canvas.addEventListener("pointercancel", (event) => this.#end(event));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    this.clear();
  }

  clear() {
    this.strokes = [];
    this.#keyboard = undefined;
    this.#paint();
  }

  #start(event) {
    if (this.#pointer !== undefined || event.button !== 0) return;
    this.#pointer = event.pointerId;
    this.#canvas.setPointerCapture(event.pointerId);
    this.strokes.push([this.#position(event)]);
    this.#paint();
  }

  #move(event) {
    if (event.pointerId !== this.#pointer) return;
    const passed = event.getCoalescedEvents?.() ?? [];
    this.strokes.at(-1).push(...(passed.length ? passed : [event]).map((one) => this.#position(one)));
    this.#paint();
  }

  #end(event) {
    if (event.pointerId !== this.#pointer) return;
    this.#pointer = undefined;
    this.#changed(this.strokes);
  }

  #key(event) {
    if (event.key !== " " && !(event.key in ARROWS)) return;
    event.preventDefault(); // the page would scroll
    const { width, height } = this.#canvas;
    const pen = (this.#keyboard ??= { x: width / 2, y: height / 2, down: false });
    if (event.key === " ") {
      pen.down = !pen.down;
      if (pen.down) this.strokes.push([]);
    } else {
      const [right, down] = ARROWS[event.key];
      pen.x = Math.min(width, Math.max(0, pen.x + right * STEP * width));
      pen.y = Math.min(height, Math.max(0, pen.y + down * STEP * height));
    }
    if (pen.down) {
      this.strokes.at(-1).push({ x: pen.x, y: pen.y });
      this.#changed(this.strokes);
    }
    this.#paint();
  }

  #position({ clientX, clientY }) {
    const box = this.#canvas.getBoundingClientRect();
    const { clientLeft, clientTop, clientWidth, clientHeight, width, height } = this.#canvas;
    return {
      x: ((clientX - box.left - clientLeft) / clientWidth) * width,
      y: ((clientY - box.top - clientTop) / clientHeight) * height,
    };
  }

  #paint() {
    const { width, height } = this.#canvas;
    const context = this.#canvas.getContext("2d");
    context.fillStyle = "black";
    context.fillRect(0, 0, width, height);
    Object.assign(context, { strokeStyle: "white", lineWidth: LINE * width, lineCap: "round", lineJoin: "round" });
    for (const line of this.strokes) {
      if (!line.length) continue;
      context.beginPath();
      context.moveTo(line[0].x, line[0].y);
      for (const { x, y } of line) context.lineTo(x, y); // the first again: a single point becomes a dot
      context.stroke();
    }
    if (this.#keyboard) this.#paintPen(context, this.#keyboard);
  }

  #paintPen(context, { x, y, down }) {
    Object.assign(context, { strokeStyle: down ? "#e8590c" : "#868e96", lineWidth: 4 });
    context.beginPath();
    context.arc(x, y, (LINE / 2) * this.#canvas.width, 0, 2 * Math.PI);
    context.stroke();
  }
}
