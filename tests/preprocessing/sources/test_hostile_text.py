"""Hostile and odd text in manifests, sidecars, subtitles and names: a value, a reject or one message, never a crash."""

import json
import os
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mfcore.errors import UserInputError
from preprocessing.config import PreprocessConfig
from preprocessing.dataset.reader import open_dataset
from preprocessing.io.storage import local_uri
from preprocessing.records import Rejected, Source, SourceLimits
from preprocessing.sources.discovery import display_name, find_sources, split_fragment
from preprocessing.sources.sidecar import read_sidecar
from preprocessing.sources.subtitles import parse_subtitles
from preprocessing.sources.text import clean_text
from tests.helpers.media_folder import write_clip
from workflows.data.build import build_dataset

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["word", "start", "end"]), inner),
    max_leaves=6,
)


@pytest.fixture
def media(tmp_path) -> Path:
    """Return a folder with an empty file, which is a source that no test here decodes."""
    (tmp_path / "a.mp4").write_bytes(b"x")
    return tmp_path


def found_in(folder: Path, name: str, content: bytes) -> list[Source]:
    (folder / name).write_bytes(content)
    return find_sources([str(folder / name)])


def is_clean(source: Source) -> bool:
    texts = [source.uri, source.caption or "", *(w.word for w in source.transcript or ())]
    return all(text.encode("utf-8") is not None for text in texts)


# ----------------------------------------------------------------------------------------------------------- manifests


@pytest.mark.parametrize(
    ("name", "content", "row"),
    [
        ("m.jsonl", b'{"uri": "a.mp4"}\n[1]\n', "row 2"),
        ("m.jsonl", b'"text"\n', "row 1"),
        ("m.jsonl", b"null\n", "row 1"),
        ("m.jsonl", b'{"uri": "a.mp4"}\n\n{"uri": \n', "row 2"),
        ("m.jsonl", b"[" * 200_000 + b"\n", "row 1"),
        ("m.jsonl", b'{"uri": "a.mp4", "start": 1' + b"0" * 400 + b"}\n", "row 1"),
        ("m.jsonl", b'{"uri": "a.mp4", "start": 1' + b"0" * 5000 + b"}\n", "row 1"),
        ("m.jsonl", b'{"uri": {"a": 1}}\n', "row 1"),
        ("m.jsonl", b'{"uri": "\\ud83d.mp4"}\n', "row 1"),
        ("m.jsonl", b'{"uri": "a.mp4", "transcript": [{"word": 1}]}\n', "row 1"),
        ("m.csv", b"uri,caption\n\xff.mp4,x\n", "row 1"),
        ("m.parquet", b"", "m.parquet"),
        ("m.parquet", b"PAR1 no table", "m.parquet"),
    ],
)
def test_manifest_that_cannot_be_read_is_one_message_with_file_and_row(name, content, row, media):
    with pytest.raises(UserInputError) as caught:
        found_in(media, name, content)
    assert str(media / name) in str(caught.value)
    assert row in str(caught.value)
    assert str(caught.value).encode("utf-8"), "the message can be printed"
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("name", "content", "caption"),
    [
        ("m.jsonl", b'{"uri": "a.mp4", "caption": "nice video \\ud83d"}\n', "nice video \ufffd"),
        ("m.jsonl", b'{"uri": "a.mp4", "caption": "emoji \\ud83d\\ude00"}\n', "emoji \U0001f600"),
        ("m.jsonl", b'{"uri": "a.mp4", "caption": {"en": "x"}}\n', None),
        ("m.jsonl", b'{"uri": "a.mp4", "caption": 7}\n', "7"),
        ("m.csv", b"uri,caption\na.mp4,caf\xe9\n", "caf\ufffd"),
        ("m.csv", b"uri,caption\na.mp4," + b"x" * 200_000 + b"\n", "x" * 200_000),
    ],
)
def test_caption_of_a_manifest_is_text_or_absent(name, content, caption, media, capsys):
    (source,) = found_in(media, name, content)
    assert source.caption == caption
    assert is_clean(source)
    if caption is None or "\ufffd" in caption:
        assert f"warning: {media / name}, row 1: " in capsys.readouterr().err


