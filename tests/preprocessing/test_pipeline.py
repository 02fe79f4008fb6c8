"""Steps and units: spans, rejects with reasons, and reproducible files."""

import hashlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from preprocessing import pipeline
from preprocessing.config import PreprocessConfig
from preprocessing.dataset.units import plan_units
from preprocessing.io.lease import LOCK, Lease, LeaseLostError, verify_lease
from preprocessing.io.storage import Store
from preprocessing.media.decoder import Decoder
from preprocessing.media.mp4_writer import write_mp4
from preprocessing.media.probe import probe
from preprocessing.pipeline import build_encoders, span_plan
from preprocessing.records import Clip, Rejected, Source, Word
from preprocessing.runner import process_unit
from preprocessing.sources.discovery import find_sources
from preprocessing.sources.sidecar import attach_text
from preprocessing.steps.encode import RunningMoments
from preprocessing.steps.quality_filters import FilterConfig, check_audio
from preprocessing.toyworld.world import write_toyworld
from tests.helpers.av_clock_media import numbered_frames, read_numbers, sound
from tests.helpers.media_folder import FPS, RATE, make_folder, silent_black, write_clip
from tests.helpers.source_processing import process_source

CONFIG = PreprocessConfig(workers=0, window_seconds=Fraction(2), sources_per_unit=2)


def spans_of(path: Path, config: PreprocessConfig = CONFIG) -> list[Clip | Rejected]:
    (source,) = find_sources([str(path)])
    return list(process_source(source, config, build_encoders(config)))


def test_a_span_of_k_chunks_is_k_chunks_and_its_first_frame():
    plan = span_plan(CONFIG, build_encoders(CONFIG).timeline)
    assert list(plan.frames) == [1, 13, 25, 37, 49]
    assert list(plan.samples) == [1024 * n for n in (0, 8, 16, 24, 32)]  # 7.8 latents per chunk, those begun count
    assert plan.step == 48
    video_only = replace(CONFIG, modality="video")
    assert list(span_plan(video_only, build_encoders(video_only).timeline).frames) == [1, 13, 25, 37, 49]
    audio_only = replace(CONFIG, modality="audio")
    assert list(span_plan(audio_only, build_encoders(audio_only).timeline).frames) == [1, 12, 24, 36, 48]


def test_spans_start_on_chunk_boundaries_and_hold_whole_chunks(tmp_path):
    first, second = spans_of(write_clip(tmp_path / "a.mp4", 3.2))
    assert isinstance(first, Clip)
    assert isinstance(second, Clip)
    assert (first.span[0], second.span[0]) == (0.0, 2.0)
    assert read_numbers(first.frames).tolist() == list(range(49))
    assert read_numbers(second.frames).tolist() == list(range(48, 73))
    assert (len(first.latents["video"]), len(first.latents["audio"])) == (1 + 12, 32)  # 4 chunks: 3 and 8, 8, 8, 8 each


