"""Pretrained codecs, from tiny random weights saved by the real classes: the same numbers, the same clock, no seams."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from mfcore.codecs import pretrained
from mfcore.codecs.factory import codec_from_id, text_codec_from_id
from mfcore.codecs.oobleck import OobleckCodec, OobleckConfig, oobleck_config_from_folder, receptive_field
from mfcore.codecs.t5 import T5TextEncoder, t5_config_from_folder
from mfcore.codecs.wan import WanCodec, WanConfig, wan_config_from_folder
from mfcore.timeline import Timeline
from mfcore.types import AUDIO, VIDEO
from tests.helpers.tiny_pretrained import save_oobleck, save_t5, save_wan


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv(pretrained.CODECS_ENV, raising=False)
        yield


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def wan(request, tmp_path_factory) -> WanCodec:
    return WanCodec(wan_config_from_folder(str(save_wan(tmp_path_factory.mktemp("wan"), request.param))), "cpu")


@pytest.fixture(scope="module")
def oobleck(tmp_path_factory) -> OobleckCodec:
    return OobleckCodec(oobleck_config_from_folder(str(save_oobleck(tmp_path_factory.mktemp("oobleck")))), "cpu")


@pytest.fixture(scope="module", params=["umt5", "t5"])
def text(request, tmp_path_factory) -> T5TextEncoder:
    return T5TextEncoder(t5_config_from_folder(str(save_t5(tmp_path_factory.mktemp("text"), request.param))), "cpu")


def frames(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 32, 48, 3), dtype=torch.uint8, generator=draw)


def noise(latents: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(latents, 8, generator=torch.Generator().manual_seed(seed))


def decode_in_parts(codec, latents, *cuts: int) -> torch.Tensor:
    decoder = codec.decoder()
    parts = [decoder.push(part) for part in latents.tensor_split(cuts)]
    return torch.cat([part for part in [*parts, decoder.flush()] if len(part)])


def decode_in_turns(codec, latents, *cuts: int) -> torch.Tensor:
    """Decode each part with a new decoder that continues after the state of the one before."""
    decoder, parts = codec.decoder(), []
    for part in latents.tensor_split(cuts):
        state = {name: value.clone() for name, value in decoder.state().items()}
        decoder = codec.decoder()
        decoder.load_state(state)
        parts.append(decoder.push(part))
    return torch.cat([part for part in [*parts, decoder.flush()] if len(part)])


def test_wan_equals_the_diffusers_class(wan):
    signal = frames(9)
    latents = wan.encode(signal)
    channels, block = (16, 8) if wan.channels == 16 else (48, 16)
    assert latents.shape == (3, channels, 32 // block, 48 // block)
    assert latents.dtype == torch.float32
    pixels = signal.permute(3, 0, 1, 2)[None] / 127.5 - 1
    reference = wan.model.encode(pixels).latent_dist.mode()
    assert torch.equal(latents.transpose(0, 1), reference[0])
    decoded = wan.model.decode(reference).sample[0].permute(1, 2, 3, 0)
    difference = wan.decode(latents).float() - (decoded + 1) * 127.5
    assert difference.abs().max() < 0.501  # rounding to integers only


def test_wan_encodes_in_float32_where_frames_are_decoded_in_bfloat16(wan, monkeypatch):
    """Latents are computed once and stored: what the encoder rounds stays in the dataset."""
    latents = wan.encode(frames(9))
    monkeypatch.setattr("mfcore.codecs.wan.compute_dtype", lambda device: torch.bfloat16)  # as on a GPU
    codec = WanCodec(wan.config, "cpu")
    assert torch.equal(codec.encode(frames(9)), latents)
    difference = codec.decode(latents).float() - wan.decode(latents).float()
    assert difference.abs().mean() < 1


def test_wan_streaming_equals_whole(wan):
    latents = wan.encode(frames(17))
    whole = wan.decode(latents)
    assert len(whole) == 17
    for cuts in ((1,), (1, 2, 3, 4), (0, 3)):
        assert torch.equal(decode_in_parts(wan, latents, *cuts), whole)
    assert torch.equal(decode_in_turns(wan, latents, 1, 2, 3), whole)


def test_wan_is_causal_and_drops_incomplete_groups(wan):
    signal = frames(13)
    latents = wan.encode(signal)
    assert torch.equal(wan.encode(signal[:5]), latents[:2])
    assert torch.equal(wan.encode(signal[:12]), wan.encode(signal[:9]))
    assert len(wan.encode(signal[:1])) == 1


def test_wan_batch_equals_one_by_one(wan):
    signals = torch.stack([frames(5, seed) for seed in range(3)])
    for together, signal in zip(wan.encode_batch(signals), signals, strict=True):
        assert torch.allclose(together, wan.encode(signal), atol=1e-5)


def test_wan_clock_statistics_and_static_channels(wan):
    clock = wan.clock
    assert (clock.rate, clock.offset, clock.head) == (6, Fraction(1, 24), 1)
    assert wan.static_channels == wan.channels
    stats = wan.published_stats
    assert (stats.mean, stats.std) == (stats.head_mean, stats.head_std)
    if wan.channels == 16:
        assert wan.published_stats.mean[:2] == (-0.7571, -0.7089)
        assert wan.published_stats.std[-1] == 1.916
    else:
        assert wan.published_stats.std[10] == pytest.approx(1.2)


@pytest.mark.parametrize("shape", [(5, 30, 48, 3), (0, 32, 48, 3), (5, 32, 48)])
def test_wan_rejects_other_shapes(wan, shape):
    with pytest.raises(ValueError, match=r"multiples of|video must be"):
        wan.encode(torch.zeros(shape, dtype=torch.uint8))


def test_oobleck_equals_the_diffusers_class(oobleck):
    sound = torch.rand(5 * 2048, generator=torch.Generator().manual_seed(1)) - 0.5
    latents = oobleck.encode(sound)
    reference = oobleck.model.encode(sound.expand(1, 2, -1)).latent_dist.mode()
    assert torch.allclose(latents.T, reference[0], atol=1e-6)
    decoded = oobleck.model.decode(reference).sample[0].mean(0).clamp(-1, 1)
    assert torch.allclose(oobleck.decode(latents), decoded, atol=1e-5)
    assert len(oobleck.encode(sound[:-1])) == 5
    assert len(oobleck.encode(sound[:1])) == 1


def test_receptive_field_of_oobleck_is_exact(oobleck):
    """A changed latent changes samples from ``after`` latents before it to ``before`` latents after it."""
    before, after = receptive_field((8, 8, 4, 4, 2))
    assert (before, after) == (10, 10)
    latents = noise(2 * (before + after))
    changed = latents.clone()
    middle = before + after
    changed[middle] += 100  # the outermost taps are small: raise them above rounding
    moved = (oobleck.decode(latents) - oobleck.decode(changed)).abs().reshape(-1, 2048).amax(1).nonzero().flatten()
    assert (int(moved[0]), int(moved[-1])) == (middle - after, middle + before)


@pytest.mark.parametrize("cuts", [(1, 2, 3), (11, 22, 33, 44), (7, 40), (0, 0, 59)])
def test_oobleck_streaming_equals_whole(oobleck, cuts):
    latents = noise(60)
    whole = oobleck.model.decode(latents.T[None]).sample[0].mean(0).clamp(-1, 1)
    assert torch.allclose(decode_in_parts(oobleck, latents, *cuts), whole, atol=2e-6)
    assert torch.allclose(decode_in_turns(oobleck, latents, *cuts), whole, atol=2e-6)


def test_oobleck_returns_sound_as_soon_as_it_is_final(oobleck):
    decoder, (_, after) = oobleck.decoder(), receptive_field((8, 8, 4, 4, 2))
    given = [len(decoder.push(part)) // 2048 for part in noise(33).split(11)]
    assert given == [11 - after, 11, 11]
    assert len(decoder.flush()) == after * 2048


def test_wan_and_oobleck_share_a_timeline(wan, oobleck):
    line = Timeline(clocks={VIDEO: wan.clock, AUDIO: oobleck.clock}, chunk_seconds=Fraction(1, 2))
    assert oobleck.clock.rate == Fraction(44100, 2048)
    assert [line.count(AUDIO, 1, k) for k in range(5)] == [11, 11, 11, 11, 10]
    seconds = Fraction(1)
    latents = {
        VIDEO: len(wan.encode(frames(1 + int(24 * seconds))[:, :16, :16])) - 1,
        AUDIO: len(oobleck.encode(torch.zeros(int(44100 * seconds)))),
    }
    assert line.whole_chunks(latents) == 2
    assert line.times(VIDEO, 2)[:2].tolist() == [1 / 24, 5 / 24]
    assert line.times(AUDIO, 2)[1].item() == 2048 / 44100


def test_word_vectors_do_not_depend_on_position(text):
    vectors = text.encode(["ba", "do", "ba", "bado"])
    assert vectors.shape == (4, 16)
    assert torch.equal(vectors[0], vectors[2])
    assert torch.allclose(text.encode(["do"])[0], vectors[1], atol=1e-5)  # other words only add padding
    assert not torch.allclose(vectors[0], vectors[3], atol=1e-2)
    assert text.encode([]).shape == (0, 16)
    with pytest.raises(ValueError, match="empty word"):
        text.encode(["a", " "])


def test_captions_equal_the_states_of_the_encoder(text):
    caption = text.encode_caption("a red hat and a red wall")
    ids = text.tokenizer(["a red hat and a red wall"], return_tensors="pt").input_ids
    assert torch.equal(caption, text.model(input_ids=ids).last_hidden_state[0])
    assert len(caption) == len(text.tokenize("a red hat and a red wall")) + 1
    assert text.encode_caption("  ").shape == (0, 16)
    assert len(text.encode_caption("ab " * 2000)) == 512


def test_a_codec_from_an_id_finds_its_weights(*, wan, oobleck, text, tmp_path, monkeypatch):
    """In the stored folder or in MFCTL_CODECS, and never other weights."""
    for codec in (wan, oobleck):
        again = codec_from_id(codec.id, codec.clock, codec.config.folder, "cpu")
        assert (again.id, again.clock, again.channels, again.static_channels) == (
            codec.id, codec.clock, codec.channels, codec.static_channels,
        )  # fmt: skip
        signal = frames(5) if codec is wan else torch.rand(5000)
        assert torch.equal(again.encode(signal), codec.encode(signal))
    assert torch.equal(text_codec_from_id(text.id, text.config.folder, "cpu").encode(["ba"]), text.encode(["ba"]))
    lost = codec_from_id(oobleck.id, oobleck.clock, str(tmp_path), "cpu")
    assert lost.channels == 8  # known without weights
    with pytest.raises(ValueError, match=r"weights of codec oobleck-v1.*MFCTL_CODECS"):
        lost.encode(torch.zeros(10))
    save_oobleck(tmp_path / "other", seed=1)
    monkeypatch.setenv(pretrained.CODECS_ENV, str(tmp_path))
    with pytest.raises(ValueError, match="MFCTL_CODECS"):
        lost.encode(torch.zeros(10))
    (tmp_path / "right").symlink_to(oobleck.config.folder)
    assert len(lost.encode(torch.zeros(10))) == 1


def test_folders_of_other_models_are_rejected(wan, oobleck, text, tmp_path):
    for read, folder in (
        (wan_config_from_folder, oobleck.config.folder),
        (oobleck_config_from_folder, wan.config.folder),
        (t5_config_from_folder, str(tmp_path)),
    ):
        with pytest.raises(ValueError, match="contains no"):
            read(folder)
    (tmp_path / "vae").mkdir()
    config = Path(wan.config.folder, "config.json").read_text()
    (tmp_path / "vae" / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        wan_config_from_folder(str(tmp_path))
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="JSON"):
        wan_config_from_folder(str(tmp_path))


def test_invalid_or_unknown_ids_are_rejected(wan):
    for wrong in ({"fps": Fraction(0)}, {"group": 8}):
        with pytest.raises(ValueError, match="Wan needs"):
            WanConfig(**{"channels": 16, "block": 8, "weights": "0", **wrong})
    for unknown in ("wan-v1", "wan-v9/c1/b1/g4/00", "vocos-v1/c3"):
        with pytest.raises(ValueError, match="unknown codec"):
            codec_from_id(unknown, wan.clock)
    with pytest.raises(ValueError, match="unknown text codec"):
        text_codec_from_id("clip-v1/d8")
    assert OobleckConfig(channels=64, sample_rate=44100, hop=2048, weights="0").folder == ""
