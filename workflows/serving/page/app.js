// The page: phases of a session, and what the controls do in each.
// Phases: loading, setup, connecting, live, lost, full, ended. Elements list those in which they are visible.

import { createSession, fetchInfo } from "./api.js";
import { Connection } from "./connection.js";
import { Lines } from "./lines.js";
import { Metrics } from "./metrics.js";
import { Player, unsupported } from "./player.js";
import { Recording } from "./recording.js";
import { Setup } from "./setup.js";
import { pictureOf, show as showSnapshots, store } from "./snapshots.js";
import { Waveform } from "./waveform.js";

const SOCKET = "v1/realtime/video";
const ACK_MS = 250;
const DONE_REASONS = { idle: "Nothing was played for a minute.", shutdown: "The server restarts." };
const STATUS = {
  loading: "Loading",
  setup: "Ready",
  connecting: "Starting",
  live: "Live",
  lost: "Disconnected",
  full: "Server full",
  ended: "Ended",
};

const at = (id) => document.getElementById(id);
const video = at("video");
const lines = new Lines(at("log"), "Silent and listening. Type a sentence and press Enter.");
const metrics = new Metrics(at("metrics"));
const waveform = new Waveform(at("wave"), video);
const session = { info: null, setup: null, connection: null, player: null, recording: null, choices: null };

// --- phases

function setPhase(phase) {
  document.body.dataset.phase = phase;
  for (const element of document.querySelectorAll("[data-show]")) {
    element.hidden = !element.dataset.show.split(" ").includes(phase);
  }
  at("status").querySelector("span").textContent = STATUS[phase];
  if (phase !== "lost" && phase !== "full") at("notice").hidden = true;
}

function showSetup() {
  release();
  setPhase("setup");
  session.setup.showFace();
  metrics.reset(session.info.chunk_seconds);
  waveform.clear();
  at("saved").hidden = showSnapshots(at("snapshots"), (snapshot) => resume(snapshot.resume, snapshot)) === 0;
  at("start").focus();
}

function showError(message) {
  at("setup-error").textContent = message;
  at("setup-error").hidden = !message;
}

function notify({ title, text, action, onAction, cancel = "New session" }) {
  at("notice").hidden = false;
  at("notice-title").textContent = title;
  at("notice-text").textContent = text;
  at("notice-action").textContent = action;
  at("notice-action").onclick = onAction;
  at("notice-cancel").textContent = cancel;
  at("notice-action").focus();
}

// --- start, resume, end

async function begin(choices) {
  showError("");
  session.choices = choices;
  session.retry = () => begin(choices);
  session.snapshot = session.fallback = null;
  openPlayer();
  lines.clear();
  const { player } = session;
  try {
    const created = await createSession(choices);
    if (session.player !== player) return; // stopped in the meantime
    connect(created.url ?? SOCKET, { session_id: created.session_id, format: "m4s" });
    send("words", "transcript", choices.opening);
  } catch (error) {
    if (session.player !== player) return;
    if (error.code === "full") serverFull(error.capacity);
    else refuse(error.message);
  }
}

/** Continue from the state `key`. With `recording`, the new chunks continue that clip. `fallback` is an older key. */
function resume(key, { caption = session.choices?.caption, picture, recording, fallback } = {}) {
  session.choices = { ...session.choices, caption };
  session.retry = () => resume(key, { picture, recording, fallback });
  session.snapshot = fallback ?? key;
  session.fallback = fallback && (() => resume(fallback, { picture, recording }));
  if (picture) showPoster(picture);
  if (!recording) lines.clear();
  openPlayer(recording);
  connect(SOCKET, { resume: key, format: "m4s", received: recording?.chunks });
}

/** Make the player inside the click, because browsers allow sound only there. */
function openPlayer(recording = new Recording(session.info.mime)) {
  release();
  setPhase("connecting");
  session.asked = performance.now();
  session.firstMs = null;
  metrics.reset(session.info.chunk_seconds);
  waveform.connect();
  waveform.clear();
  recording.reconnect();
  const player = new Player(video, session.info.mime, recording.header);
  player.unlock();
  player.addEventListener("tick", onTick);
  player.addEventListener("playing", () => onPlaying());
  player.addEventListener("blocked", () => (at("unlock").hidden = false));
  player.addEventListener("ended", () => onPlayedOut());
  player.addEventListener("failed", () => interrupted("Playback failed.", video.error?.message ?? ""));
  Object.assign(session, { player, recording, acked: 0, stopping: false, streaming: false });
  at("save").disabled = recording.empty;
  at("new-caption").value = session.choices?.caption ?? "";
  at("words").focus();
}

