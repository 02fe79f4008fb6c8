"""Make a clip on a server (``mfctl generate --server URL``)."""

import base64
import json
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import urlopen

from mfcore.errors import UserInputError, check_range
from preprocessing.speech.frontend import phonemes_of_text
from workflows.inference.inputs import estimate_word_times
from workflows.inference.prompt import DEFAULT_SECONDS, MAX_SECONDS, TAIL_SECONDS, ClipPrompt
from workflows.serving.client import OPEN_TIMEOUT_S, socket_url, write_live_clip
from workflows.serving.transcript import START_SECONDS
from workflows.utils.output_file import check_output_file


def generate_remotely(
    server: str, prompt: ClipPrompt, *, out: str, seed: int = 0, overwrite: bool = False
) -> dict[str, Any]:
    """Write a clip that a server makes and return its facts. Raises UserInputError for wrong input."""
    check_output_file(out, suffix=".mp4", overwrite=overwrite)
    check_range("--seconds", prompt.seconds, 0, MAX_SECONDS, above=True)
    if (prompt.speed, prompt.pauses) != (1.0, 1.0):
        raise UserInputError("--speed and --pauses: a server has no such options. Omit them with --server.")
    text = _text(prompt.transcript)
    start = {
        "format": "m4s",
        "seed": seed,
        "prompt": prompt.caption or None,
        "transcript": text,
        "face": _file(prompt.first_frame, "--first-frame"),
        "voice": _file(prompt.voice, "--voice"),
    }
    seconds = prompt.seconds or _clip_seconds(server, text)
    given = {name: value for name, value in start.items() if value is not None}
    return write_live_clip(server, given, Path(out), seconds=seconds)


def _text(transcript: str | None) -> str:
    """Return the text of a transcript: a server gives it times."""
    text = transcript or ""
    if text.lower().endswith((".json", ".srt", ".vtt")) or text.lstrip().startswith(("[", "{")):
        raise UserInputError("--transcript: a server takes text without times. Give the text itself.")
    if text.lower().endswith(".txt"):
        try:
            return Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserInputError(f"--transcript {text} cannot be read: {error}. Use a text file.") from None
    return text


def _file(path: str | None, option: str) -> str | None:
    if path is None:
        return None
    try:
        return base64.b64encode(Path(path).read_bytes()).decode()
    except OSError as error:
        raise UserInputError(f"{option} {path} cannot be read: {error.strerror}. Use an existing file.") from None


def _clip_seconds(server: str, text: str) -> float:
    """Return the length of a clip that ends after its text."""
    if not text.strip():
        return DEFAULT_SECONDS
    words = phonemes_of_text(text, start=0.0) if fetch_info(server)["english"] else estimate_word_times(text.split())
    return START_SECONDS + words[-1].end + TAIL_SECONDS if words else DEFAULT_SECONDS


def fetch_info(server: str) -> dict[str, Any]:
    """Return the answer of ``/v1/info``. Raises UserInputError if the server does not answer."""
    parts = urlsplit(socket_url(server))
    scheme = "https" if parts.scheme == "wss" else "http"
    url = urlunsplit((scheme, parts.netloc, parts.path.replace("realtime/video", "info"), parts.query, ""))
    try:
        with urlopen(url, timeout=OPEN_TIMEOUT_S) as answer:
            return json.loads(answer.read())
    except (URLError, OSError, ValueError) as error:
        raise UserInputError(
            f"--server {server}: no answer: {error}. Check that `mfctl serve` runs there, and its token."
        ) from None
