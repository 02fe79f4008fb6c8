"""A session of a random network: snapshots continue exactly, texts are scheduled, voices replace the sink."""

import numpy as np
import pytest
import torch

from mfcore.errors import UserInputError
from preprocessing.records import Word
from tests.helpers.flash_beep import toy_talker
from workflows.serving.appearance import default_condition
from workflows.serving.session import Session
from workflows.serving.snapshots import SnapshotStore, new_key, pack_session, unpack_session
from workflows.serving.transcript import GAP_SECONDS, LEAD_SECONDS, MAX_SCHEDULED_SECONDS, START_SECONDS, ScheduledWords


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return toy_talker(tmp_path_factory.mktemp("network"))


def new_session(talker) -> Session:
    session = Session(talker, talker.start_row(default_condition(talker), seed=1), key=new_key())
    session.say(talker.timed_words("hello there and more"), "one")
    return session


def advance(session: Session, chunks: int) -> list[tuple]:
    """Return the signals of the next chunks."""
    made, push = [], session.decoder.push
    session.decoder.push = lambda latents: made.append(push(latents)) or made[-1]
    for _ in range(chunks):
        session.apply(session.reserve())
        session.mark_events(session.finish(session.talker.advance([session.row])[0]))
    session.decoder.push = push
    return [(signals.frames, signals.samples) for signals in made]


def test_a_snapshot_continues_exactly(talker):
    whole, cut = new_session(talker), new_session(talker)
    advance(whole, 7), advance(cut, 7)
    again = unpack_session(pack_session(cut), talker)
    assert (again.row.chunk, again.words) == (7, cut.words)
    same = again.sent == cut.sent
    assert same, "fragments differ"  # their bytes are too long for a comparison in the message
    assert again.key != cut.key
    for (frames, samples), (other, sound) in zip(advance(whole, 4), advance(again, 4), strict=True):
        assert np.abs(frames.astype(int) - other).max() <= 1
        np.testing.assert_allclose(samples, sound, atol=1e-4)


def test_damaged_snapshots_and_those_of_other_networks_are_refused(talker, tmp_path):
    session = new_session(talker)
    advance(session, 1)
    data = pack_session(session)
    for damaged in (b"", b"x" * 200, data[:-10]):
        with pytest.raises(UserInputError, match="damaged"):
            unpack_session(damaged, talker)
    with pytest.raises(UserInputError, match="another network"):
        unpack_session(data.replace(talker.fingerprint.encode(), b"0" * 16), talker)
    for store in (SnapshotStore(str(tmp_path)), SnapshotStore(None)):
        key = new_key()
        store.write(key, data)
        assert store.read(key) == data
        for wrong in ("", "../" + key, new_key()):
            with pytest.raises(UserInputError, match="no snapshot"):
                store.read(wrong)


def test_texts_follow_each_other_and_the_past_is_forgotten():
    words = ScheduledWords()
    text = [Word(word="a", start=0.0, end=0.4), Word(word="b", start=0.4, end=1.0)]
    assert words.append(text, 2.0) == pytest.approx((2 + LEAD_SECONDS, 3 + LEAD_SECONDS))
    assert words.append(text, 2.5)[0] == pytest.approx(3 + LEAD_SECONDS + GAP_SECONDS)
    assert words.append(text, 60.0)[0] == pytest.approx(60 + LEAD_SECONDS)
    words.forget_before(10.0)
    assert len(words.words) == 2
    assert ScheduledWords().append(text, 0.0)[0] == START_SECONDS  # the first chunk already reads it
    words.append([Word(word="c", start=0.0, end=MAX_SCHEDULED_SECONDS)], 61.0)
    with pytest.raises(UserInputError, match="wait to be spoken"):
        words.append(text, 61.0)


def test_a_new_voice_changes_the_sound_and_costs_no_history(talker):
    one, other = new_session(talker), new_session(talker)
    advance(one, 3), advance(other, 3)
    voice = 0.3 * torch.sin(torch.arange(16000) / 5)
    cond = talker.encode(caption="", first_frame=torch.zeros(32, 32, 3, dtype=torch.uint8), voice=voice)
    other.change(cond, "voice", event_id="v", chunks=1)
    before = other.row.cache.num_bytes
    (_, sound), (_, changed) = advance(one, 2)[1], advance(other, 2)[1]
    assert np.abs(sound - changed).max() > 1e-3
    assert other.row.cache.num_bytes == one.row.cache.num_bytes >= before


def test_memory_and_words_stay_constant(talker):
    session = new_session(talker)
    advance(session, 12)
    size = session.row.cache.num_bytes
    for _ in range(4):
        session.say(talker.timed_words("more words"), "")
        advance(session, 4)
    assert session.row.cache.num_bytes == size
    assert len(session.words.words) <= 8
    assert len(session.sent) == 8