function connect(url, start) {
  const connection = new Connection(url, start);
  session.connection = connection;
  const handlers = {
    "video.start": onVideoStart,
    fragment: onFragment,
    chunk_metrics: onChunkMetrics,
    "session.interaction.queued": (message) => lines.queued(message),
    "session.snapshot": onSnapshot,
    "session.done": onDone,
    queue_status: onQueueStatus,
    error: onError,
    lost: onLost,
  };
  for (const [type, handle] of Object.entries(handlers)) {
    connection.addEventListener(type, ({ detail }) => session.connection === connection && handle(detail));
  }
}

function release() {
  clearInterval(session.countdown);
  session.connection?.close();
  session.player?.close();
  session.connection = session.player = null;
  video.controls = false;
  at("unlock").hidden = true;
  at("subtitle").hidden = true;
}

function refuse(message) {
  showSetup();
  showError(message);
}

function serverFull({ capacity, active, retry_after }) {
  release();
  setPhase("full");
  let left = Math.max(1, Math.ceil(retry_after));
  const use = capacity ? `${active ?? capacity} of ${capacity} sessions are in use. ` : "";
  const text = () => `${use}Next try in ${left} s.`;
  notify({ title: "The server is full.", text: text(), action: "Try now", onAction: session.retry, cancel: "Back" });
  session.countdown = setInterval(() => {
    left -= 1;
    if (left <= 0) session.retry();
    else at("notice-text").textContent = text();
  }, 1000);
}

// --- messages of the server

function onVideoStart({ resume: key, start_seconds }) {
  session.streaming = true;
  session.resume = key;
  session.connection.send("session.ack", { played_to: start_seconds });
}

function onFragment({ bytes, metadata }) {
  if (session.firstMs === null) {
    session.firstMs = performance.now() - session.asked;
    metrics.first(session.firstMs);
  }
  session.recording.append(bytes, metadata.first_chunk, metadata.last_chunk);
  session.player.append(bytes, metadata.start_seconds);
  at("save").disabled = false;
  lines.chunk(metadata, session.info.chunk_seconds).forEach((line) => metrics.words(line));
}

function onChunkMetrics(message) {
  metrics.chunk(message);
  if (message.first_chunk_ms !== undefined) metrics.first(session.firstMs, message.first_chunk_ms);
}

function onSnapshot({ resume: key }) {
  session.snapshot = key;
  store({ resume: key, caption: session.choices?.caption ?? "", picture: pictureOf(video) });
  announce("Snapshot saved. It is listed on the start page.");
  flash(at("snapshot"), "Saved");
}

function onQueueStatus(message) {
  if (message.retry_after && !session.streaming) serverFull(message);
}

function onError(message) {
  if (message.code === "full" || (message.event_id && lines.refused(message))) return;
  if (session.streaming) lines.addError(message.message);
  else if (message.code === "unknown_snapshot" && session.fallback) session.fallback();
  else refuse(message.message);
}

/** The session ended: on request, or because the server stops or the session was idle. */
function onDone({ reason, resume: key }) {
  session.resume = key ?? session.resume;
  if (!session.stopping && key) return interrupted("The session was paused.", DONE_REASONS[reason] ?? "");
  session.player.finish();
  lines.drop();
  setPhase("ended");
  at("restart").focus();
}

function onLost({ code, reason }) {
  if (!session.streaming) return refuse(`The server closed the connection: ${reason || `code ${code}`}. Start again.`);
  interrupted("Connection lost.", code === 1012 ? "The server restarts." : "The server does not respond.");
}

function interrupted(title, text) {
  const { resume: key, snapshot: fallback, recording } = session;
  session.connection.close();
  session.player.finish();
  lines.drop();
  setPhase("lost");
  const again = () => resume(key, { picture: pictureOf(video), recording, fallback });
  notify({ title, text, action: "Resume", onAction: again });
}

// --- playback

function onTick() {
  const { player, connection } = session;
  const now = performance.now();
  metrics.buffer(player.ahead, player.stalls);
  lines.tick(player.started ? player.time : -1);
  showSpoken(lines.spoken);
  at("clock").textContent = clockOf(player.time);
  if (player.started && now - session.acked >= ACK_MS) {
    session.acked = now;
    connection.send("session.ack", { played_to: Number(player.time.toFixed(3)) });
    if (video.readyState >= 2) paintAmbient(video);
  }
}

