"""Subtitle files become words with times."""

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


def test_words_share_the_time_of_a_cue_by_letters():
    words = spoken(SRT)
    assert [w for w, _, _ in words] == ["Hi", "there,", "you", "b&b"]
    assert (words[0][1], words[2][2], words[3][1:]) == (1.0, 2.0, (3.5, 4.0))
    assert words[0][2] == pytest.approx(1 + 2 / 11, abs=1e-6)
    assert all(a[2] <= b[1] + 1e-6 for a, b in zip(words, words[1:], strict=False))


def test_times_inside_a_cue_are_used():
    assert spoken(VTT) == [("one", 2.0, 3.0), ("two", 3.0, 4.0)]


ROLLING_VTT = b"""WEBVTT
Kind: captions
Language: en

00:00:00.160 --> 00:00:02.389 align:start position:0%
\x20
hello<00:00:00.400><c> my</c><00:00:00.640><c> friends</c>

00:00:02.389 --> 00:00:02.399 align:start position:0%
hello my friends
\x20

00:00:02.399 --> 00:00:04.150 align:start position:0%
hello my friends
today<00:00:02.800><c> we</c><00:00:03.000><c> talk</c>

00:00:04.150 --> 00:00:04.160 align:start position:0%
today we talk
\x20
"""
ROLLING_SRT = b"""1
00:00:00,160 --> 00:00:02,389
hello my friends

2
00:00:02,389 --> 00:00:02,399
hello my friends

3
00:00:02,399 --> 00:00:04,150
hello my friends
today we talk

4
00:00:04,150 --> 00:00:04,160
today we talk
"""


@pytest.mark.parametrize("data", [ROLLING_VTT, ROLLING_SRT], ids=["vtt", "srt"])
def test_rolling_captions_give_each_word_once(data: bytes):
    words = spoken(data)
    assert [w for w, _, _ in words] == ["hello", "my", "friends", "today", "we", "talk"]
    assert (words[0][1], words[2][2], words[3][1], words[5][2]) == (0.16, 2.389, 2.399, 4.15)


def test_times_of_words_in_rolling_captions_are_used():
    assert spoken(ROLLING_VTT)[1:5] == [
        ("my", 0.4, 0.64),
        ("friends", 0.64, 2.389),
        ("today", 2.399, 2.8),
        ("we", 2.8, 3.0),
    ]


def test_repeated_speech_is_kept():
    """Equal cues are repeated speech without rolling captions, or after a pause."""
    assert [
        w for w, _, _ in spoken(b"1\n00:00:01,000 --> 00:00:02,000\nNo\n\n2\n00:00:02,000 --> 00:00:03,000\nNo\n")
    ] == ["No", "No"]
    late = ROLLING_SRT + b"\n5\n00:00:09,000 --> 00:00:10,000\ntoday we talk\n"
    assert [w for w, _, _ in spoken(late)][-3:] == ["today", "we", "talk"]
    assert len(spoken(late)) == 9


def test_invalid_files_raise():
    with pytest.raises(ValueError, match="00:00:01,000"):
        parse_subtitles(b"hello")
    with pytest.raises(ValueError, match="00:00:01.000"):
        parse_subtitles(b"00:00:02.000 --> 00:00:01.000\nx")


def test_manifest_and_json_take_precedence_over_subtitles(tmp_path):
    source = Source(uri=local_uri(tmp_path / "a b.mp4"), size=0, fingerprint="")
    assert read_sidecar(source).transcript is None  # no sidecar: no transcript
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
