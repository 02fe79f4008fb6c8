"""Clock of decoded media: times of frames and audio, before and after the codecs.

`python tests/preprocessing/media/test_decoder_clock.py` prints the table of
docs/dev/lab-notes/2026-11-20-preprocessing-clock.md.
"""

import json
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.dataset.reader import open_dataset
from preprocessing.media.decoder import Decoder
from preprocessing.media.probe import probe
from tests.helpers.av_clock_media import Fixture, find_beeps, find_flashes, make, read_numbers
from workflows.data.build import build_dataset
from workflows.data.reconstruct import reconstruct_clip

FPS, RATE = Fraction(24), 16000
UNEVEN = lambda n: (n % 7) * (n % 5) < 9
X264 = ("-c:v", "libx264", "-preset", "ultrafast", "-crf", "10", "-pix_fmt")
MPEG2 = ("-c:v", "mpeg2video", "-q:v", "2", "-pix_fmt", "yuv420p", "-flags", "+ildct+ilme", "-g", "12")
PCM = ("-c:a", "pcm_s16le")
CENTER = ("-af", "pan=5.1|FC=c0|FL=0*c0|FR=0*c0|LFE=0*c0|BL=0*c0|BR=0*c0")
HDR = ("-color_primaries", "bt2020", "-colorspace", "bt2020nc", "-color_trc")

FIXTURES = [
    Fixture(name="constant_25"),
    Fixture(name="ntsc_29_97", fps=(30000, 1001)),
    Fixture(name="film_23_976", fps=(24000, 1001)),
    *(Fixture(name=f"constant_{n}", fps=(n, 1)) for n in (10, 30, 50, 60)),
    Fixture(name="variable_mkv", fps=(30, 1), suffix="mkv", keep=UNEVEN),
    Fixture(name="variable_mp4", fps=(30, 1), keep=UNEVEN),
    Fixture(name="picture_gap", keep=lambda n: not 20 <= n < 40),
    Fixture(name="sound_80_ms_late_mp4", audio_late=0.08),
    Fixture(name="sound_80_ms_late_mkv", audio_late=0.08, suffix="mkv"),
    Fixture(name="sound_300_ms_early_mp4", video_late=0.3),
    Fixture(name="sound_300_ms_early_mkv", video_late=0.3, suffix="mkv"),
    Fixture(name="negative_start_mp4", video_late=-0.2, audio_late=-0.2, muxer=("-avoid_negative_ts", "disabled"),
            copy=("-copyts",)),
    Fixture(name="edit_list_cut", copy=("-ss", "0.703"), codec=(*X264, "yuv420p", "-preset", "medium", "-bf", "3")),
    Fixture(name="b_frames", codec=(*X264, "yuv420p", "-preset", "medium", "-bf", "3")),
    Fixture(name="fragmented", muxer=("-movflags", "frag_keyframe+empty_moov+delay_moov")),
    Fixture(name="transport_stream", suffix="ts", sound=("-c:a", "mp2")),
    Fixture(name="transport_stream_at_10_h", suffix="ts", audio_late=0.08, muxer=("-output_ts_offset", "36000")),
    Fixture(name="sound_gap", suffix="mkv", sound=(*PCM, "-af", "aselect='not(between(t,0.8,0.95))'")),
    Fixture(name="sound_gap_aac", sound=("-c:a", "aac", "-af", "aselect='not(between(t,0.75,0.95))'")),
    Fixture(name="sound_shorter", sound_seconds=2.0),
    Fixture(name="sound_longer", sound_seconds=4.5),
    Fixture(name="rotated_90", muxer=("-metadata:s:v", "rotate=90"), turn=3),
    Fixture(name="wide_pixels", picture="setsar=2", size=(64, 128)),
    Fixture(name="interlaced_top_25i", fps=(50, 1), every=2, picture="tinterlace=interleave_top", codec=MPEG2,
            suffix="ts", direct=True, sound=("-c:a", "mp2")),
    Fixture(name="interlaced_bottom_29_97i", fps=(60000, 1001), every=2, picture="tinterlace=interleave_bottom",
            codec=(*MPEG2, "-top", "0"), suffix="mkv"),
    Fixture(name="interlaced_h264", fps=(50, 1), every=2, picture="tinterlace=interleave_top",
            codec=(*X264, "yuv420p", "-x264opts", "tff=1")),
    Fixture(name="ten_bit", codec=(*X264, "yuv420p10le")),
    Fixture(name="hdr_pq", codec=(*X264, "yuv420p10le", *HDR, "smpte2084")),
    Fixture(name="hdr_hlg", codec=(*X264, "yuv420p10le", *HDR, "arib-std-b67")),
    Fixture(name="mjpeg_8_khz_avi", suffix="avi", codec=("-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj420p"),
            sound=(*PCM, "-ar", "8000")),
    Fixture(name="stereo_96_khz_mov", suffix="mov", sound=(*PCM, "-ar", "96000", "-ac", "2")),
    Fixture(name="stereo_192_khz_mkv", suffix="mkv", sound=(*PCM, "-ar", "192000", "-ac", "2")),
    Fixture(name="surround_centre_only", suffix="mov", sound=(*PCM, "-ar", "48000", *CENTER)),
    Fixture(name="surround_aac", sound=("-c:a", "aac", "-ac", "6")),
    Fixture(name="opus_mkv", suffix="mkv", direct=True, sound=("-c:a", "libopus"), early=0.0065),
    Fixture(name="opus_webm_late", suffix="webm", direct=True, audio_late=0.08, sound=("-c:a", "libopus"), early=0.0065,
            codec=("-c:v", "libvpx", "-deadline", "realtime", "-b:v", "4M")),
    Fixture(name="opus_mp4", direct=True, sound=("-c:a", "libopus")),
    Fixture(name="opus_ts", suffix="ts", direct=True, sound=("-c:a", "libopus")),
    Fixture(name="vorbis_mkv", suffix="mkv", direct=True, sound=("-c:a", "libvorbis")),
    Fixture(name="aac_mkv", suffix="mkv", direct=True),
    Fixture(name="mp3_mkv", suffix="mkv", direct=True, sound=("-c:a", "libmp3lame")),
    Fixture(name="flv", suffix="flv"),
]  # fmt: skip
OFTEN = (  # the others belong to the slow tests
    *("ntsc_29_97", "variable_mkv", "sound_300_ms_early_mkv", "negative_start_mp4", "edit_list_cut", "rotated_90"),
    *(
        "transport_stream_at_10_h",
        "sound_gap",
        "interlaced_top_25i",
        "hdr_hlg",
        "surround_centre_only",
        "opus_webm_late",
    ),
)