function onPlaying() {
  at("unlock").hidden = true;
  at("poster").hidden = true;
  if (document.body.dataset.phase === "connecting") setPhase("live");
}

/** After the last fragment the whole clip can be played again. */
function onPlayedOut() {
  if (document.body.dataset.phase !== "ended") return;
  session.player.close();
  video.src = URL.createObjectURL(session.recording.blob());
  video.controls = true;
  showSpoken("");
}

function showSpoken(text) {
  if (at("subtitle").textContent !== text) at("subtitle").textContent = text;
  at("subtitle").hidden = !text;
}

function showPoster(url) {
  at("poster").src = url;
  at("poster").hidden = false;
  at("poster").decode().then(() => paintAmbient(at("poster")), () => {});
}

/** Show the colors of the picture around it. Blurring a tiny canvas costs less than blurring the page. */
function paintAmbient(picture) {
  const pen = at("ambient").getContext("2d");
  pen.filter = "blur(2px)";
  pen.drawImage(picture, -2, -2, 16, 16);
}

function clockOf(time) {
  const whole = Math.max(0, Math.floor(time));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

// --- controls

function send(kind, key, text) {
  if (!text || !session.connection) return;
  const line = lines.add(kind, text);
  session.connection.send("session.interaction", { event_id: line.id, event: { [key]: text }, transition_chunks: 1 });
}

function stop() {
  session.stopping = true;
  session.connection?.send("session.stop");
  if (!session.streaming) showSetup();
}

function announce(text) {
  at("announce").textContent = text;
}

function flash(button, text) {
  const before = button.textContent;
  button.textContent = text;
  button.disabled = true;
  setTimeout(() => Object.assign(button, { textContent: before, disabled: false }), 1500);
}

function onSubmit(form, handle) {
  at(form).addEventListener("submit", (event) => {
    event.preventDefault();
    handle();
  });
}

function wire() {
  onSubmit("setup", () => {
    try {
      begin(session.setup.choices());
    } catch (error) {
      showError(error.message);
    }
  });
  onSubmit("say", () => {
    send("words", "transcript", at("words").value.trim());
    at("words").value = "";
  });
  onSubmit("recaption", () => {
    const caption = at("new-caption").value.trim();
    session.choices = { ...session.choices, caption };
    send("caption", "prompt", caption);
  });
  at("save").addEventListener("click", () => session.recording.save());
  at("snapshot").addEventListener("click", () => session.connection.send("session.snapshot"));
  at("stop").addEventListener("click", stop);
  at("mute").addEventListener("click", () => {
    video.muted = !video.muted;
    at("mute").textContent = video.muted ? "Unmute" : "Mute";
  });
  at("restart").addEventListener("click", showSetup);
  at("notice-cancel").addEventListener("click", showSetup);
  at("unlock").addEventListener("click", () => {
    waveform.connect();
    session.player.play();
  });
  lines.addEventListener("active", ({ detail: line }) => {
    waveform.mark();
    metrics.words(line);
    announce(line.kind === "words" ? `Speaking: ${line.text}` : `Caption applied: ${line.text}`);
  });
}

async function main() {
  wire();
  setPhase("loading");
  try {
    session.info = await fetchInfo();
    const { info } = session;
    const reason = unsupported(info.mime);
    if (reason) throw new Error(reason);
    at("model").textContent = `${info.model}, ${info.width} x ${info.height}, ${Math.round(info.fps)} frames/s`;
    document.documentElement.style.setProperty("--shape", `${info.width} / ${info.height}`);
    at("caption-list").replaceChildren(...info.captions.map((caption) => new Option(caption, caption)));
    at("words").placeholder = info.english ? "Type a sentence" : `Type words, as ${info.transcript_hint}`;
    if (!info.snapshots) at("snapshot").dataset.show = "";
    for (const id of ["words", "new-caption"]) at(id).maxLength = info.max_text ?? 400;
    session.setup = new Setup(at("setup"), info, { onFace: showPoster, onError: showError });
    await session.setup.shuffle();
    at("start").disabled = false;
    showSetup();
    document.activeElement.blur();
  } catch (error) {
    showError(error.message);
  }
}

main();
