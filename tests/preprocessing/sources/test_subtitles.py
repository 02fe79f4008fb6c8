"""Subtitles beside a source become words with times."""

import pytest

from preprocessing.io.storage import local_uri
from preprocessing.records import Rejected, Source
from preprocessing.sources.sidecar import read_sidecar
from preprocessing.sources.subtitles import parse_subtitles

SRT = (
    b"\xef\xbb\xbf1\r\n00:00:01,000 --> 00:00:02,000\r\n<i>Hi</i> there,\r\nyou\r\n\r\n"
    b"2\r\n00:00:03,5 --> 00:00:04,000\r\nb&amp;b\r\n"
)
VTT = b"WEBVTT\n\nNOTE nothing\n\nintro\n00:02.000 --> 00:04.000 align:start\none <00:03.000><c>two</c>\n"


def spoken(data: bytes) -> list[tuple[str, float, float]]:
    return [(w.word, w.start, w.end) for w in parse_subtitles(data)]


def test_a_line_shares_its_time_by_letters():
    words = spoken(SRT)
    assert [w for w, _, _ in words] == ["Hi", "there,", "you", "b&b"]
    assert (words[0][1], words[2][2], words[3][1:]) == (1.0, 2.0, (3.5, 4.0))
    assert words[0][2] == pytest.approx(1 + 2 / 11, abs=1e-6)
    assert all(a[2] <= b[1] + 1e-6 for a, b in zip(words, words[1:], strict=False))


def test_marks_inside_a_line_are_used():
    assert spoken(VTT) == [("one", 2.0, 3.0), ("two", 3.0, 4.0)]


def test_wrong_files_say_so():
    with pytest.raises(ValueError, match="no line with times"):
        parse_subtitles(b"hello")
    with pytest.raises(ValueError, match="ends before"):
        parse_subtitles(b"00:00:02.000 --> 00:00:01.000\nx")


def test_they_are_read_beside_the_source_after_json_and_the_manifest(tmp_path):
    source = Source(uri=local_uri(tmp_path / "a b.mp4"), size=0, fingerprint="")
    assert read_sidecar(source).transcript is None  # missing stays missing
    (tmp_path / "a b.srt").write_bytes(SRT)
    assert read_sidecar(source).transcript[0].word == "Hi"
    (tmp_path / "a b.vtt").write_bytes(VTT)
    assert read_sidecar(source).transcript[0].word == "one"
    (tmp_path / "a b.json").write_text('{"transcript": [{"word": "x", "start": 0, "end": 1}]}')
    assert [w.word for w in read_sidecar(source).transcript] == ["x"]
    (tmp_path / "a b.json").unlink()
    (tmp_path / "a b.vtt").write_bytes(b"WEBVTT")
    with pytest.raises(Rejected, match="bad_sidecar"):
        read_sidecar(source)