def truth_of_sound(path: Path) -> float:
    """Return the seconds by which the audio of the file is later than configured.

    Independent of our decoding: every packet is decoded, priming included, and sample 0 is at the first packet's
    timestamp. (A Vorbis decoder gives nothing for its first packet: there the first frame's timestamp.)
    """
    rows = ["-show_entries", "packet=pts_time:frame=pts_time:stream=codec_name", "-show_packets", "-show_frames"]
    command = [
        "ffprobe",
        "-v",
        "error",
        "-select_streams",
        "a:0",
        *rows,
        "-of",
        "json",
        "-read_intervals",
        "%+#4",
        path,
    ]
    facts = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    kind = "frame" if facts["streams"][0]["codec_name"] == "vorbis" else "packet"
    first = next(float(p["pts_time"]) for p in facts["packets_and_frames"] if p["type"] == kind)
    raw = ["ffmpeg", "-v", "error", "-flags2", "+skip_manual", "-i", path, "-map", "0:a:0", "-ac", "1", "-ar", "48000"]
    wave = np.frombuffer(subprocess.run([*raw, "-f", "f32le", "-"], capture_output=True, check=True).stdout, np.float32)
    return first + float(find_beeps(wave, 48000)[0])


def decode_all(fixture: Fixture, path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    info = probe(path)
    with Decoder(path, info, fps=FPS, size=fixture.size, sample_rate=RATE) as decoder:
        frames, wave = decoder.read(1000)
        assert decoder.failure() is None
    assert frames is not None
    assert wave is not None
    return np.rot90(frames, fixture.turn, (1, 2)), wave, info.start


def measure(fixture: Fixture, folder: Path) -> tuple[float, float, float]:
    """Return the largest frame error (source frames), largest and median beep error (s)."""
    path = make(fixture, folder)
    frames, wave, start = decode_all(fixture, path)
    kept = np.array(fixture.kept(round(3 / fixture.step)))
    shown = read_numbers(frames)
    assert shown[0] in kept
    assert shown[0] == kept[0] or fixture.copy, "only a cut file may begin later"
    instants = np.arange(len(frames)) / float(FPS)
    inside = instants <= (kept[-1] - shown[0]) * fixture.step
    # the nearest frame that was kept is the best that can be shown; half the (local) source frame is the bound
    error = np.abs((shown - shown[0]) * fixture.step - instants)[inside]
    gaps = np.diff(kept) * fixture.step
    place = np.searchsorted(kept, shown[inside])
    bound = np.array([gaps[max(0, p - 1) : p + 1].max() / 2 for p in place])
    first = fixture.video_late + shown[0] * fixture.step - fixture.audio_late + fixture.early
    heard = fixture.beeps[fixture.beeps < fixture.sound_seconds - 0.05]
    expected = np.array([b - first for b in heard if 0 <= b - first < len(wave) / RATE - 0.05])
    found = find_beeps(wave, RATE)
    assert len(found) == len(expected), (found, expected)
    own = found[0] + start - truth_of_sound(path) if not fixture.copy else 0.0
    return float((error / bound).max() / 2), float(np.abs(found - expected).max()), abs(float(own))


def after_codecs(fixture: Fixture, folder: Path) -> float:
    """Return the median audio delay in seconds after the codecs."""
    (folder / "media").mkdir()
    make(fixture, folder / "media")
    media = str(folder / "media" / f"{fixture.name}.{fixture.suffix}")
    config = PreprocessConfig(workers=0, sizes=(fixture.size,), window_seconds=Fraction(3))
    build_dataset([media], str(folder / "set"), config, progress=lambda *_: None)
    late, meant = [], fixture.audio_late - fixture.video_late - fixture.early
    for clip in open_dataset(str(folder / "set")).ids:
        reconstruct_clip(str(folder / "set"), clip, str(folder / f"{clip}.mp4"))
        frames, wave, _ = decode_all(fixture, folder / f"{clip}.mp4")
        flashes, beeps = find_flashes(frames) / float(FPS), find_beeps(wave, RATE)
        late += [min(beeps - flash - meant, key=abs) for flash in flashes if len(beeps)]
    assert late, "nothing to measure"
    return float(np.median(late))


def allowed(fixture: Fixture) -> float:
    """Return the tolerance: 10 ms and half an output frame; more for slower sources."""
    return 0.010 + 0.5 * max(1 / 24, fixture.step * fixture.every)


@pytest.mark.parametrize(
    "fixture",
    [f if f.name in OFTEN else pytest.param(f, marks=pytest.mark.slow) for f in FIXTURES],
    ids=lambda f: f.name,
)
def test_frames_within_half_a_source_frame_and_sound_within_a_millisecond(fixture, tmp_path):
    frame_error, beep_error, own_error = measure(fixture, tmp_path)
    assert frame_error <= 0.5 + 0.02  # matroska rounds timestamps to milliseconds
    assert beep_error < 0.001
    assert own_error < 0.001


@pytest.mark.parametrize(
    "fixture",
    [f if f.name == "opus_webm_late" else pytest.param(f, marks=pytest.mark.slow) for f in FIXTURES],
    ids=lambda f: f.name,
)
def test_audio_and_video_stay_in_sync_through_the_codecs(fixture, tmp_path):
    assert abs(after_codecs(fixture, tmp_path)) < allowed(fixture)


if __name__ == "__main__":
    for one in FIXTURES:
        with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as other:
            frame, beep, own = measure(one, Path(name))
            after = after_codecs(one, Path(other))
        row = f"| {one.name} | {frame:.3f} | {1000 * beep:.3f} | {1000 * own:.3f} | {1000 * after:+.1f} |\n"
        sys.stdout.write(row)
