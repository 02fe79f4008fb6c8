"""Measure a live server with real clients (``mfctl bench serve``).

For each number of sessions, clients first take chunks as fast as the server makes them, which gives the chunk period.
Then they play in real time and send texts, which gives the time to the first chunk, the time from a text to the chunk
in which it starts, and missed deadlines. In the same run, one forward pass of all sessions is compared with one pass
per session, interleaved.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed

from mfcore.errors import check_range
from workflows.serving.appearance import default_condition
from workflows.serving.client import LiveClient
from workflows.serving.engine import EngineLimits
from workflows.serving.server import MAX_SESSIONS, ServerOptions, background_server
from workflows.serving.session import Session
from workflows.serving.talker import Talker

MAX_SECONDS = 3600.0
_ACK_S = 0.25
_TEXT_EVERY_S = 3.0
_TEXTS = {True: "Nice to meet you.", False: "ba de go"}  # by english


@dataclass(kw_only=True)
class ClientTimes:
    """Measurements of one client, in seconds. Mutable: the client adds its own."""

    first_chunk: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    texts: dict[str, float] = field(default_factory=dict)  # event to the time at which it was sent
    applied: list[float] = field(default_factory=list)  # text sent to its first chunk received
    missed: int = 0

    @property
    def periods(self) -> list[float]:
        """Return the times between two chunks."""
        return [b - a for a, b in pairwise(self.arrivals)]


def run_client(url: str, *, seconds: float, text: str, paced: bool, seed: int) -> ClientTimes:
    """Take a clip of a server, in real time if ``paced``, and return the times."""
    begin, times = time.perf_counter(), ClientTimes()
    with closing(LiveClient(url, {"seed": seed, "face_seed": seed, "seconds": seconds})) as client:
        stop = threading.Event()
        if paced:
            threading.Thread(target=_play, args=(client, times, text, stop), daemon=True).start()
        for fragment in client.fragments():
            now = time.perf_counter()
            if fragment.is_last:
                continue
            times.arrivals.append(now)
            times.first_chunk = times.first_chunk or now - begin
            times.applied += [now - times.texts[i] for i in fragment.metadata["started_event_ids"] if i in times.texts]
            if not paced:
                client.acknowledge(fragment)
        stop.set()
        times.missed = sum(bool(m.get("deadline_missed")) for m in client.messages)
    return times


def _play(client: LiveClient, times: ClientTimes, text: str, stop: threading.Event) -> None:
    """Acknowledge the playhead of a viewer that started with the first chunk, and send texts."""
    while not stop.wait(_ACK_S):
        if not times.arrivals:
            continue
        played = time.perf_counter() - times.arrivals[0]
        try:
            client.send("session.ack", played_to=played)
            if played > _TEXT_EVERY_S * (len(times.texts) + 0.5):
                name = f"text-{len(times.texts)}"
                times.texts[name] = time.perf_counter()
                client.send("session.interaction", event_id=name, event={"transcript": text})
        except ConnectionClosed:
            return


def compare_batching(talker: Talker, sessions: int, rounds: int) -> dict[str, float]:
    """Return the speed of one pass of all sessions relative to one pass per session, without and with encoding."""
    cond = default_condition(talker)
    all_sessions = [Session(talker, talker.start_row(cond, seed=i), key="") for i in range(sessions)]

    def step(groups: Sequence[Sequence[Session]]) -> tuple[float, float]:
        begin, in_passes = time.perf_counter(), 0.0
        for group in groups:
            for session in group:
                session.apply(session.reserve())
            start = time.perf_counter()
            latents = talker.advance([session.row for session in group])
            in_passes += time.perf_counter() - start
            for session, made in zip(group, latents, strict=True):
                session.mark_events(session.finish(made))
        return in_passes, time.perf_counter() - begin

    for _ in range(talker.window_chunks + 1):
        step([all_sessions])
    joint, alone = [], []
    for _ in range(rounds):
        joint.append(step([all_sessions]))
        alone.append(step([[session] for session in all_sessions]))
    speedup = [median(a[i] for a in alone) / median(j[i] for j in joint) for i in (0, 1)]
    return {"passes": round(speedup[0], 3), "with_encoding": round(speedup[1], 3)}


def bench_serve(talker: Talker, *, sessions: Sequence[int], seconds: float, rounds: int) -> dict[str, Any]:
    """Measure a server of this network for each number of sessions."""
    for count in sessions:
        check_range("--sessions", count, 1, MAX_SESSIONS)
    check_range("--seconds", seconds, 1, MAX_SECONDS)
    options = ServerOptions(port=0, limits=EngineLimits(sessions=max(sessions)))
    text = _TEXTS[talker.english]
    rows: list[dict[str, Any]] = []
    with background_server(talker, options) as server:
        for count in sessions:
            fast = _run_clients(server.url, count, seconds=seconds, text=text, paced=False)
            live = _run_clients(server.url, count, seconds=seconds, text=text, paced=True)
            rows.append({"sessions": count, **_summary(fast, live)})
        session_bytes = server.engine.session_bytes
    for row in rows:
        row["batching"] = compare_batching(talker, row["sessions"], rounds) if row["sessions"] > 1 else None
    return {
        "model": talker.name,
        "device": str(talker.device),
        "nfe": talker.params.num_function_evaluations,
        "chunk_seconds": float(talker.chunk_seconds),
        "session_bytes": session_bytes,
        "rows": rows,
    }


def _run_clients(url: str, count: int, **options: Any) -> list[ClientTimes]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda seed: run_client(url, seed=seed, **options), range(count)))


def _summary(fast: Sequence[ClientTimes], live: Sequence[ClientTimes]) -> dict[str, Any]:
    chunks = sum(len(c.arrivals) for c in fast)
    span = max(c.arrivals[-1] for c in fast) - min(c.arrivals[0] - c.first_chunk for c in fast)
    return {
        "chunk_period_s": _percentiles([p for c in fast for p in c.periods]),
        "chunks_per_second": round(chunks / span, 3),
        "first_chunk_s": _percentiles([c.first_chunk for c in live]),
        "event_applied_s": _percentiles([a for c in live for a in c.applied]),
        "missed_deadlines": sum(c.missed for c in live),
        "chunks": sum(len(c.arrivals) for c in live),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"p50": round(float(np.percentile(values, 50)), 4), "p95": round(float(np.percentile(values, 95)), 4)}


def format_table(result: Mapping[str, Any]) -> str:
    """Format the result as a text table."""

    def show(found: Mapping[str, float] | None) -> str:
        return "-" if found is None else f"{found['p50']:.2f} / {found['p95']:.2f}"

    lines = [
        f"{result['model']} on {result['device']}, {result['nfe']} evaluations per chunk of "
        f"{result['chunk_seconds']} s, {result['session_bytes'] / 1e6:.1f} MB per session",
        "times in seconds, p50 / p95",
        f"{'sessions':>8}  {'first chunk':>13}  {'chunk period':>13}  {'text applied':>13}  {'missed':>9}  "
        f"{'chunks/s':>8}  {'batched':>8}",
    ]
    for row in result["rows"]:
        batched = row["batching"]
        lines.append(
            f"{row['sessions']:>8}  {show(row['first_chunk_s']):>13}  {show(row['chunk_period_s']):>13}  "
            f"{show(row['event_applied_s']):>13}  {row['missed_deadlines']:>4}/{row['chunks']:<4}  "
            f"{row['chunks_per_second']:>8.2f}  {'-' if batched is None else format(batched['passes'], '.2f') + 'x':>8}"
        )
    return "\n".join(lines)
