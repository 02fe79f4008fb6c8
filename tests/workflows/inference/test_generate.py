"""Test generation: streaming into an mp4 file, and the errors of invalid input."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mfcore.model.cuda_graphs import CUDAGraphModel
from mfcore.types import AUDIO, VIDEO
from preprocessing.dataset.reader import open_dataset
from preprocessing.media.live_muxer import GENERATED
from preprocessing.media.mp4_writer import write_mp4
from preprocessing.media.probe import probe
from tests.helpers.op_recorder import record_operators
from tests.helpers.random_exports import random_export
from workflows.config.presets import build_preset
from workflows.inference.decoding import decode_stream
from workflows.inference.generate import ClipPrompt, RuntimeOptions, generate_clip
from workflows.inference.inputs import estimate_word_times, read_transcript
from workflows.inference.pipeline import StreamingPipeline
from workflows.inference.sampling import SamplingParams, resolve_sampling_params
from workflows.training.resolve import latent_shapes_of, make_export_metadata

WORDS = '[{"word": "ba", "start": 0.1, "end": 0.4}, {"word": "do", "start": 0.5, "end": 0.7}]'


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {stage: random_export(folder / stage, stage) for stage in ("video", "audio", "mutual")}


@pytest.fixture
def image(tmp_path) -> str:
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "first.png")
    return str(tmp_path / "first.png")


@pytest.fixture
def voice(tmp_path) -> str:
    sound = 0.3 * np.sin(np.arange(32000) * 0.05).astype(np.float32)
    write_mp4(tmp_path / "voice.mp4", None, None, sound, sample_rate=16000)
    return str(tmp_path / "voice.mp4")


def one_condition(pipeline: StreamingPipeline):
    frame = torch.randint(0, 255, (*pipeline.frame_size, 3), dtype=torch.uint8)
    words, _ = read_transcript(WORDS)
    return pipeline.encode_conditions(caption="a green face", transcript=words, first_frame=frame)


def decode_whole(pipeline: StreamingPipeline, cond, chunks) -> dict[str, torch.Tensor]:
    """Decode all latents of row 0 at once."""
    signals = {}
    for m, codec in pipeline.codecs.items():
        latents = pipeline.denormalize(m, torch.cat([chunk[m].latents[0] for chunk in chunks]))
        first = [pipeline.first_frame_latent(cond, 0)] if m == VIDEO else []
        signals[m] = codec.decode(torch.cat([*first, latents]))
    return signals


def test_streamed_signals_equal_whole_decoding(exports):
    """Decoding chunk by chunk equals decoding all latents at once, and so does generating."""
    pipeline = StreamingPipeline.from_checkpoint(exports["mutual"])
    cond, params = one_condition(pipeline), SamplingParams(steps=2)
    parts = list(decode_stream(pipeline, cond, 4, params))
    chunks = list(pipeline.generate_chunks(cond, 4, params, samples=torch.zeros(1, dtype=torch.long)))
    whole = decode_whole(pipeline, cond, chunks)
    assert torch.equal(torch.cat([p.signals[VIDEO] for p in parts]), whole[VIDEO])
    torch.testing.assert_close(torch.cat([p.signals[AUDIO] for p in parts]), whole[AUDIO], atol=1e-5, rtol=0)
    assert len(whole[VIDEO]) == 1 + 4 * 12


@pytest.mark.parametrize("sampler", ["deterministic", "renoise", "mixed"])
def test_row_does_not_depend_on_other_rows(exports, sampler):
    pipeline = StreamingPipeline.from_checkpoint(exports["mutual"])
    cond = one_condition(pipeline)
    pair = type(cond)(**{k: torch.cat([v, v]) for k, v in vars(cond).items()})
    params = SamplingParams(steps=2, sampler=sampler)
    alone = list(pipeline.generate_chunks(cond, 2, params, samples=torch.tensor([7])))
    both = list(pipeline.generate_chunks(pair, 2, params, samples=torch.tensor([3, 7])))
    for a, b in zip(alone, both, strict=True):
        torch.testing.assert_close(a[VIDEO].latents[0], b[VIDEO].latents[1], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(b[VIDEO].latents[0], b[VIDEO].latents[1])


def test_non_finite_values_are_reported_with_block_and_chunk(exports):
    pipeline = StreamingPipeline.from_checkpoint(exports["mutual"])
    cond, params = one_condition(pipeline), SamplingParams(steps=2)
    made = pipeline.generate_chunks(cond, 4, params)
    next(made), next(made)
    broken = pipeline.model.branch(AUDIO).block(1).mlp[2].bias
    broken[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not finite after block 1: audio chunk 2 \(\d+ of \d+ tokens\)"):
        next(made)
    assert pipeline.model.guard is None
    broken[0] = 0.0
    pipeline.model.branch(VIDEO).head.bias[0] = torch.inf
    with pytest.raises(FloatingPointError, match="chunk 0 is not finite, .* head"):
        next(pipeline.generate_chunks(cond, 4, SamplingParams(steps=1)))


def test_cuda_graphs_stream_the_same_clip_and_report_the_same_errors(exports, monkeypatch):
    """Record passes as on a GPU and replay them operator by operator."""
    pipeline = StreamingPipeline.from_checkpoint(exports["mutual"])
    cond, params = one_condition(pipeline), SamplingParams(steps=2)
    plain = list(pipeline.generate_chunks(cond, 8, params))
    with pytest.raises(ValueError, match="--graphs records CUDA graphs"):
        pipeline.enable_optimizations(compile=False, graphs=True)
    monkeypatch.setattr("workflows.inference.latents.check_inference_optimizations", lambda *_, **__: None)
    monkeypatch.setattr(
        "workflows.inference.latents.apply_inference_optimizations",
        lambda net, **_: CUDAGraphModel(net, record_operators),
    )
    pipeline.enable_optimizations(compile=False, graphs=True)
    for a, b in zip(plain, pipeline.generate_chunks(cond, 8, params), strict=True):
        torch.testing.assert_close(b[VIDEO].latents, a[VIDEO].latents, atol=1e-5, rtol=1e-5)
    made = pipeline.generate_chunks(cond, 8, params)
    next(made)
    pipeline.model.branch(AUDIO).block(0).mlp[2].bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite after block 0: audio chunk 1"):
        list(made)


def test_mp4_has_video_and_audio(exports, image, voice, tmp_path):
    out = tmp_path / "out.mp4"
    facts = generate_clip(
        str(exports["mutual"]),
        ClipPrompt(first_frame=image, transcript=WORDS, voice=voice, seconds=1.7),
        out=str(out),
        steps=1,
    )
    info = probe(out)
    assert (info.video.width, info.video.height, info.video.fps) == (32, 32, 24.0)
    assert info.audio is not None
    assert facts["frames"] == 49  # 1.7 s take four chunks, and the first frame
    assert facts["seconds"] == pytest.approx(49 / 24)
    assert info.duration == pytest.approx(49 / 24, abs=0.03)
    assert facts["mode"] == "few"
    assert facts["first_chunk_s"] > 0


def test_the_file_can_be_played_while_it_is_made(exports, image, tmp_path, monkeypatch):
    out, readable = tmp_path / "out.mp4", []

    def watched(*args):
        for chunk in decode_stream(*args):
            yield chunk
            with av.open(str(out)) as container:
                readable.append(sum(1 for _ in container.decode(video=0)))

    monkeypatch.setattr("workflows.inference.decoding.decode_stream", watched)
    prompt = ClipPrompt(first_frame=image, seconds=2)
    generate_clip(str(exports["mutual"]), prompt, out=str(out), steps=1)
    assert all(12 * k - 4 < frames <= 12 * k for k, frames in enumerate(readable[:4], 1)), readable
    with av.open(str(out)) as container:
        assert container.metadata["comment"] == GENERATED
        assert [s.codec_context.name for s in container.streams] == ["h264", "aac"]
        assert sum(1 for _ in container.decode(video=0)) == 49


def test_a_failed_clip_leaves_no_file_and_keeps_an_older_one(exports, image, tmp_path, monkeypatch):
    def failing(*args):
        yield next(iter(decode_stream(*args)))
        raise RuntimeError("broken")

    monkeypatch.setattr("workflows.inference.decoding.decode_stream", failing)
    (tmp_path / "old.mp4").write_text("precious")
    for name in ("new.mp4", "old.mp4"):
        with pytest.raises(RuntimeError, match="broken"):
            generate_clip(
                str(exports["mutual"]),
                ClipPrompt(first_frame=image, seconds=1),
                out=str(tmp_path / name),
                steps=1,
                overwrite=True,
            )
    assert (tmp_path / "old.mp4").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"old.mp4", "first.png"}


def test_bfloat16_clip_is_close_to_float32(exports, image, tmp_path):
    facts = {}
    for precision in (None, "fp32", "bf16"):
        out = tmp_path / f"{precision}.mp4"
        prompt, runtime = (
            ClipPrompt(first_frame=image, transcript=WORDS, seconds=1.0),
            RuntimeOptions(precision=precision),
        )
        facts[precision] = generate_clip(str(exports["mutual"]), prompt, out=str(out), runtime=runtime, steps=2)
    on_gpu = torch.cuda.is_available()
    assert [f["precision"] for f in facts.values()] == ["bf16" if on_gpu else "fp32", "fp32", "bf16"]
    files = {name: (tmp_path / f"{name}.mp4").read_bytes() for name in facts}
    assert files[None] == files["bf16" if on_gpu else "fp32"]
    assert files["fp32"] != files["bf16"]
    plain, narrow = (
        StreamingPipeline.from_checkpoint(exports["mutual"], precision=precision) for precision in ("fp32", "bf16")
    )
    cond, params = one_condition(plain), SamplingParams(steps=2)
    for a, b in zip(plain.generate_chunks(cond, 6, params), narrow.generate_chunks(cond, 6, params), strict=True):
        for m in a:
            gap = (b[m].latents - a[m].latents).abs().mean() / a[m].latents.abs().mean()
            assert b[m].latents.dtype == torch.float32 and 0 < gap < 0.1


def test_bfloat16_is_limited_to_the_network(exports):
    """Check weights and matrix products; norms, output and the code of the caller stay in float32."""
    pipeline = StreamingPipeline.from_checkpoint(exports["mutual"], precision="bf16")
    block = pipeline.model.branch(VIDEO).block(0)
    assert {block.qkv.weight.dtype, block.mlp[0].weight.dtype} == {torch.bfloat16}
    assert {block.norm_q.weight.dtype, pipeline.model.branch(VIDEO).head.weight.dtype} == {torch.float32}
    seen = []
    block.qkv.register_forward_hook(lambda _, given, made: seen.append(made.dtype))
    for _ in pipeline.generate_chunks(one_condition(pipeline), 2, SamplingParams(steps=1)):
        assert not torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert set(seen) == {torch.bfloat16}


def test_files_are_equal_only_for_equal_seeds(exports, image, tmp_path):
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.mp4"
        generate_clip(
            str(exports["video"]), ClipPrompt(first_frame=image, seconds=0.5), out=str(out), steps=1, seed=seed
        )
        files.append(out.read_bytes())
    assert files[0] == files[1] != files[2]


def test_unimodal_checkpoints_generate_one_modality(exports, image, tmp_path):
    generate_clip(
        str(exports["video"]), ClipPrompt(first_frame=image, seconds=0.5), out=str(tmp_path / "v.mp4"), steps=1
    )
    generate_clip(
        str(exports["audio"]), ClipPrompt(transcript="ba do", seconds=0.5), out=str(tmp_path / "a.mp4"), steps=1
    )
    picture, sound = probe(tmp_path / "v.mp4"), probe(tmp_path / "a.mp4")
    assert picture.video is not None
    assert picture.audio is None
    assert sound.video is None
    assert sound.audio is not None


def test_only_the_mutual_stage_defaults_to_few_steps(exports, image, tmp_path):
    facts = generate_clip(str(exports["audio"]), ClipPrompt(seconds=0.5), out=str(tmp_path / "a.mp4"), steps=2)
    assert (facts["mode"], facts["nfe"]) == ("multi", 4)  # guidance doubles


def test_plain_text_gets_estimated_times(exports, tmp_path):
    facts = generate_clip(
        str(exports["audio"]), ClipPrompt(transcript="Hello there", seconds=0.5), out=str(tmp_path / "a.mp4"), steps=1
    )
    assert "estimated" in facts["word_times"]
    hello, there = estimate_word_times(["Hello", "there"])
    assert (hello.word, there.word) == ("Hello", "there"), "words are not normalized, as in a dataset"
    assert hello.end - hello.start == pytest.approx(2 / 4.5, abs=1e-3)  # two syllables
    assert there.start == pytest.approx(hello.end + 0.1, abs=1e-3)


def test_any_text_is_accepted_as_transcript(tmp_path):
    words, estimated = read_transcript("[laughs] Yes - no.")
    assert ([w.word for w in words], estimated) == (["[laughs]", "Yes", "no."], True)
    words, _ = read_transcript("see notes.txt")
    assert [w.word for w in words] == ["see", "notes.txt"]


def test_subtitles_keep_their_times(tmp_path):
    path = tmp_path / "words.srt"
    path.write_text("1\n00:00:01,000 --> 00:00:02,000\nHello, you\n")
    words, estimated = read_transcript(str(path))
    assert [(w.word, w.start) for w in words] == [("Hello,", 1.0), ("you", pytest.approx(1.667, abs=1e-3))]
    assert not estimated


def test_words_after_the_end_give_a_warning(exports, tmp_path, capsys):
    audio = str(exports["audio"])
    generate_clip(audio, ClipPrompt(transcript="ba do ge la so mu", seconds=0.5), out=str(tmp_path / "a.mp4"), steps=1)
    assert "4 of 6 words begin after the end of the clip, at 0.5 s: ge la so mu" in capsys.readouterr().err


def test_transcript_file_keeps_its_times(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"transcript": json.loads(WORDS)}))
    words, estimated = read_transcript(str(path))
    assert not estimated
    assert [(w.word, w.start) for w in words] == [("ba", 0.1), ("do", 0.5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_frame": None}, "--first-frame"),
        ({"first_frame": "nowhere.png"}, "--first-frame nowhere.png"),
        ({"transcript": "nowhere.json"}, "--transcript nowhere.json"),
        ({"transcript": '[{"wort": "x"}]'}, "transcript"),
        ({"transcript": '{"words": []}'}, "under `transcript`"),
        ({"transcript": '[{"word": "x", '}, "not valid JSON"),
        ({"transcript": '[{"word": "x", "start": 2, "end": 1}]'}, "2 s to 1 s"),
        ({"transcript": "nowhere.srt"}, "--transcript nowhere.srt"),
        ({"seconds": float("inf")}, "--seconds inf"),
        ({"seconds": float("nan")}, "--seconds nan"),
        ({"voice": "nowhere.wav"}, "--voice nowhere.wav"),
        ({"seconds": 0.0}, "--seconds 0"),
        ({"mode": "some"}, "few or multi"),
    ],
)
def test_invalid_input_is_rejected_before_anything_is_written(exports, image, tmp_path, *, change, message):
    out = tmp_path / "new" / "out.mp4"
    mode = change.get("mode")
    prompt = replace(ClipPrompt(first_frame=image, seconds=0.5), **{k: v for k, v in change.items() if k != "mode"})
    with pytest.raises(ValueError, match=message):
        generate_clip(str(exports["mutual"]), prompt, out=str(out), steps=1, mode=mode)
    assert not out.parent.exists()


def test_existing_file_is_not_overwritten(exports, image, tmp_path):
    out = tmp_path / "mine.mp4"
    out.write_text("precious")
    with pytest.raises(ValueError, match="--overwrite"):
        generate_clip(str(exports["video"]), ClipPrompt(first_frame=image, seconds=0.5), out=str(out), steps=1)
    assert out.read_text() == "precious"


def test_text_file_is_rejected_as_first_frame(exports, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(ValueError, match="neither an image nor a video"):
        generate_clip(
            str(exports["video"]), ClipPrompt(first_frame=str(tmp_path / "notes.png")), out=str(tmp_path / "o.mp4")
        )


def test_text_becomes_phonemes_for_a_network_that_was_trained_on_them():
    words, estimated = read_transcript("Hi, you.", "phonemes")
    assert estimated
    assert [w.word for w in words] == ["/hh/Hi", "/ay/", "/y/you", "/uw/"]
    timed, estimated = read_transcript('[{"word": "you", "start": 1, "end": 1.5}]', "phonemes")
    assert not estimated
    assert (timed[0].word, timed[0].start, timed[-1].end) == ("/y/you", 1.0, 1.5)


@pytest.mark.parametrize("steps", [0, -1])
def test_step_count_must_be_positive(steps):
    with pytest.raises(ValueError, match=f"steps={steps}: "):
        resolve_sampling_params("mutual", mode=None, steps=steps, guidance=None, trust=None, seed=0)


def test_the_few_step_mode_renoises_by_default_and_other_modes_cannot():
    defaults = {"steps": None, "guidance": None, "trust": None, "seed": 0}
    assert resolve_sampling_params("mutual", mode=None, **defaults).sampler == "renoise"
    assert resolve_sampling_params("mutual", mode="few", **defaults, sampler="mixed").sampler == "mixed"
    assert resolve_sampling_params("joint", mode=None, **defaults).sampler == "deterministic"
    with pytest.raises(ValueError, match=r"sampler renoise: needs the few-step mode\. Use deterministic\."):
        resolve_sampling_params("joint", mode=None, **defaults, sampler="renoise")
    with pytest.raises(ValueError, match=r"sampler 'euler': unknown\. Use deterministic, renoise, mixed\."):
        SamplingParams(sampler="euler")


def test_samplers_differ_after_the_first_step(exports):
    pipeline = StreamingPipeline.from_checkpoint(exports["mutual"])
    cond = one_condition(pipeline)

    def first_chunk(steps: int, sampler: str) -> torch.Tensor:
        params = SamplingParams(steps=steps, sampler=sampler)
        return next(iter(pipeline.generate_chunks(cond, 1, params)))[AUDIO].latents

    assert torch.equal(first_chunk(1, "renoise"), first_chunk(1, "deterministic"))
    made = [first_chunk(4, sampler) for sampler in ("deterministic", "renoise", "mixed")]
    assert all(not torch.allclose(a, b) for i, a in enumerate(made) for b in made[:i])
    assert torch.equal(first_chunk(4, "renoise"), made[1])


def test_untrained_step_counts_give_a_warning(exports, image, tmp_path, capsys):
    model = exports["mutual"] / "model.json"
    place = tmp_path / "export"
    shutil.copytree(exports["mutual"], place)
    card = json.loads(model.read_text())
    assert card["few_steps"] is None  # unknown: no warning
    for known, steps, mode, warned in ((None, 3, "few", 0), (2, 2, "few", 0), (2, 3, "multi", 0), (2, 3, "few", 1)):
        (place / "model.json").write_text(json.dumps(card | {"few_steps": known}))
        out = tmp_path / f"{known}-{steps}-{mode}.mp4"
        generate_clip(str(place), ClipPrompt(first_frame=image, seconds=0.5), out=str(out), steps=steps, mode=mode)
        assert capsys.readouterr().err.count("steps degrade quality") == warned
        assert out.stat().st_size > 0


def test_mutual_export_contains_its_largest_step_count(toy_data):
    dataset = open_dataset(toy_data)
    config = build_preset("tiny", "mutual", latent_shapes_of(dataset))
    assert make_export_metadata(config, dataset.meta, {}).few_steps == 2**config.objective.finest
    alone = replace(config, objective=replace(config.objective, shortcut_weight=0.0, rollout_steps=(2, 4)))
    assert make_export_metadata(alone, dataset.meta, {}).few_steps == 4
    assert (
        make_export_metadata(build_preset("tiny", "joint", latent_shapes_of(dataset)), dataset.meta, {}).few_steps
        is None
    )
