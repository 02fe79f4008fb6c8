// The strip of measurements.

import { seconds } from "./lines.js";

const TILES = {
  first: ["First chunk", "from Start to the first media"],
  period: ["Chunk period", "time in which the server makes a chunk"],
  buffered: ["Buffered", "media in front of the playhead"],
  applied: ["Words applied", "from Enter to the chunk with the words"],
  evaluations: ["Evaluations", "passes of the network"],
};

export class Metrics {
  constructor(list) {
    this.tiles = {};
    for (const [name, [label, title]] of Object.entries(TILES)) list.append(this.#tile(name, label, title));
    this.reset(0.5);
  }

  /** Start a session with chunks of `chunkSeconds`. */
  reset(chunkSeconds) {
    this.budget = 1000 * chunkSeconds;
    this.late = 0;
    this.total = 0;
    for (const name of Object.keys(TILES)) this.#show(name, "\u2013", "\u00a0");
  }

  /** Show the time to the first chunk, ms at the client and at the server. */
  first(ms, serverMs) {
    this.#show("first", seconds(ms), serverMs === undefined ? "\u00a0" : `${seconds(serverMs)} at the server`);
  }

  /** Show the `chunk_metrics` of one chunk. */
  chunk({ made_ms, deadline_missed, nfe }) {
    this.late += deadline_missed ? 1 : 0;
    this.total += nfe;
    this.#show("period", `${Math.round(made_ms)} ms`, `of ${this.budget} ms, ${this.late} late`);
    this.tiles.period.tile.dataset.late = made_ms > this.budget;
    this.#show("evaluations", `${nfe}`, `per chunk, ${this.total} in all`);
  }

  /** Show the seconds in the buffer and the number of stalls. */
  buffer(ahead, stalls) {
    this.#show("buffered", `${ahead.toFixed(1)} s`, `${stalls} ${stalls === 1 ? "stall" : "stalls"}`);
  }

  /** Show how long the words of a line took, in ms. Captions do not count, nor words behind others. */
  words({ kind, waits, typed, applied, heard }) {
    if (kind !== "words" || waits) return;
    const detail = heard ? `heard after ${seconds(heard - typed)}` : "\u00a0";
    this.#show("applied", seconds(applied - typed), detail);
  }

  #tile(name, label, title) {
    const tile = document.createElement("div");
    tile.title = title;
    tile.dataset.metric = name;
    const term = document.createElement("dt");
    term.textContent = label;
    const value = document.createElement("dd");
    const detail = document.createElement("dd");
    detail.className = "detail";
    tile.append(term, value, detail);
    this.tiles[name] = { tile, value, detail };
    return tile;
  }

  #show(name, value, detail) {
    this.tiles[name].value.textContent = value;
    this.tiles[name].detail.textContent = detail;
  }
}