@pytest.mark.parametrize(("seconds", "chunks"), [(1, 2), (2, 4), (10, 20)])
def test_a_toy_clip_of_whole_chunks_loses_none(seconds, chunks, tmp_path):
    (path,) = write_toyworld(tmp_path / "toy", clips=1, seconds=seconds)
    (clip,) = spans_of(path, replace(CONFIG, window_seconds=Fraction(10)))
    assert isinstance(clip, Clip)
    assert len(clip.frames) == 1 + 12 * chunks
    assert (len(clip.latents["video"]), len(clip.latents["audio"])) == (1 + 3 * chunks, -(-8000 * chunks // 1024))


def test_last_audio_latent_covers_source_audio_then_silence(tmp_path):
    wave = (0.3 * np.sin(np.arange(3 * RATE) * 0.2)).astype(np.float32)
    for name, seconds in (("long", 3.0), ("exact", 2.0)):
        heard = wave[: round(seconds * RATE)]
        write_mp4(tmp_path / f"{name}.mp4", numbered_frames(round(seconds * FPS) + 1), FPS, heard, sample_rate=RATE)
    (long, _), (exact,) = spans_of(tmp_path / "long.mp4"), spans_of(tmp_path / "exact.mp4")
    assert isinstance(long, Clip)
    assert isinstance(exact, Clip)
    assert len(long.waveform) == 32 * 1024  # 2.048 s, beyond the 49 frames of the span
    assert len(long.latents["audio"]) == len(exact.latents["audio"]) == 32
    assert np.abs(long.waveform[-100:]).max() > 0.2
    assert np.allclose(long.waveform[: 2 * RATE - 1024], exact.waveform[: 2 * RATE - 1024], atol=0.02)


def test_peeked_audio_is_read_again(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 3.2)
    with Decoder(path, probe(path), fps=FPS, size=(64, 64), sample_rate=RATE) as decoder:
        decoder.read(24)
        ahead = decoder.peek_audio(1000)
        assert np.array_equal(decoder.read(24)[1][:1000], ahead)
        decoder.read(1000)
        assert len(decoder.peek_audio(10**6)) < 1024  # what the sound codec completed its last frame with


def test_transcript_is_cut_and_shifted_with_the_span():
    words = (Word(word="a", start=0.0, end=0.4), Word(word="b", start=1.9, end=2.5), Word(word="c", start=3.0, end=3.2))
    source = Source(uri="file:///x", size=0, fingerprint="", caption="c", transcript=words)
    clip = attach_text(Clip(source=source, span=(2.0, 3.0), frames=None, waveform=None))
    assert [(w.word, w.start, round(w.end, 6)) for w in clip.transcript] == [("b", 0.0, 0.5)]


def reason(path: Path, config: PreprocessConfig = CONFIG) -> str:
    (only,) = spans_of(path, config)
    assert isinstance(only, Rejected)
    return only.reason


def test_every_bad_clip_has_its_reason(tmp_path):
    black, silence = silent_black()
    frames, wave = numbered_frames(60), sound(2.5, RATE)
    write_mp4(tmp_path / "black.mp4", black, FPS, wave, sample_rate=RATE)
    write_mp4(tmp_path / "silent.mp4", frames, FPS, silence, sample_rate=RATE)
    write_mp4(tmp_path / "frozen.mp4", np.repeat(frames[:1], 60, 0), FPS, wave, sample_rate=RATE)
    write_mp4(tmp_path / "small.mp4", frames[:, ::8, ::8], FPS, wave, sample_rate=RATE)
    (tmp_path / "text.mp4").write_text("no media")
    (tmp_path / "sidecar.json").write_text("{")
    write_clip(tmp_path / "sidecar.mp4", 2.2)
    write_clip(tmp_path / "mute.mp4", 2.2, heard=False)
    write_clip(tmp_path / "sound.mp4", 2.2, picture=False)
    write_clip(tmp_path / "short.mp4", 0.6)
    expected = {
        "black": "black",
        "silent": "silent",
        "frozen": "frozen",
        "small": "too_small",
        "text": "unreadable",
        "sidecar": "bad_sidecar",
        "mute": "no_audio",
        "sound": "no_video",
        "short": "too_short",
    }
    assert {name: reason(tmp_path / f"{name}.mp4") for name in expected} == expected


def test_clipped_audio_is_rejected_and_loud_audio_is_not():
    wave = sound(2.5, RATE)
    clip = Clip(source=Source(uri="", size=0, fingerprint=""), span=(0, 2.5), frames=None, waveform=wave / wave.max())
    assert check_audio(clip, FilterConfig()).loudness_db == pytest.approx(-19.27, abs=0.01)
    with pytest.raises(Rejected, match="clipped"):
        check_audio(replace(clip, waveform=np.clip(150 * wave, -1, 1)), FilterConfig())


def test_truncated_file_keeps_complete_spans_or_has_a_reason(tmp_path):
    path = write_clip(tmp_path / "whole.mp4", 3.2)
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    found = spans_of(tmp_path / "cut.mp4")
    assert found  # never nothing
    reasons = ("unreadable", "corrupt", "decode_error", "too_short", "truncated")
    assert all(isinstance(f, Clip) or f.reason in reasons for f in found)


def test_lost_rest_of_a_truncated_file_is_a_reject(tmp_path):
    (path,) = write_toyworld(tmp_path / "toy", clips=1, seconds=6)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 3])
    kept, lost = spans_of(tmp_path / "cut.mp4", replace(CONFIG, window_seconds=Fraction(6)))
    assert isinstance(kept, Clip)
    assert isinstance(lost, Rejected)
    assert (lost.step, lost.reason) == ("decode", "truncated")
    assert kept.span[1] <= lost.span[0] < kept.span[1] + 0.5
    assert lost.span[1] == pytest.approx(6, abs=0.05)
    (tmp_path / "parts.jsonl").write_text(
        '{"uri": "cut.mp4", "start": 0, "end": 4}\n{"uri": "cut.mp4", "start": 0, "end": 1.1}\n'
    )
    short, long = (  # in the order of their URIs
        list(process_source(s, CONFIG, build_encoders(CONFIG))) for s in find_sources([str(tmp_path / "parts.jsonl")])
    )
    assert [getattr(found, "reason", "kept") for found in long] == ["kept", "truncated"]
    assert long[1].span[1] == 4
    assert [getattr(found, "reason", "kept") for found in short] == ["kept"]


