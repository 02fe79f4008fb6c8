// The clip so far: fragments of the server, which concatenated are an mp4 file.

const HEADER_BOXES = ["ftyp", "moov"];

export class Recording {
  constructor(mime) {
    this.mime = mime.split(";")[0];
    this.parts = []; // {chunk, blob}: the browser may move Blobs to disk
    this.header = null; // initialization segment
    this.continues = false;
  }

  get empty() {
    return this.parts.length === 0;
  }

  /** Return the number of chunks from the start of the session that the clip contains. */
  get chunks() {
    return this.empty ? 0 : this.parts.at(-1).chunk + 1;
  }

  /** The next fragment comes from another connection and may repeat chunks. */
  reconnect() {
    this.continues = !this.empty;
  }

  /** Append the fragment of the chunks `first` to `last`. */
  append(bytes, first, last) {
    if (this.continues) this.#cut(first);
    const length = headerLength(bytes);
    this.header ??= bytes.slice(0, length);
    this.parts.push({ chunk: last, blob: new Blob([this.empty ? bytes : bytes.slice(length)]) });
  }

  /** Drop the chunks from `first` on. If chunks before it are missing, the clip starts again. */
  #cut(first) {
    const kept = this.parts.filter(({ chunk }) => chunk < first);
    this.parts = kept.at(-1)?.chunk === first - 1 ? kept : [];
    this.continues = false;
  }

  /** Return the clip as a Blob. */
  blob() {
    return new Blob(
      this.parts.map(({ blob }) => blob),
      { type: this.mime },
    );
  }

  /** Download the clip as an mp4 file. */
  save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(this.blob());
    link.download = `mutual-forcing-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.mp4`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }
}

/** Return the number of bytes of the initialization segment in front of a fragment. */
function headerLength(bytes) {
  const view = new DataView(bytes);
  let at = 0;
  while (at + 8 <= view.byteLength && HEADER_BOXES.includes(boxName(view, at))) at += view.getUint32(at);
  return at;
}

function boxName(view, at) {
  return String.fromCharCode(...[4, 5, 6, 7].map((i) => view.getUint8(at + i)));
}
