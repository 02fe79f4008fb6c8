"""Embedded codecs: exact without truncation, equal when streamed, and close with truncation."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.signal import lfilter
from torch import Tensor

from mfcore.codecs.base import Codec, TextCodec
from mfcore.codecs.dct import DctCodec, DctConfig, dct_matrix
from mfcore.codecs.factory import text_codec_from_id
from mfcore.codecs.hashed_words import HashedWordEncoder
from mfcore.codecs.mel import MelCodec, MelConfig, mel_filterbank
from mfcore.codecs.stats import LatentStats
from mfcore.metrics.av_sync import sound_envelope, sync_offset

RATE = 16000
PINNED_WALL = [1.31233, 0.69273, -1.00253, 1.00253]


def cartoon(frames: int = 25, size: int = 64) -> Tensor:
    """Return a face that moves and speaks on a shaded wall, uint8 (frames, size, size, 3)."""
    y, x = np.mgrid[0:size, 0:size] + 0.5
    film = []
    for i in range(frames):
        t = i / 24
        picture = np.array([70.0, 110, 150]) + (10 * np.sin(x / 9) + 8 * np.cos(y / 7))[..., None]
        cx, cy = size / 2 + 3 * np.sin(2 * t), size / 2 + 2 * np.sin(3 * t)
        mouth = 1.0 + 4 * abs(np.sin(9 * t))
        for dx, dy, a, b, color in [(0, 0, 18, 22, (220, 180, 150)), (0, 10, 6, mouth, (130, 40, 50))]:
            inside = 1 - np.hypot((x - cx - dx) / a, (y - cy - dy) / b)
            mask = np.clip(inside * min(a, b) + 0.5, 0, 1)[..., None]
            picture = picture * (1 - mask) + mask * np.array(color)
        film.append(picture)
    return torch.from_numpy(np.round(np.clip(film, 0, 255)).astype(np.uint8))


def speech(seconds: float = 3.0, seed: int = 0) -> Tensor:
    """Return syllable-like sound: impulses of a gliding pitch through three resonances, with pauses."""
    rng = np.random.default_rng(seed)
    n = int(seconds * RATE)
    pitch = 140 * (1 + 0.08 * np.sin(2 * np.pi * 0.7 * np.arange(n) / RATE))
    source = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0) + 0.01 * rng.standard_normal(n)
    out = np.zeros(n)
    for start in range(800, n - 4000, 4000):
        part = source[start : start + 3200]
        for centre in (rng.uniform(300, 800), rng.uniform(900, 2200), rng.uniform(2400, 3400)):
            decay = np.exp(-np.pi * 100 / RATE)
            part = lfilter([1 - decay], [1, -2 * decay * np.cos(2 * np.pi * centre / RATE), decay**2], part)
        out[start : start + 3200] = 0.4 * part / np.abs(part).max() * np.sqrt(np.hanning(3200))
    return torch.from_numpy(out).float()


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


def level(x: Tensor) -> float:
    """Return the decibels of the root mean square."""
    return float(10 * torch.log10(x.square().mean()))


def decode_in_parts(codec: Codec, latents: Tensor, cuts: list[int]) -> Tensor:
    decoder = codec.decoder()
    pieces = [decoder.push(latents[a:b]) for a, b in pairwise([0, *cuts, len(latents)])]
    return torch.cat([*pieces, decoder.flush()])


def decode_in_turns(codec: Codec, latents: Tensor, cuts: list[int]) -> Tensor:
    """Decode each part with a new decoder that continues after the state of the one before."""
    pieces, state = [], codec.decoder().state()
    for a, b in pairwise([0, *cuts, len(latents)]):
        decoder = codec.decoder()
        decoder.load_state({name: part.clone() for name, part in state.items()})
        pieces.append(decoder.push(latents[a:b]))
        state = decoder.state()
    return torch.cat([*pieces, decoder.flush()])


# video


def test_cosines_are_orthonormal():
    torch.testing.assert_close(dct_matrix(8) @ dct_matrix(8).T, np.eye(8), atol=1e-12, rtol=0)


def test_dct_with_every_coefficient_is_exact():
    codec = DctCodec(DctConfig(channels=192, group=1))
    noise = torch.randint(0, 256, (3, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codec.decode(codec.encode(noise)), noise)


def test_dct_shapes_clock_and_dropped_frames():
    codec = DctCodec()
    latents = codec.encode(cartoon(frames=24))  # 1 + 5 * 4, three frames left over
    assert codec.id == "dct-v1/c48/b8/g4"
    assert latents.shape == (6, 48, 8, 8)
    assert latents.dtype == torch.float32
    assert codec.decode(latents).shape == (21, 64, 64, 3) == (codec.frames(6), 64, 64, 3)
    assert (codec.clock.rate, codec.clock.offset, codec.clock.head) == (6, Fraction(1, 24), 1)
    assert codec.encode(cartoon(frames=1)).shape[0] == 1


def test_dct_preserves_a_video():
    film = cartoon()
    codec = DctCodec()
    decoded = codec.decode(codec.encode(film))
    assert psnr(film, decoded) > 28  # 30.3 when written
    assert psnr(film[:1], decoded[:1]) > 30
    more = DctCodec(DctConfig(channels=96))
    assert psnr(film, more.decode(more.encode(film))) > psnr(film, decoded) + 2


def test_dct_projection_is_idempotent():
    codec = DctCodec()
    latents = codec.encode(cartoon())
    again = codec.encode(codec.decode(latents))
    assert float((again - latents).abs().max()) < 0.05  # rounding to 8 bits alone; latents spread over about 1


def test_dct_static_video_has_equal_frame_and_group_latents():
    codec = DctCodec()
    head, group = codec.encode(cartoon(frames=1).repeat(5, 1, 1, 1))
    shared = int((group.abs().amax((1, 2)) > 1e-5).nonzero().max()) + 1  # channels of change over time are zero
    assert 20 < shared < 48
    torch.testing.assert_close(group[:shared], head[:shared], atol=1e-5, rtol=0)


def test_dct_of_uniform_frames_is_one_coefficient():
    codec = DctCodec()
    grey = codec.encode(torch.full((5, 8, 8, 3), 255, dtype=torch.uint8))
    torch.testing.assert_close(grey[:, 0], torch.full((2, 1, 1), 4.0))  # white: the gain
    assert float(grey[:, 1:].abs().max()) < 1e-4


@pytest.mark.parametrize("cuts", [[], [1], [0, 1, 2, 5], [3]])
def test_dct_streaming_equals_whole(cuts: list[int]):
    codec = DctCodec()
    latents = codec.encode(cartoon())
    assert torch.equal(decode_in_parts(codec, latents, cuts), codec.decode(latents))
    assert torch.equal(decode_in_turns(codec, latents, cuts), codec.decode(latents))


@pytest.mark.parametrize("shape", [(5, 60, 64, 3), (0, 64, 64, 3), (5, 64, 64), (5, 64, 0, 3)])
def test_dct_rejects_other_shapes(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="multiples of 8|at least one frame"):
        DctCodec().encode(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.parametrize("wrong", [{"channels": 193}, {"channels": 0}, {"group": 0}, {"fps": Fraction(0)}])
def test_dct_rejects_invalid_settings(wrong: dict[str, int]):
    with pytest.raises(ValueError):
        DctConfig(**wrong)


# sound


def test_mel_filterbank_equals_the_htk_filterbank():
    librosa = pytest.importorskip("librosa")
    expected = librosa.filters.mel(sr=RATE, n_fft=1024, n_mels=80, htk=True, norm=None)
    np.testing.assert_allclose(mel_filterbank(RATE, 1024, 80), expected, atol=1e-6)


def test_mel_shapes_clock_and_id():
    codec = MelCodec()
    latents = codec.encode(torch.zeros(RATE))
    assert codec.id == "mel-v1/r16000/w1024/h256/m80/g4/c64"
    assert latents.shape == (16, 64)  # 15.6 latents, completed
    assert latents.dtype == torch.float32
    assert codec.decode(latents).shape == (16 * 1024,)
    assert (codec.clock.rate, codec.clock.offset, codec.clock.head) == (Fraction(125, 8), 0, 0)


def test_mel_silence_stays_silent():
    codec = MelCodec()
    assert float(codec.decode(codec.encode(torch.zeros(RATE))).abs().max()) < 1e-4


@pytest.mark.parametrize("scale", [1e-3, 0.03, 0.3])
def test_mel_preserves_the_level(scale: float):
    codec = MelCodec()
    noise = scale * torch.randn(2 * RATE, generator=torch.Generator().manual_seed(0))
    tone = scale * torch.sin(2 * torch.pi * 440 / RATE * torch.arange(2 * RATE))
    for sound in (noise, tone, scale * speech()):
        assert abs(level(codec.decode(codec.encode(sound))[: len(sound)]) - level(sound)) < 1


def test_mel_preserves_the_level_up_to_both_ends():
    codec = MelCodec()
    tone = 0.3 * torch.sin(2 * torch.pi * 440 / RATE * torch.arange(16 * 1024))
    decoded = codec.decode(codec.encode(tone))
    for end in (slice(0, 640), slice(-640, None)):
        assert abs(level(decoded[end]) - level(tone[end])) < 1.5


def test_mel_preserves_spectrum_and_envelope_of_speech():
    codec, sound = MelCodec(), speech()
    decoded = codec.decode(codec.encode(sound))[: len(sound)]

    def spectrum(x: Tensor) -> Tensor:
        return torch.stft(x, 1024, 256, window=torch.hann_window(1024), return_complex=True).abs()

    convergence = (spectrum(sound) - spectrum(decoded)).norm() / spectrum(sound).norm()
    assert float(convergence) < 0.6  # harmonics above 1 kHz are not resolved by 64 numbers per 64 ms
    a, b = (sound_envelope(x.numpy(), RATE, 100) for x in (sound, decoded))
    assert np.corrcoef(a, b)[0, 1] > 0.95


def test_mel_phases_are_more_consistent_than_griffin_lim():
    """Inversion of true magnitudes, against the offline algorithm at 16 iterations."""
    librosa = pytest.importorskip("librosa")
    codec, sound = MelCodec(MelConfig(iterations=16)), speech()[: 46 * 1024]
    padded = torch.nn.functional.pad(sound[None, None], (384, 384), mode="reflect")[0]
    windows = padded.unfold(-1, 1024, 256) * torch.hann_window(1024)
    wanted = torch.fft.rfft(windows).abs()
    phases = codec.phases()
    parts = [phases.push(block) for block in wanted.split(4, dim=1)]
    ours = torch.cat([*parts, phases.flush()], dim=1)[0]
    offline = librosa.griffinlim(wanted[0].T.numpy(), n_iter=16, hop_length=256, center=False, random_state=0)

    def convergence(x: Tensor) -> float:
        got = torch.fft.rfft(x.unfold(-1, 1024, 256) * torch.hann_window(1024)).abs()
        return float((got - wanted[0, 2 : 2 + len(got)]).norm() / wanted[0, 2 : 2 + len(got)].norm())

    assert convergence(ours[128:]) < 0.12  # frame 2 begins at sample 2 * 256 - 384
    assert convergence(ours[128:]) < convergence(torch.from_numpy(offline)[512:])


def test_mel_speech_is_not_shifted():
    codec = MelCodec()
    for seed in range(3):
        sound = speech(seed=seed)
        decoded = codec.decode(codec.encode(sound))[: len(sound)]
        # Boxes of 40 ms: shorter ones resolve the impulses of the voice, and phases are not preserved.
        a, b = (sound_envelope(x.numpy(), RATE, 50) for x in (sound, decoded))
        assert abs(sync_offset(a, 50, b, 50, max_lag=0.1).offset_sec) < 0.0015


def test_mel_places_clicks_within_two_milliseconds():
    codec = MelCodec()
    click = 0.5 * torch.sin(2 * torch.pi * 1500 / RATE * torch.arange(160)) * torch.hann_window(160)
    for place in range(4000, 8000, 397):
        sound = torch.zeros(RATE)
        sound[place - 80 : place + 80] = click
        energy = codec.decode(codec.encode(sound))[place - 800 : place + 800].square()
        centre = (energy * torch.arange(-800, 800)).sum() / energy.sum()
        assert abs(float(centre)) < 0.002 * RATE


@pytest.mark.parametrize("cuts", [[1], [0, 1, 2, 17], list(range(1, 40))])
def test_mel_streaming_equals_whole(cuts: list[int]):
    codec = MelCodec()
    latents = codec.encode(speech())
    assert torch.equal(decode_in_parts(codec, latents, cuts), codec.decode(latents))
    assert torch.equal(decode_in_turns(codec, latents, cuts), codec.decode(latents))


def test_mel_batch_equals_one_by_one():
    codec = MelCodec()
    latents = torch.stack([codec.encode(speech(seed=seed)) for seed in range(3)])
    torch.testing.assert_close(
        codec.decode_batch(latents), torch.stack([codec.decode(x) for x in latents]), atol=1e-5, rtol=0
    )


def test_mel_past_does_not_depend_on_the_future():
    codec = MelCodec()
    latents = codec.encode(speech())
    changed = latents.clone()
    changed[20:] += 1
    keep = 19 * 1024 - 384  # latent 19 sees latent 20; windows reach back by 384 samples
    assert torch.equal(codec.decode(changed)[:keep], codec.decode(latents)[:keep])


def test_mel_decodes_arbitrary_latents_to_finite_sound():
    codec = MelCodec()
    wild = 30 * torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    sound = codec.decode(wild)
    assert torch.isfinite(sound).all()
    assert float(sound.abs().max()) <= 1
    assert codec.decode(wild[:1]).shape == (1024,)
    assert codec.decode(wild[:0]).shape == (0,)


@pytest.mark.parametrize("wrong", [torch.zeros(0), torch.zeros(2, 100), torch.zeros(100, dtype=torch.int16)])
def test_mel_rejects_other_signals(wrong: Tensor):
    with pytest.raises(ValueError, match="mono float"):
        MelCodec().encode(wrong)


def test_mel_rejects_invalid_settings():
    for wrong in ({"channels": 321}, {"group": 1}, {"hop": 300}, {"mels": 400}):
        with pytest.raises(ValueError):
            MelCodec(MelConfig(**wrong))


# words


def test_words_are_deterministic_and_of_unit_size():
    codec: TextCodec = HashedWordEncoder(width=64)
    vectors = codec.encode(["talking", "wall", "talking"])
    assert vectors.shape == (3, 64)
    assert codec.id == "words-v2/d64"
    assert torch.equal(vectors[0], vectors[2])
    torch.testing.assert_close(vectors.square().mean(1), torch.ones(3))
    # Pinned: latents on disk must mean the same on every machine and in every later version.
    torch.testing.assert_close(vectors[1, :4], torch.tensor(PINNED_WALL), atol=1e-4, rtol=0)
    assert codec.encode([]).shape == (0, 64)


def test_punctuation_does_not_change_a_word():
    """Subtitles contain punctuation, a transcript typed for `mfctl generate` may not."""
    codec = text_codec_from_id("words-v2/d64")
    plain = codec.encode(["hello", "don't", "it", "well-known", "-"])
    written = codec.encode(["Hello,", "don\u2019t", '"it?"', "(well-known)", "-"])
    assert torch.equal(plain, written)
    assert not torch.equal(codec.encode(["well"]), codec.encode(["well-known"]))
    old = text_codec_from_id("words-v1/d64")
    assert old.id == "words-v1/d64"
    assert torch.equal(old.encode(["hello", "ba"]), codec.encode(["hello", "ba"]))
    assert not torch.equal(old.encode(["Hello,"]), old.encode(["hello"])), "datasets of before mean what they meant"


def test_similar_words_have_closer_vectors():
    codec = HashedWordEncoder(width=256)
    syllables = [c + v for c in "bdgmls" for v in "aeio"]
    vectors = codec.encode([*syllables, "talk", "talks", "talked", "window", "green"]) / 16
    cosine = vectors @ vectors.T
    off = cosine - torch.eye(len(vectors))
    assert float(off[:24, :24].max()) < 0.5
    assert cosine[24, 25:27].min() > cosine[24, 27:].abs().max() + 0.05
    assert torch.linalg.matrix_rank(vectors) == len(vectors)


def test_tokenize_unicode():
    text = "A red-haired man's mouth; \u00dcbung 42, \u65e5\u672c snake_case!"
    expected = ["a", "red", "haired", "man's", "mouth", "\u00fcbung", "42", "\u65e5\u672c", "snake", "case"]
    assert HashedWordEncoder().tokenize(text) == expected
    assert HashedWordEncoder().tokenize(" ... ") == []


def test_caption_vectors_contain_the_word_order():
    codec = HashedWordEncoder()
    a, b = codec.encode_caption("red hair, blue wall"), codec.encode_caption("blue hair, red wall")
    torch.testing.assert_close(a[1], b[1])  # the same word in the same place
    cosine = float(a[0] @ b[2] / 64)  # the same word in another
    assert 0.6 < cosine < 0.98
    assert codec.encode_caption("").shape == (0, 64)


def test_words_reject_invalid_input():
    with pytest.raises(ValueError, match="empty word"):
        HashedWordEncoder().encode(["a", ""])
    with pytest.raises(ValueError, match="version=3"):
        HashedWordEncoder(version=3)
    with pytest.raises(ValueError, match="width"):
        HashedWordEncoder(width=4)


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_softened_whitening_keeps_the_mean_square_and_the_order_of_channels(power):
    spreads, heads = (4.0, 1.0, 0.25), (3.0, 1.0, 0.5)
    full = LatentStats(mean=(1.0, 0.0, -1.0), std=spreads, head_mean=(0.0,) * 3, head_std=heads)
    soft = full.soften(power)
    x = torch.tensor(full.mean) + torch.tensor(spreads) * torch.randn(20000, 3, generator=torch.manual_seed(0))
    white = soft.whiten(x)
    assert float(white.square().mean()) == pytest.approx(1, rel=0.02)
    ratio = white.std(0)[0] / white.std(0)[1]
    assert float(ratio) == pytest.approx(4 ** (1 - power), rel=0.03)
    torch.testing.assert_close(soft.restore(white), x)
    assert soft.std[0] / soft.head_std[0] == pytest.approx((4 / 3) ** power)  # the first frame: the same scale
    assert soft.mean == full.mean
    with pytest.raises(ValueError, match="whitening power"):
        full.soften(1.5)


def test_a_static_video_has_one_value_in_the_static_channels():
    codec = DctCodec()
    picture = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    latents = codec.encode(picture.repeat(5, 1, 1, 1))
    n = codec.static_channels
    torch.testing.assert_close(latents[0, :n], latents[1, :n], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(latents[0, n], latents[1, n], atol=1e-2)
    assert MelCodec().static_channels == 0