def test_unimodal_datasets_need_only_their_stream(tmp_path):
    write_clip(tmp_path / "mute.mp4", 2.2, heard=False)
    write_clip(tmp_path / "sound.mp4", 2.2, picture=False)
    (seen,) = spans_of(tmp_path / "mute.mp4", replace(CONFIG, modality="video"))
    (heard,) = spans_of(tmp_path / "sound.mp4", replace(CONFIG, modality="audio"))
    assert isinstance(seen, Clip)
    assert isinstance(heard, Clip)
    assert set(seen.latents) == {"video"}
    assert set(heard.latents) == {"audio"}
    assert len(heard.latents["audio"]) == 32


def test_a_crash_in_a_step_is_a_reject(tmp_path, monkeypatch):
    def crash(clip, **_):
        raise ZeroDivisionError("step is broken")

    monkeypatch.setattr(pipeline, "encode_clip", crash)
    (only,) = spans_of(write_clip(tmp_path / "a.mp4", 2.2))
    assert isinstance(only, Rejected)
    assert (only.step, only.reason, only.detail) == ("encode", "error", "ZeroDivisionError: step is broken")
    assert only.span == (0.0, 2.041667)


def test_manifest_selects_a_part_of_a_file(tmp_path):
    write_clip(tmp_path / "a.mp4", 4.0)
    (tmp_path / "list.jsonl").write_text('{"uri": "a.mp4", "start": 1.5, "end": 2.6, "caption": "part"}\n')
    (source,) = find_sources([str(tmp_path / "list.jsonl")])
    (clip,) = process_source(source, CONFIG, build_encoders(CONFIG))
    assert isinstance(clip, Clip)
    assert (clip.span[0], clip.caption) == (1.5, "part")
    assert read_numbers(clip.frames).tolist() == list(range(36, 61))


def test_sources_are_found_in_folders_globs_and_manifests(tmp_path):
    folder = make_folder(tmp_path / "media")
    names = ["good.mp4", "long.mp4", "mute.mp4", "short.mp4", "text.mp4"]
    assert [s.uri.rsplit("/", 1)[1] for s in find_sources([str(folder)])] == names
    assert find_sources([f"{folder}/*.mp4", str(folder)]) == find_sources([str(folder)])
    (tmp_path / "list.csv").write_text("uri,caption\nmedia/good.mp4,hello\n")
    assert [s.caption for s in find_sources([str(tmp_path / "list.csv")])] == ["hello"]
    with pytest.raises(ValueError, match="no such file or folder"):
        find_sources([str(tmp_path / "missing")])


def test_new_sources_become_new_units_and_changed_ones_raise():
    sources = [Source(uri=f"file:///{i}", size=i, fingerprint=str(i)) for i in range(5)]
    first = plan_units([], sources[:3], 2, "c")
    grown = plan_units(first, sources, 2, "c")
    assert grown[:2] == first
    assert [len(unit.sources) for unit in grown] == [2, 1, 2]
    with pytest.raises(ValueError, match="new dataset"):
        plan_units(first, [replace(sources[0], fingerprint="other")], 2, "c")


