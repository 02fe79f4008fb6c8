// A running waveform of the sound of the video element.

const RATE = 30; // columns per second
const COLUMN = 4; // CSS pixels, gap included
const BAR = 2.5;

export class Waveform {
  constructor(canvas, video) {
    this.canvas = canvas;
    this.video = video;
    this.columns = []; // newest last: {peak, mark}
    this.peak = 0;
    this.next = 0;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#colors());
    new ResizeObserver(() => this.#resize()).observe(canvas);
    this.#colors();
  }

  /** Call inside a click: routes the sound through an analyser. Later calls only resume it. */
  connect() {
    if (!this.context) {
      this.context = new AudioContext();
      this.analyser = new AnalyserNode(this.context, { fftSize: 2048 });
      this.samples = new Float32Array(this.analyser.fftSize);
      this.context.createMediaElementSource(this.video).connect(this.analyser).connect(this.context.destination);
      requestAnimationFrame((now) => this.#frame(now));
    }
    this.context.resume();
  }

  /** Remove what was drawn. */
  clear() {
    this.columns = [];
    this.#draw();
  }

  /** Mark the newest column, where a line begins. */
  mark() {
    if (this.columns.length) this.columns.at(-1).mark = true;
  }

  #frame(now) {
    requestAnimationFrame((later) => this.#frame(later));
    if (this.video.paused || this.video.readyState < 3) return;
    this.analyser.getFloatTimeDomainData(this.samples);
    for (const sample of this.samples) this.peak = Math.max(this.peak, Math.abs(sample));
    if (now < this.next) return;
    this.next = Math.max(this.next + 1000 / RATE, now - 1000 / RATE);
    this.columns.push({ peak: this.peak, mark: false });
    this.columns.splice(0, this.columns.length - 600);
    this.peak = 0;
    this.#draw();
  }

  #draw() {
    const { width, height } = this.canvas;
    const scale = devicePixelRatio;
    const pen = this.canvas.getContext("2d");
    pen.clearRect(0, 0, width, height);
    pen.fillStyle = this.line;
    pen.fillRect(0, height / 2 - scale / 2, width, scale);
    this.columns.toReversed().forEach(({ peak, mark }, age) => {
      const x = width - (age + 1) * COLUMN * scale;
      if (x < -COLUMN * scale) return;
      const size = Math.max(scale, 0.94 * height * Math.min(1, 2 * peak) ** 0.75);
      pen.fillStyle = this.bar;
      pen.fillRect(x, (height - size) / 2, BAR * scale, size);
      if (mark) this.#drawMark(pen, x);
    });
  }

  #drawMark(pen, x) {
    pen.fillStyle = this.markColor;
    pen.fillRect(x, 0, devicePixelRatio, this.canvas.height);
  }

  #resize() {
    const { clientWidth, clientHeight } = this.canvas;
    this.canvas.width = Math.round(clientWidth * devicePixelRatio);
    this.canvas.height = Math.round(clientHeight * devicePixelRatio);
    this.#draw();
  }

  #colors() {
    const style = getComputedStyle(this.canvas);
    this.bar = style.getPropertyValue("--accent");
    this.line = style.getPropertyValue("--line");
    this.markColor = style.getPropertyValue("--soft");
    if (this.canvas.width) this.#draw();
  }
}
