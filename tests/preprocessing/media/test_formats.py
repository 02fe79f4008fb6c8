"""Formats that are opened: those of the accepted suffixes, and no text that names other files."""

import subprocess
from fractions import Fraction
from pathlib import Path

import pytest

from preprocessing.media.decoder import Decoder
from preprocessing.media.probe import MediaError, probe
from preprocessing.sources.discovery import MEDIA, SOUND_SUFFIXES
from tests.helpers.media_folder import write_clip

OFTEN = (".avi", ".mp3", ".ts")  # the other suffixes belong to the slow tests
OPTIONS = {".3gp": ("-s", "352x288", "-ar", "8000", "-ac", "1", "-c:a", "aac")}


def playlists(target: Path) -> dict[str, str]:
    """Return texts that name `target` by format."""
    return {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {target.name}\n",
        "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="0" '
        f'bandwidth="1"><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>',
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
    }


@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
@pytest.mark.parametrize("kind", ["hls", "concat", "dash", "sdp"])
def test_text_that_names_other_files_is_not_opened(kind, suffix, tmp_path):
    secret = tmp_path / "secret.mp4"
    write_clip(secret, 0.2)
    path = tmp_path / f"clip{suffix}"
    path.write_text(playlists(secret)[kind])
    with pytest.raises(MediaError) as caught:
        probe(path)
    assert caught.value.reason == "unreadable"
    if kind in ("hls", "concat", "sdp"):
        assert "format" in caught.value.detail, caught.value.detail
        assert kind in caught.value.detail


def test_decoder_does_not_open_text_that_names_other_files(tmp_path):
    """The file may change between probe and decoding."""
    secret, path = tmp_path / "secret.mp4", tmp_path / "clip.mp4"
    write_clip(secret, 0.2)
    path.write_text(playlists(secret)["hls"])
    with Decoder(path, probe(secret), fps=Fraction(24), size=(16, 16), sample_rate=16000) as decoder:
        frames, _ = decoder.read(2)
        assert frames is not None and len(frames) == 0
        assert decoder.failure() is not None


@pytest.mark.parametrize(
    "suffix", [s if s in OFTEN else pytest.param(s, marks=pytest.mark.slow) for s in sorted(MEDIA)]
)
def test_every_accepted_suffix_is_opened(suffix, tmp_path):
    path = tmp_path / f"clip{suffix}"
    picture = [] if suffix in SOUND_SUFFIXES else ["-f", "lavfi", "-i", "testsrc2=s=352x288:r=25:d=0.4"]
    made = [*picture, "-f", "lavfi", "-i", "sine=d=0.4", *OPTIONS.get(suffix, ()), str(path)]
    subprocess.run(["ffmpeg", "-v", "error", *made], check=True)
    info = probe(path)
    assert (info.video is not None) == bool(picture)
    assert info.audio is not None
    with Decoder(path, info, fps=Fraction(24), size=(16, 16), sample_rate=16000) as decoder:
        _, wave = decoder.read(5)
        assert wave is not None and len(wave) > 3000
