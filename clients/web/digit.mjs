// The preparation that makes a drawing what scikit-learn's digits are: what `train.py --data digits` learns from.

const GRID = 32; // dots: the digits were scanned as 32×32 black and white dots,
const BLOCK = 4; // and the grey of each of their 8×8 pixels counts the white dots, 0 to 16, in a block of 4×4
const PEN = 2.6; // radius, dots: makes 31% of a drawing white, as 31% of the data set is

/**
 * Prepares a drawing as the data set's digits were: cut to its bounding box, scaled to fill 32 dots and centred, white
 * on black, counted down to 8×8 grey pixels. Where, how large and with how thick a pen it was drawn has no effect.
 * (E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.)
 *
 * @param {{x: number, y: number}[][]} strokes lines through points, in any unit; at least one point
 * @returns {{data: Uint8Array, height: number, width: number}} RGB, (8, 8, 3)
 */
export function prepareDigit(strokes) {
  const lines = inDots(strokes);
  const side = GRID / BLOCK;
  const data = new Uint8Array(3 * side * side);
  for (let y = 0; y < side; y++)
    for (let x = 0; x < side; x++) {
      const grey = Math.floor((255 * countWhite(lines, BLOCK * x, BLOCK * y)) / BLOCK ** 2);
      data.fill(grey, 3 * (side * y + x), 3 * (side * y + x + 1));
    }
  return { data, height: side, width: side };
}

/** Moves and scales the strokes so that, with the pen's width, they just fill the grid. */
function inDots(strokes) {
  const points = strokes.flat();
  const [left, right] = range(points.map(({ x }) => x));
  const [top, bottom] = range(points.map(({ y }) => y));
  const scale = (GRID - 2 * PEN) / Math.max(right - left, bottom - top, 1e-9); // a single point has no extent
  const place = (value, low, high) => GRID / 2 + scale * (value - (low + high) / 2);
  return strokes.map((line) => line.map(({ x, y }) => ({ x: place(x, left, right), y: place(y, top, bottom) })));
}

function range(values) {
  return [Math.min(...values), Math.max(...values)];
}

function countWhite(lines, left, top) {
  let count = 0;
  for (let y = top; y < top + BLOCK; y++)
    for (let x = left; x < left + BLOCK; x++) if (lines.some((line) => touches(line, x + 0.5, y + 0.5))) count++;
  return count;
}

/** Whether a dot lies within the pen's radius of a line. */
function touches(line, x, y) {
  return line.some((from, i) => {
    const to = line[i + 1] ?? from;
    const [dx, dy] = [to.x - from.x, to.y - from.y];
    const along = ((x - from.x) * dx + (y - from.y) * dy) / (dx * dx + dy * dy || 1);
    const share = Math.min(1, Math.max(0, along));
    return Math.hypot(x - from.x - share * dx, y - from.y - share * dy) <= PEN;
  });
}
