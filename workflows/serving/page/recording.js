// The clip so far: fragments of the server, which concatenated are an mp4 file.

const HEADER_BOXES = ["ftyp", "moov"];

export class Recording {
  constructor(mime) {
    this.mime = mime.split(";")[0];
    this.parts = []; // {chunk, blob}: the browser may move Blobs to disk
    this.continued = false;
  }

  get empty() {
    return this.parts.length === 0;
  }

  /** The stream continues with the chunk `first`: drop later chunks. Without the chunks before it the clip is new. */
  resume(first) {
    const kept = this.parts.filter(({ chunk }) => chunk < first);
    this.continued = kept.length > 0 && kept.at(-1).chunk === first - 1;
    this.parts = this.continued ? kept : [];
  }

  /** Append the fragment that ends with `chunk`. */
  append(bytes, chunk) {
    const data = this.continued ? withoutHeader(bytes) : bytes;
    this.continued = false;
    this.parts.push({ chunk, blob: new Blob([data]) });
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

/** Return a fragment without the boxes of an initialization segment in front of it. */
function withoutHeader(bytes) {
  const view = new DataView(bytes);
  let at = 0;
  while (at + 8 <= view.byteLength && HEADER_BOXES.includes(boxName(view, at))) at += view.getUint32(at);
  return bytes.slice(at);
}

function boxName(view, at) {
  return String.fromCharCode(...[4, 5, 6, 7].map((i) => view.getUint8(at + i)));
}