def test_unit_processed_twice_has_equal_bytes(tmp_path):
    units = plan_units([], find_sources([str(make_folder(tmp_path / "media"))]), 5, CONFIG.fingerprint)

    def content(place: Path) -> dict[str, str]:
        store = Store(str(place))
        with Lease(store) as lease:
            process_unit(units[0], store, lease.token, CONFIG, encoders=build_encoders(CONFIG))
        files = (p for p in place.rglob("*") if p.is_file())
        return {str(p.relative_to(place)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    first = content(tmp_path / "a")
    assert first == content(tmp_path / "b")
    assert len(first) == 3  # clips, rejects, marker


def test_an_orphaned_worker_publishes_nothing(tmp_path):
    store = Store(str(tmp_path / "out"))
    (unit,) = plan_units([], find_sources([str(write_clip(tmp_path / "a.mp4", 2.2))]), 5, CONFIG.fingerprint)
    with Lease(store), pytest.raises(LeaseLostError):
        process_unit(unit, store, "token of a dead driver", CONFIG, encoders=build_encoders(CONFIG))
    assert store.list_entries() == []


def test_second_driver_raises_and_dead_driver_is_replaced(tmp_path):
    store = Store(str(tmp_path / "out"))
    with Lease(store) as first, pytest.raises(ValueError, match="being written by process"):
        Lease(store).__enter__()
    assert not store.exists(LOCK)
    dead = Lease(store)
    store.write(LOCK, dead._content().replace(b'"pid": ', b'"pid": 9'))  # a process that does not exist
    with Lease(store) as second:
        verify_lease(store, second.token)
        with pytest.raises(LeaseLostError):
            verify_lease(store, first.token)


def test_statistics_of_parts_are_those_of_the_whole():
    draw = torch.Generator().manual_seed(1)
    clips = [
        torch.randn(7, 3, 2, 2, generator=draw) * torch.tensor([1.0, 5.0, 0.2])[:, None, None] + 2 for _ in range(4)
    ]
    parts = [RunningMoments.zeros(3) for _ in clips]
    for part, clip in zip(parts, clips, strict=True):
        part.add(clip, head=1)
    merged = parts[0] + parts[1] + (parts[2] + RunningMoments.from_json(parts[3].to_json()))
    stats = merged.stats()
    assert stats is not None
    rest = torch.cat([c[1:] for c in clips]).transpose(0, 1).flatten(1).double()
    heads = torch.cat([c[:1] for c in clips]).transpose(0, 1).flatten(1).double()
    for got, want in (
        (stats.mean, rest.mean(1)),
        (stats.std, rest.std(1, correction=0)),
        (stats.head_mean, heads.mean(1)),
    ):
        assert torch.allclose(torch.tensor(got, dtype=torch.float64), want, atol=1e-9)


def test_contradictory_settings_raise():
    for wrong in ({"sizes": ((60, 64),)}, {"min_chunks": 30}, {"sources_per_unit": 0}):
        with pytest.raises(ValueError):
            PreprocessConfig(**wrong)


def test_rejects_are_rows(tmp_path):
    store = Store(str(tmp_path / "out"))
    (unit,) = plan_units([], find_sources([str(make_folder(tmp_path / "media"))]), 5, CONFIG.fingerprint)
    with Lease(store) as lease:
        marker = process_unit(unit, store, lease.token, CONFIG, encoders=build_encoders(CONFIG))
    rows = pq.read_table(tmp_path / "out" / "rejects" / f"{unit.name}.parquet").to_pylist()
    assert [(r["uri"].rsplit("/", 1)[1], r["reason"]) for r in rows] == [
        ("mute.mp4", "no_audio"),
        ("short.mp4", "too_short"),
        ("text.mp4", "unreadable"),
    ]
    assert (marker["accepted"], marker["rejected_sources"]) == (3, 2)
