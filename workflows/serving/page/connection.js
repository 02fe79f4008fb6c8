// The WebSocket of one session. Messages become events of the same name; `fragment` carries bytes with their metadata.

import { address } from "./api.js";

const PING_MS = 5000;
const SILENCE_MS = 15000; // without any message the connection counts as lost

export class Connection extends EventTarget {
  /** Open `url` and send `start` as the first message. */
  constructor(url, start) {
    super();
    this.finished = false; // the server ended the session, or the page closed the socket
    this.heard = performance.now();
    this.metadata = null;
    this.socket = new WebSocket(address(url, { socket: true }));
    this.socket.binaryType = "arraybuffer";
    this.early = []; // messages sent before the socket was open
    this.send("session.start", start);
    this.socket.onopen = () => this.early.splice(0).forEach((message) => this.socket.send(message));
    this.socket.onmessage = ({ data }) => this.#receive(data);
    this.socket.onclose = ({ code, reason }) => this.#closed(code, reason);
    this.timer = setInterval(() => this.#watch(), PING_MS);
  }

  /** Send one message, as soon as the socket is open. */
  send(type, fields = {}) {
    const message = JSON.stringify({ type, ...fields });
    if (this.socket.readyState === WebSocket.CONNECTING) this.early.push(message);
    else if (this.socket.readyState === WebSocket.OPEN) this.socket.send(message);
  }

  /** Close without a `lost` event. */
  close() {
    this.finished = true;
    clearInterval(this.timer);
    this.socket.close();
  }

  #receive(data) {
    this.heard = performance.now();
    if (typeof data !== "string") {
      this.#emit("fragment", { bytes: data, metadata: this.metadata });
      this.metadata = null;
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "video.chunk_metadata") this.metadata = message;
    if (message.type === "session.done") this.finished = true;
    this.#emit(message.type, message);
  }

  #watch() {
    if (performance.now() - this.heard > SILENCE_MS) this.#closed(1006, "no message from the server");
    else this.send("session.ping");
  }

  #closed(code, reason) {
    clearInterval(this.timer);
    if (this.finished) return;
    this.finished = true;
    this.socket.close();
    this.#emit("lost", { code, reason });
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