def test_malformed_transcripts_are_counted_and_the_other_rows_are_used(media, capsys):
    for number in range(9):
        (media / f"{number}.mp4").write_bytes(b"x")
    good = {"uri": "8.mp4", "transcript": [{"word": "\ud83dhi", "start": 0, "end": 1}]}
    rows = [{"uri": f"{n}.mp4", "transcript": [{"word": "x", "start": 10**400, "end": 1}]} for n in range(8)]
    sources = found_in(media, "m.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, good]).encode())
    assert [s.transcript for s in sources[:8]] == [None] * 8
    assert sources[8].transcript[0].word == "\ufffdhi"
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 6
    assert "row 1: transcript" in warned[0]
    assert "3 more rows" in warned[5]


def test_parquet_manifest_with_invalid_text_is_read(media):
    bad = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    table = pa.table({"uri": pa.array(["a.mp4"]), "caption": bad.dictionary_encode(), "ignored": [object.__doc__]})
    pq.write_table(table, media / "m.parquet")
    (source,) = find_sources([str(media / "m.parquet")])
    assert source.caption == "caf\ufffd"


@FEW
@given(row=st.dictionaries(st.sampled_from(["uri", "path", "caption", "transcript", "start", "end"]), JSON))
def test_any_row_of_a_manifest_is_a_source_or_one_message(row, media):
    line = json.dumps({"uri": "a.mp4", **row}).encode() + b"\n"
    try:
        (source,) = found_in(media, "m.jsonl", line)
    except UserInputError as error:
        message = str(error)
        message.encode("utf-8")
        source = None if "m.jsonl" in message else pytest.fail(message)
    if source is None:
        return
    assert is_clean(source)
    split_fragment(source.uri)


@FEW
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".csv", ".parquet"]))
def test_any_bytes_of_a_manifest_are_sources_or_one_message(data, suffix, media):
    with suppress(UserInputError):
        found_in(media, f"m{suffix}", data)


@pytest.mark.slow
def test_half_a_character_reaches_no_dataset(tmp_path, capsys):
    words = [{"word": "hi\ud83d", "start": 0, "end": 1}]
    for name in ("a", "b"):
        (tmp_path / "media").mkdir(exist_ok=True)
        write_clip(tmp_path / "media" / f"{name}.mp4", 1.2)
    (tmp_path / "media" / "a.json").write_text(json.dumps({"caption": "nice \ud83d", "transcript": words}))
    (tmp_path / "media" / "b.txt").write_bytes(b"caf\xe9")
    config = PreprocessConfig(workers=0, window_seconds=Fraction(1), keep_duplicates=True)
    build_dataset([str(tmp_path / "media")], str(tmp_path / "out"), config, progress=lambda *_: None)
    dataset = open_dataset(str(tmp_path / "out"))
    assert sorted(dataset.clip(i).caption for i in range(2)) == ["caf\ufffd", "nice \ufffd"]
    assert "b.txt, row 1: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ sidecars


def reject_of(folder: Path, limits: SourceLimits | None = None) -> Rejected:
    with pytest.raises(Rejected) as caught:
        read_sidecar(Source(uri=local_uri(folder / "a.mp4"), size=0, fingerprint=""), limits)
    return caught.value


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 200_000,
        b'{"caption": {"en": "x"}}',
        b'{"transcript": 7}',
        b'{"transcript": [{"word": {}, "start": 0, "end": 1}]}',
        b'{"transcript": [{"word": "x", "start": 1' + b"0" * 400 + b', "end": 1}]}',
    ],
)
def test_malformed_sidecar_is_a_reject(content, media):
    (media / "a.json").write_bytes(content)
    assert reject_of(media).reason == "bad_sidecar"


def test_text_above_a_limit_is_a_reject(media):
    (media / "a.txt").write_text("word " * 3000)
    assert (reject_of(media).step, reject_of(media).reason) == ("text", "too_long")
    (media / "a.txt").write_text("x")
    (media / "a.srt").write_text("x" * 2000)
    assert reject_of(media, SourceLimits(sidecar_bytes=1000)).reason == "too_long"
    captioned = Source(uri=local_uri(media / "a.mp4"), size=0, fingerprint="", caption="x" * 200_000, transcript=())
    with pytest.raises(Rejected, match="too_long"):
        read_sidecar(captioned)


def test_utf16_and_other_encodings_are_text(media):
    (media / "a.srt").write_bytes("1\n00:00:01,000 --> 00:00:02,000\nh\u00e9llo\n".encode("utf-16"))
    (media / "a.txt").write_bytes(b"caf\xe9")
    source = read_sidecar(Source(uri=local_uri(media / "a.mp4"), size=0, fingerprint=""))
    assert (source.transcript[0].word, source.caption) == ("h\u00e9llo", "caf\ufffd")


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.json", b'{"caption": "nice \\ud83d"}', "caption"),
        (
            "a.json",
            b'{"transcript": [{"word": "x", "start": 0, "end": 1}, {"word": "\\ud83d", "start": 1, "end": 2}]}',
            "word 2",
        ),
        ("a.json", b'{\n"caption": "caf\xe9"}', "row 2"),
        ("a.srt", b"1\n00:00:01,000 --> 00:00:02,000\nx\ncaf\xe9\n", "row 4"),
        ("a.txt", b"one\ntwo\ncaf\xe9\n", "row 3"),
        ("a.txt", "one\n".encode("utf-16") + b"\x00\xd8\n\x00", "row 2"),
    ],
)
def test_replaced_text_of_a_sidecar_is_a_warning_with_file_and_row(name, content, place, media):
    (media / name).write_bytes(content)
    warned: list[str] = []
    assert is_clean(read_sidecar(Source(uri=local_uri(media / "a.mp4"), size=0, fingerprint=""), warn=warned.append))
    assert warned == [f"{media / name}, {place}: characters that are not valid are replaced"]


