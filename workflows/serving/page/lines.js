// Lines of a session: what was typed, and when it was applied and heard.

const STATES = { sent: "sent", queued: "queued", active: "speaking", done: "spoken", refused: "refused", lost: "not spoken" };
const PENDING = ["sent", "queued", "active"];
const CAPTION_STATES = { ...STATES, active: "applied", done: "applied", lost: "not applied" };

/** Model and list element of the lines. Emits `active` and `done` with the line as `detail`. */
export class Lines extends EventTarget {
  constructor(list, hint) {
    super();
    this.list = list;
    this.hint = hint;
    this.clear();
  }

  /** Remove all lines and show the hint. */
  clear() {
    this.lines = [];
    const item = document.createElement("li");
    item.className = "hint";
    item.textContent = this.hint;
    this.list.replaceChildren(item);
  }

  /** Add a line of `kind` "words" or "caption" and return it. */
  add(kind, text) {
    const line = { id: crypto.randomUUID?.() ?? String(Math.random()).slice(2), kind, text, typed: performance.now() };
    line.waits = this.lines.some(({ kind, state }) => kind === "words" && PENDING.includes(state)); // behind other words
    line.element = this.#append(kind, text);
    this.lines.push(line);
    this.#set(line, "sent");
    return line;
  }

  /** Add the message of an error. */
  addError(message) {
    this.#append("error", message);
  }

  /** The server accepted an event and applies it at the clip time `applies_at_seconds`. */
  queued({ event_id, applies_at_seconds }) {
    const line = this.#find(event_id);
    if (!line || line.state !== "sent") return;
    line.expected = applies_at_seconds;
    this.#set(line, "queued");
  }

  /** The server refused the event of a line. Returns false if there is no such line. */
  refused({ event_id, message }) {
    const line = this.#find(event_id);
    if (!line) return false;
    this.#set(line, "refused");
    line.element.querySelector(".detail").textContent = message;
    return true;
  }

  /** Note the events that start and end in a chunk; returns the lines that the chunk applies. */
  chunk({ start_seconds, started_event_ids = [], completed_event_ids = [] }, seconds) {
    const started = started_event_ids.map((id) => this.#find(id)).filter(Boolean);
    for (const line of started) {
      line.starts = start_seconds;
      line.applied = performance.now();
    }
    for (const id of completed_event_ids) {
      const line = this.#find(id);
      if (line) line.ends = start_seconds + seconds;
    }
    return started;
  }

  /** Move lines on to the clip time `now` of the playhead. */
  tick(now) {
    for (const line of this.lines) {
      if (line.state === "sent" || line.state === "queued") this.#await(line, now);
      if (line.state === "active" && line.ends <= now) this.#finish(line);
    }
  }

  /** Return the text that is being spoken, or "". */
  get spoken() {
    return this.lines.findLast((line) => line.kind === "words" && line.state === "active")?.text ?? "";
  }

  /** The connection ended: mark what was not applied. */
  drop() {
    for (const line of this.lines) {
      if (line.state === "sent" || line.state === "queued") this.#set(line, "lost");
      if (line.state === "active") this.#set(line, "done");
    }
  }

  #await(line, now) {
    if (line.starts <= now) {
      line.heard = performance.now();
      this.#set(line, "active");
      this.#emit("active", line);
    } else if (line.expected > now) {
      line.element.querySelector(".detail").textContent = `in ${(line.expected - now).toFixed(1)} s`;
    }
  }

  #finish(line) {
    this.#set(line, "done");
    this.#emit("done", line);
  }

  #set(line, state) {
    line.state = state;
    line.element.dataset.state = state;
    const names = line.kind === "caption" ? CAPTION_STATES : STATES;
    line.element.querySelector(".state").textContent = names[state];
    const wait = line.heard && `${line.kind === "caption" ? "seen" : "heard"} after ${seconds(line.heard - line.typed)}`;
    line.element.querySelector(".detail").textContent = wait || "";
  }

  #append(kind, text) {
    this.list.querySelector(".hint")?.remove();
    const item = document.createElement("li");
    item.dataset.kind = kind;
    for (const name of ["text", "state", "detail"]) {
      const part = document.createElement("span");
      part.className = name;
      item.append(part);
    }
    item.firstChild.textContent = text;
    this.list.append(item);
    this.list.scrollTop = this.list.scrollHeight;
    return item;
  }

  #find(id) {
    return this.lines.find((line) => line.id === id);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/** Format milliseconds as seconds. */
export function seconds(ms) {
  return `${(ms / 1000).toFixed(ms < 9950 ? 2 : 1)} s`;
}
