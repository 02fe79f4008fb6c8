// The choice of a voice: drawn ones, each with a sample, or an uploaded clip.

import { address } from "./api.js";

const VOICES = 3;

export class Voices {
  /** `box` is the fieldset; `drawn` is true if the server has samples of drawn voices. */
  constructor(box, { drawn, maxBytes }) {
    this.box = box;
    this.maxBytes = maxBytes;
    this.sample = new Audio();
    const first = Math.floor(Math.random() * 1e6);
    const seeds = drawn ? Array.from({ length: VOICES }, (_, i) => first + i) : [""];
    const options = seeds.map((seed, i) => option(seed, drawn ? `Voice ${i + 1}` : "Drawn"));
    box.querySelector(".segments").replaceChildren(...options, option("clip", "My clip"));
    box.querySelector(".segments input").checked = true;
    box.querySelector(".segments").addEventListener("change", () => this.#update());
    box.querySelector("input[type=file]").addEventListener("change", () => this.#update());
    this.listen = box.querySelector("button");
    this.listen.addEventListener("click", () => this.#play());
    this.sample.addEventListener("ended", () => this.stop());
    this.drawn = drawn;
    this.#update();
  }

  /** Return `{voice, voiceSeed}`, of which one is null. Raises an Error if no usable file is chosen. */
  choice() {
    if (this.#value !== "clip") return { voice: null, voiceSeed: this.#value };
    if (!this.#file) throw new Error("Voice: no file is chosen. Choose a sound or video file, or a drawn voice.");
    checkSize(this.#file, this.maxBytes);
    return { voice: this.#file, voiceSeed: null };
  }

  /** Stop the sample. */
  stop() {
    this.sample.pause();
    this.listen.textContent = "Listen";
  }

  get #value() {
    return this.box.querySelector(".segments input:checked").value;
  }

  get #file() {
    return this.box.querySelector("input[type=file]").files[0];
  }

  #update() {
    this.stop();
    const clip = this.#value === "clip";
    this.box.querySelector(".file").hidden = !clip;
    this.box.querySelector(".file span").textContent = this.#file?.name ?? "Choose a sound or video file";
    this.listen.hidden = clip ? !this.#file : !this.drawn;
  }

  #play() {
    if (!this.sample.paused) return this.stop();
    const clip = this.#value === "clip";
    this.sample.src = clip ? URL.createObjectURL(this.#file) : address(`v1/voices?seed=${this.#value}`);
    this.listen.textContent = "Stop";
    this.sample.play().catch(() => this.stop());
  }
}

/** Raise an Error if `file` is larger than the server accepts. */
export function checkSize(file, maxBytes) {
  if (!maxBytes || file.size <= maxBytes) return;
  const size = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
  throw new Error(`${file.name}: ${size(file.size)} is over the limit of ${size(maxBytes)}. Choose a smaller file.`);
}

function option(value, text) {
  const label = document.createElement("label");
  const radio = document.createElement("input");
  Object.assign(radio, { type: "radio", name: "voice", value });
  const name = document.createElement("span");
  name.textContent = text;
  label.append(radio, name);
  return label;
}