def test_valid_text_of_a_sidecar_is_no_warning(media):
    (media / "a.json").write_text(json.dumps({"caption": "emoji \U0001f600 \ufffd", "world": "toyworld/1"}))
    (media / "a.srt").write_bytes("1\n00:00:01,000 --> 00:00:02,000\nh\u00e9llo\n".encode("utf-16"))
    warned: list[str] = []
    read_sidecar(Source(uri=local_uri(media / "a.mp4"), size=0, fingerprint=""), warn=warned.append)
    assert warned == []


def test_the_first_warnings_of_a_run_are_printed_and_the_others_counted(media, capsys):
    for number in range(7):
        (media / f"{number}.mp4").write_bytes(b"no media %d" % number)
        (media / f"{number}.txt").write_bytes(b"caf\xe9")
    config = PreprocessConfig(workers=0)
    build_dataset([str(media)], str(media / "out"), config, progress=lambda *_: None)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert lines[0] == f"warning: {media}/0.txt, row 1: characters that are not valid are replaced"
    assert len(lines) == 6
    assert lines[5] == "warning: 2 more files next to sources likewise"


def test_half_a_character_in_the_world_is_replaced(media):
    (media / "a.json").write_text(json.dumps({"world": "toy\ud83d"}))
    assert read_sidecar(Source(uri=local_uri(media / "a.mp4"), size=0, fingerprint="")).world == "toy\ufffd"


@FEW
@given(caption=JSON, transcript=JSON)
def test_any_sidecar_is_text_or_a_reject(caption, transcript, media):
    (media / "a.json").write_text(json.dumps({"caption": caption, "transcript": transcript}))
    with suppress(Rejected):
        assert is_clean(read_sidecar(Source(uri=local_uri(media / "a.mp4"), size=0, fingerprint="")))


# ----------------------------------------------------------------------------------------------------------- subtitles

PARTS = ["1\n", "00:00:01,000 --> 00:00:02,000\n", "00:01.5 --> ", "<00:00:01.5>", "<", ">", "{\\", "&amp;", "\0", "\n"]


@FEW
@given(head=st.sampled_from(["", "WEBVTT\n\n"]), parts=st.lists(st.sampled_from(PARTS) | st.text(max_size=4)))
def test_any_subtitles_are_words_or_an_error(head, parts):
    try:
        words = parse_subtitles((head + "".join(parts)).encode("utf-8", "surrogatepass"))
    except ValueError:
        return
    assert all(w.word == clean_text(w.word) and w.start <= w.end for w in words)


CUE = "00:00:01,000 --> 00:00:02,000\n"
LONG = {
    "digits": "1" * 200_000,
    "digits in lines": ("1" * 4000 + "\n") * 200,
    "open tags": CUE + ("<" * 4000 + "\n") * 100,
    "open braces": CUE + ("{\\" * 2000 + "\n") * 100,
    "many lines": (CUE + "a\n" * 20_000 + "\n") * 3,
    "many cues": (CUE + "a b\n\n") * 5000,
    "spaces": (" " * 4000 + "\n") * 100 + CUE + "a\n",
    "marks": "WEBVTT\n\n" + CUE.replace(",", ".") + "<00:00:01.500>a" * 300 + "\n",
}


@pytest.mark.parametrize("kind", LONG)
def test_time_of_subtitles_is_linear(kind):
    started = time.process_time()
    with suppress(ValueError):
        parse_subtitles(LONG[kind].encode())
    assert time.process_time() - started < 2.5


# --------------------------------------------------------------------------------------------------------------- names


@FEW
@given(name=st.binary(min_size=1, max_size=40).filter(lambda n: b"/" not in n and b"\0" not in n))
def test_any_name_is_a_uri_and_back(name, tmp_path):
    path = os.fsencode(tmp_path) + b"/" + name + b".mp4"
    with open(path, "wb") as file:
        file.write(b"x")
    try:
        (source,) = find_sources([local_uri(os.fsdecode(path))])
        assert source.uri.isascii()
        assert display_name(source.uri).encode("utf-8") is not None
        assert split_fragment(source.uri)[1] is None
    finally:
        os.unlink(path)
