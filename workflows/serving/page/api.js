// Requests to the server. The token in the address of the page is passed on with every request.

const TOKEN = new URLSearchParams(location.search).get("token");

/** A refused request. `capacity` is set if the server is full. */
export class RefusedError extends Error {
  constructor(message, { code = "refused", capacity = null } = {}) {
    super(message);
    this.code = code;
    this.capacity = capacity;
  }
}

/** Return `path`, relative to the page or absolute, as a URL with the token. */
export function address(path, { socket = false } = {}) {
  const base = new URL(".", location.href);
  const url = new URL(path.replace(/^\//, ""), base);
  if (socket) url.protocol = location.protocol.replace("http", "ws");
  if (TOKEN && !url.searchParams.has("token")) url.searchParams.set("token", TOKEN);
  return url;
}

/** Return what `/v1/info` describes: model, rates, size, MIME type, suggested captions. */
export async function fetchInfo() {
  return (await request("v1/info")).json();
}

/** Return `{url, caption}` of the drawn face `seed`; `url` is an object URL. */
export async function fetchFace(seed) {
  const answer = await request(`v1/faces?seed=${seed}`);
  const url = URL.createObjectURL(await answer.blob());
  return { url, caption: answer.headers.get("X-Caption") ?? "" };
}

/** Create a session and return `{session_id, url, resume}`. Fields that are null or empty are left out. */
export async function createSession({ face, faceSeed, voice, voiceSeed, caption, seed }) {
  const fields = { face, face_seed: faceSeed, voice, voice_seed: voiceSeed, prompt: caption, seed };
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value !== null && value !== "") body.set(name, value);
  }
  return (await request("v1/sessions", { method: "POST", body })).json();
}

async function request(path, options) {
  let answer;
  try {
    answer = await fetch(address(path), options);
  } catch {
    throw new RefusedError("The server does not respond. Check that it runs and that the port is forwarded.", {
      code: "unreachable",
    });
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer) {
  const { error = {} } = await answer.json().catch(() => ({}));
  const message = error.message ?? `The server refused the request: ${answer.status} ${answer.statusText}.`;
  return new RefusedError(message, { code: error.code, capacity: error.code === "full" ? error : null });
}
