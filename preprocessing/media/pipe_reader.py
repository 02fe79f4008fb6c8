"""Read the pipes of one or two ffmpeg processes into buffers, with time limits."""

import selectors
import subprocess
import time
from collections.abc import Mapping
from typing import IO

import psutil

from preprocessing.media.pipe_buffer import PipeBuffer
from preprocessing.media.probe import KILL_SIGNALS, MediaError

STREAMS: tuple[str, ...] = ("video", "audio")
_ERROR_BYTES = 1 << 20  # stderr that is kept


class PipeReader:
    """Pipes of a process that decodes video and audio, or of one process for each.

    Buffers by name: ``video``, ``audio``, ``error`` and ``audio_error`` (messages of the processes), ``scene`` (scene
    scores), ``unused`` (audio that the other process decodes).
    """

    def __init__(self, stall_seconds: float, wall_seconds: float) -> None:
        self._stall, self._wall = stall_seconds, wall_seconds
        self._last_output = time.monotonic()  # when video or audio last arrived
        self._deadline = self._last_output + wall_seconds
        self._selector, self._open = selectors.DefaultSelector(), set[str]()
        self._buffers = {name: PipeBuffer() for name in ("video", "audio", "error", "scene", "unused", "audio_error")}
        self._repeated = 0  # bytes of audio that the second process decodes again
        self._bytes_read = 0  # by the process that is awaited, when it last stalled
        self.processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[IO[bytes]] = []
        self._streams: dict[str, IO[bytes]] = {}  # pipes of video and audio

    def _register(self, pipe: IO[bytes], name: str) -> None:
        self._selector.register(pipe, selectors.EVENT_READ, name)
        if name in STREAMS:
            self._streams[name] = pipe
        self._open.add(name)

    def close(self) -> None:
        """Stop ffmpeg and close its pipes."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._selector.close()
        for pipe in self._pipes:
            pipe.close()

    def _exit_code(self, process: "subprocess.Popen[bytes]") -> int:
        """Return the exit code of a process that closed its streams. Raise MediaError if it was ended from outside."""
        try:
            code = process.wait(self._stall)
        except subprocess.TimeoutExpired:
            self.close()
            raise MediaError("timeout", f"ffmpeg did not exit within {self._stall:.0f} s") from None
        if code in KILL_SIGNALS:
            raise MediaError("killed", f"ffmpeg was ended from outside with {KILL_SIGNALS[code].name}")
        return code

    def _pump(self, wanted: Mapping[str, int]) -> None:
        """Read the pipes into the buffers; of separate processes, up to the `wanted` bytes of each stream.

        Raise MediaError after `stall_seconds` without output, or at the time limit.
        """
        if len(self.processes) > 1:
            self._listen(wanted)
        for key, _ in self._wait_for_output():
            if self._receive(key.data, key.fd) == 0:
                self._selector.unregister(key.fileobj)
                self._open.discard(key.data)

    def _listen(self, wanted: Mapping[str, int]) -> None:
        """Listen to the streams that lack some of the `wanted` bytes; the processes of the others wait."""
        for name, pipe in self._streams.items():
            listening = pipe in self._selector.get_map()
            if name in self._open and len(self._buffers[name]) < wanted.get(name, 0):
                if not listening:
                    self._selector.register(pipe, selectors.EVENT_READ, name)
            elif listening:
                self._selector.unregister(pipe)

    def _wait_for_output(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Return the pipes with output. Raise MediaError after `stall_seconds` without any, or at the time limit."""
        now = time.monotonic()
        ready: list[tuple[selectors.SelectorKey, int]] = []
        if now < self._deadline:
            ready = self._selector.select(max(0.0, min(self._last_output + self._stall, self._deadline) - now))
        if time.monotonic() >= self._deadline:
            self.close()
            raise MediaError("time_limit", f"decoding took more than limits.wall_seconds={self._wall:g}")
        if not ready and not self._is_reading():
            self.close()
            raise MediaError("timeout", f"no output of ffmpeg for {self._stall:.0f} s")
        return ready

    def _is_reading(self) -> bool:
        """Return True if the process of audio alone has read more of the file: it may pass a part without audio."""
        if "video" in self._streams and len(self.processes) == 1:
            return False
        try:
            position = psutil.Process(self.processes[-1].pid).io_counters().read_chars
        except (psutil.Error, AttributeError):  # ended, or a system without these counters
            return False
        moved, self._bytes_read = position > self._bytes_read, position
        self._last_output = time.monotonic()
        return moved

    def _receive(self, name: str, file: int) -> int:
        """Read a pipe into its buffer. Return the bytes read, 0 at the end."""
        buffer = self._buffers[name]
        count = buffer.receive(file, self._repeated if name == "audio" else 0)
        if name == "audio":
            self._repeated -= min(count, self._repeated)
        if name == "unused":
            buffer.drop(len(buffer))
        if name in ("error", "audio_error"):
            buffer.truncate(_ERROR_BYTES)
        elif name != "scene" and count:
            self._last_output = time.monotonic()
        return count
