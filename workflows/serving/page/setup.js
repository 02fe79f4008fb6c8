// The form in front of a session: face, caption, voice, first words.

import { fetchFace } from "./api.js";
import { Voices, checkSize } from "./voices.js";

const FACES = 6;

export class Setup {
  /** `info` is the answer of `/v1/info`; `onFace` gets the URL of the chosen picture, `onError` a message or "". */
  constructor(form, info, { onFace, onError }) {
    Object.assign(this, { form, info, onFace, onError });
    this.edited = false; // the caption was typed or chosen
    this.at = (name) => form.querySelector(`#${name}`);
    this.at("shuffle").addEventListener("click", () => this.shuffle());
    this.at("face-file").addEventListener("change", () => this.#upload());
    this.at("faces").addEventListener("change", (event) => this.#choose(event.target));
    this.at("caption").addEventListener("input", () => (this.edited = true));
    this.at("caption").addEventListener("keydown", (event) => this.#submitOnEnter(event));
    this.voices = new Voices(this.at("voices"), { drawn: info.voices, maxBytes: info.max_upload_bytes });
    for (const field of [this.at("caption"), this.at("opening")]) field.maxLength = info.max_text ?? 400;
    this.#suggest();
  }

  /** Show new drawn faces and choose the first. Without drawn faces a picture can be uploaded. */
  async shuffle() {
    this.at("shuffle").hidden = !this.info.faces;
    if (!this.info.faces) return;
    const first = Math.floor(Math.random() * 1e6);
    const seeds = Array.from({ length: FACES }, (_, i) => first + i);
    const faces = await Promise.all(seeds.map(async (seed) => ({ seed, ...(await fetchFace(seed)) })));
    for (const picture of this.at("faces").querySelectorAll("img")) URL.revokeObjectURL(picture.src);
    this.at("faces").replaceChildren(...faces.map((face, i) => this.#face(face, `Drawn face ${i + 1}`)));
    this.#choose(this.at("faces").querySelector("input"));
  }

  /** Show the chosen face on the stage. */
  showFace() {
    if (this.#chosen) this.onFace(this.#chosen.nextSibling.src);
  }

  get #chosen() {
    return this.at("faces").querySelector("input:checked");
  }

  /** Return the choices. Raises an Error if a file is missing. */
  choices() {
    const uploaded = this.#chosen?.value === "file";
    if (uploaded) checkSize(this.file, this.info.max_upload_bytes);
    this.voices.stop();
    return {
      ...this.voices.choice(),
      face: uploaded ? this.file : null,
      faceSeed: uploaded || !this.#chosen ? null : Number(this.#chosen.value),
      caption: this.at("caption").value.trim(),
      opening: this.at("opening").value.trim(),
      seed: Math.floor(Math.random() * 2 ** 31),
    };
  }

  #suggest() {
    const list = this.at("suggestions");
    const captions = this.info.captions ?? [];
    list.replaceChildren(new Option("Suggestions", ""), ...captions.map((caption) => new Option(caption, caption)));
    list.hidden = captions.length === 0;
    list.addEventListener("change", () => {
      this.edited = true;
      this.at("caption").value = list.value;
      list.value = "";
    });
    this.at("caption").value = captions[0] ?? "";
    this.at("opening").placeholder = this.info.transcript_hint ?? "";
  }

  #face({ seed, url, caption }, name) {
    const label = document.createElement("label");
    const radio = document.createElement("input");
    radio.type = "radio";
    radio.name = "face_choice";
    radio.value = seed;
    radio.dataset.caption = caption;
    const picture = document.createElement("img");
    picture.src = url;
    picture.alt = caption ? `${name}: ${caption}` : name;
    picture.title = caption || name;
    label.append(radio, picture);
    return label;
  }

  #choose(radio) {
    radio.checked = true;
    if (radio.dataset.caption && !this.edited) this.at("caption").value = radio.dataset.caption;
    this.showFace();
  }

  async #upload() {
    const [file] = this.at("face-file").files;
    if (!file) return;
    const label = this.#face({ seed: "file", url: URL.createObjectURL(file), caption: "" }, file.name);
    const readable = await label.lastChild.decode().then(() => true, () => false);
    this.onError(readable ? "" : `${file.name} is not a picture that this browser can read. Choose a PNG or JPEG file.`);
    if (!readable) return;
    this.file = file;
    this.at("faces").querySelector("input[value=file]")?.parentElement.remove();
    if (this.at("faces").children.length >= FACES) this.at("faces").lastChild.remove();
    this.at("faces").prepend(label);
    this.#choose(label.firstChild);
  }

  #submitOnEnter(event) {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    this.form.requestSubmit();
  }
}
