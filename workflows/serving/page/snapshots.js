// Snapshots of sessions that this browser can resume. The server stores the state; here are the keys.

const KEY = "mutual-forcing-snapshots";
const LIMIT = 6;

/** Return the stored snapshots, newest first. */
export function stored() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? [];
  } catch {
    return [];
  }
}

/** Store a snapshot `{resume, caption, picture}`; an older one of the same session is replaced. */
export function store(snapshot) {
  write([{ ...snapshot, at: Date.now() }, ...stored().filter((other) => other.resume !== snapshot.resume)]);
}

/** Remove the snapshot with the key `resume`. */
export function remove(resume) {
  write(stored().filter((other) => other.resume !== resume));
}

/** Return the current frame of `video` as a small data URL, or "". */
export function pictureOf(video) {
  if (!video.videoWidth) return "";
  const canvas = document.createElement("canvas");
  canvas.width = 96;
  canvas.height = Math.round((96 * video.videoHeight) / video.videoWidth);
  canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.85);
}

/** Fill `list` with one row per snapshot; `onResume` gets the snapshot. Returns their number. */
export function show(list, onResume) {
  const snapshots = stored();
  list.replaceChildren(...snapshots.map((snapshot) => row(snapshot, list, onResume)));
  return snapshots.length;
}

function write(snapshots) {
  try {
    localStorage.setItem(KEY, JSON.stringify(snapshots.slice(0, LIMIT)));
  } catch {
    // Private windows may have no storage: the snapshot is on the server, and this page resumes it until it is closed.
  }
}

function row(snapshot, list, onResume) {
  const item = document.createElement("li");
  const open = document.createElement("button");
  open.type = "button";
  open.className = "open";
  const picture = document.createElement("img");
  picture.alt = "";
  picture.src = snapshot.picture || "page/icon.svg";
  const text = document.createElement("span");
  text.textContent = snapshot.caption || "Session";
  const when = document.createElement("time");
  when.textContent = `Resume from ${new Date(snapshot.at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}`;
  open.append(picture, text, when);
  open.addEventListener("click", () => onResume(snapshot));
  const drop = document.createElement("button");
  drop.type = "button";
  drop.className = "drop";
  drop.ariaLabel = "Remove this snapshot";
  drop.textContent = "\u00d7";
  drop.addEventListener("click", () => {
    remove(snapshot.resume);
    list.closest("section").hidden = show(list, onResume) === 0;
  });
  item.append(open, drop);
  return item;
}
