// Playback of fragments in one video element through Media Source Extensions.
// Clip time is the time of the server (`start_seconds`); media time is that of the element. They differ after a resume.

const START_AHEAD = 0.7; // s buffered before playback starts
const FAST_AHEAD = 2.0; // s ahead above which playback is faster
const CALM_AHEAD = 1.2; // s ahead below which it is normal again
const FAST_RATE = 1.06;
const EDGE = 0.75; // s behind the end after a jump to the live edge
const KEEP = 10; // s of played media that stay in the buffer
const JUMP = 0.01; // s forward to end a stall
const JUMP_MS = 500; // between two jumps
const TICK_MS = 100;

const Source = globalThis.MediaSource ?? globalThis.ManagedMediaSource;

/** Return the reason why this browser cannot play `mime`, or null. */
export function unsupported(mime) {
  if (!Source) return "This browser has no Media Source Extensions. Use a current Chrome, Edge, Firefox or Safari.";
  if (!Source.isTypeSupported(mime)) return `This browser cannot decode ${mime}.`;
  return null;
}

/** Player of one session. Emits `tick` (ten times per second), `playing`, `blocked`, `ended` and `failed`. */
export class Player extends EventTarget {
  /** `header` is the initialization segment, if the first fragment may lack it. */
  constructor(video, mime, header = null) {
    super();
    this.video = video;
    this.stalls = 0;
    this.started = false;
    this.jumped = 0; // ms, time of the last jump
    this.offset = 0; // clip time minus media time, s
    this.queue = header ? [header] : [];
    this.firstStart = null;
    this.complete = false;
    video.disableRemotePlayback = true; // ManagedMediaSource requires it
    video.controls = false;
    this.source = new Source();
    this.url = URL.createObjectURL(this.source);
    this.source.addEventListener("sourceopen", () => this.#open(mime), { once: true });
    video.src = this.url;
    this.listeners = new AbortController();
    const options = { signal: this.listeners.signal };
    video.addEventListener("waiting", () => this.#stalled(), options);
    video.addEventListener("ended", () => this.#emit("ended"), options);
    video.addEventListener("error", () => this.#emit("failed"), options);
    this.timer = setInterval(() => this.#tick(), TICK_MS);
  }

  /** Call inside a click: allows sound for a later start of playback. */
  unlock() {
    this.video.play().catch(() => {});
    this.video.pause();
  }

  /** Append one fragment that starts at the clip time `start`. */
  append(bytes, start) {
    this.firstStart ??= start;
    this.queue.push(bytes);
    this.#drain();
  }

  /** The server sends no more fragments. */
  finish() {
    this.complete = true;
    this.#drain();
  }

  /** Return the playhead in clip time, s. */
  get time() {
    return this.video.currentTime + this.offset;
  }

  /** Return the seconds that are buffered in front of the playhead. */
  get ahead() {
    const range = this.#range();
    return range ? Math.max(0, range.end - this.video.currentTime) : 0;
  }

  /** Start playback; emits `blocked` if the browser requires a click. */
  async play() {
    this.started = true;
    try {
      await this.video.play();
      this.#emit("playing");
    } catch (error) {
      if (error.name === "NotAllowedError") this.#emit("blocked");
    }
  }

  /** Stop and release the media. */
  close() {
    clearInterval(this.timer);
    this.listeners.abort();
    URL.revokeObjectURL(this.url);
  }

  #open(mime) {
    this.buffer = this.source.addSourceBuffer(mime);
    this.buffer.addEventListener("updateend", () => this.#drain());
    this.#drain();
  }

  #drain() {
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    if (this.queue.length) this.buffer.appendBuffer(this.queue.shift());
    else if (this.complete) this.source.endOfStream();
    else this.#forget();
  }

  #forget() {
    const { buffered } = this.buffer;
    const limit = this.video.currentTime - KEEP;
    if (buffered.length && buffered.start(0) < limit - 2) this.buffer.remove(0, limit);
  }

  /** Return the buffered range of the playhead, else the next one. */
  #range() {
    const { buffered, currentTime } = this.video;
    for (let i = 0; i < buffered.length; i++) {
      if (buffered.end(i) > currentTime) return { start: buffered.start(i), end: buffered.end(i) };
    }
    return null;
  }

  #tick() {
    this.#drain();
    const range = this.#range();
    if (range) this.#steer(range);
    this.#emit("tick");
  }

  #steer({ start, end }) {
    const { video } = this;
    if (!this.started) {
      this.offset = Math.abs(this.firstStart - start) < 0.25 ? 0 : this.firstStart - start;
      if (start > video.currentTime) video.currentTime = start;
      if (end - start >= START_AHEAD || this.complete) this.play();
      return;
    }
    if (start > video.currentTime + 0.1) video.currentTime = start; // a hole in the buffer
    const ahead = end - video.currentTime;
    if (video.readyState < video.HAVE_FUTURE_DATA) this.#restart(end);
    else if (ahead > FAST_AHEAD) video.playbackRate = FAST_RATE;
    else if (ahead < CALM_AHEAD) video.playbackRate = 1;
  }

  #stalled() {
    if (this.started && !this.complete && !this.video.seeking) this.stalls += 1;
  }

  /**
   * End a stall as soon as enough is buffered: jump to the live edge, or a little forward. After each stall Chromium
   * requires more media before it plays, until that is more than the server makes ahead; a seek resets this.
   */
  #restart(end) {
    const { video } = this;
    const ahead = end - video.currentTime;
    const now = performance.now();
    if (ahead < START_AHEAD || video.seeking || now - this.jumped < JUMP_MS) return;
    this.jumped = now;
    video.currentTime = ahead > 2 * EDGE ? end - EDGE : video.currentTime + JUMP;
  }

  #emit(type) {
    this.dispatchEvent(new Event(type));
  }
}
