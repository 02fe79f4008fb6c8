"""Stream chunks from a checkpoint into an mp4 file (``mfctl generate``)."""

import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mfcore.errors import check_range
from mfcore.solver import Mode, SamplerName
from mfcore.types import AUDIO, VIDEO, Condition, Stream
from preprocessing.io.durable_files import atomic_path, flush_file, flush_folder
from preprocessing.media.live_muxer import LiveMuxer
from preprocessing.records import Frames, Waveform, Word
from workflows.checkpoints.load import WeightKind
from workflows.inference.pipeline import StreamingPipeline
from workflows.inference.precision import Precision
from workflows.inference.prompt import MAX_SECONDS, ClipPrompt, encode_prompt
from workflows.inference.sampling import MAX_GUIDANCE, MAX_STEPS, SamplingParams, resolve_sampling_params
from workflows.utils.output_file import check_output_file

CLIP_CRF = 16  # quality of H.264; lower is better


@dataclass(frozen=True, kw_only=True)
class DecodedChunk:
    """Signals that became final with one chunk."""

    signals: dict[str, Tensor]
    seconds: float  # time of sampling and decoding

    @property
    def video(self) -> Frames | None:
        """Frames uint8 (n, H, W, 3); None without video."""
        return self.signals[VIDEO].numpy() if VIDEO in self.signals else None

    @property
    def audio(self) -> Waveform | None:
        """Mono samples float32 (n,); None without audio."""
        return self.signals[AUDIO].numpy() if AUDIO in self.signals else None


@dataclass(frozen=True, kw_only=True)
class ClipFormat:
    """Rates and size of the signals of a clip; None for a missing modality."""

    fps: Fraction | None
    size: tuple[int, int] | None  # height and width in pixels
    sample_rate: int | None  # Hz

    @classmethod
    def of(cls, pipeline: StreamingPipeline) -> "ClipFormat":
        """Return the format of the clips of a pipeline."""
        has_video, has_audio = VIDEO in pipeline.codecs, AUDIO in pipeline.codecs
        return cls(
            fps=pipeline.fps if has_video else None,
            size=pipeline.frame_size if has_video else None,
            sample_rate=pipeline.sample_rate if has_audio else None,
        )


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """Weights of a checkpoint and the way they are executed."""

    weights: WeightKind = "ema"
    precision: Precision | None = None  # None: bf16 on a GPU, fp32 on a CPU
    compile: bool = False
    graphs: bool = False


def generate_clip(
    checkpoint: str,
    prompt: ClipPrompt,
    *,
    out: str,
    runtime: RuntimeOptions | None = None,
    steps: int | None = None,
    mode: Mode | None = None,
    sampler: SamplerName | None = None,
    guidance: float | None = None,
    trust: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the clip to ``out`` and return facts about it.

    Raises ValueError for wrong input, before anything is written. The defaults of the sampling parameters depend on
    the stage, see ``resolve_sampling_params``.
    """
    runtime = runtime or RuntimeOptions()
    target = Path(out)
    check_output_file(target, suffix=".mp4", overwrite=overwrite)
    check_range("--seconds", prompt.seconds, 0, MAX_SECONDS, above=True)
    check_range("--steps", steps, 1, MAX_STEPS)
    check_range("--guidance", guidance, 0, MAX_GUIDANCE)
    check_range("--trust", trust, 0, 1)
    pipeline = StreamingPipeline.from_pretrained(
        checkpoint,
        weights=runtime.weights,
        precision=runtime.precision,
        compile=runtime.compile,
        graphs=runtime.graphs,
    )
    params = resolve_sampling_params(
        pipeline.metadata.stage, mode=mode, steps=steps, guidance=guidance, trust=trust, seed=seed, sampler=sampler
    )
    encoded = encode_prompt(pipeline, **vars(prompt), seed=seed)
    _print_warnings(pipeline, encoded.words, encoded.seconds, params)
    target.parent.mkdir(parents=True, exist_ok=True)
    facts = stream_to_mp4(pipeline, encoded.cond, target, chunks=encoded.chunks, params=params)
    sampling = {
        "mode": params.mode,
        "steps": params.steps,
        "sampler": params.sampler,
        "nfe": params.num_function_evaluations,
        "precision": pipeline.precision,
    }
    spoken = {"word_times": "estimated from the speaking rate", "transcript": [vars(w) for w in encoded.words]}
    return {"path": str(target), **facts, **sampling} | (spoken if encoded.estimated else {})


def _print_warnings(pipeline: StreamingPipeline, words: Sequence[Word], seconds: float, params: SamplingParams) -> None:
    """Print warnings for words after the end of the clip and for an untrained number of steps."""
    if late_words := [word.word for word in words if word.start >= seconds]:
        count = f"{len(late_words)} of {len(words)} words"
        message = f"{count} begin after the end of the clip, at {seconds:g} s: {' '.join(late_words)}"
        print(f"warning: {message:.300}. Increase --seconds.", file=sys.stderr, flush=True)
    if warning := pipeline.metadata.step_count_warning(params.mode, params.steps):
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def decode_stream(
    pipeline: StreamingPipeline, cond: Condition, chunks: int, params: SamplingParams
) -> Iterator[DecodedChunk]:
    """Yield the decoded signals of row 0 per chunk; their concatenation equals decoding all latents at once."""
    decoders = {m: codec.decoder() for m, codec in pipeline.codecs.items()}
    start = time.perf_counter()
    pending = {VIDEO: decoders[VIDEO].push(pipeline.first_frame_latent(cond, 0))} if VIDEO in decoders else {}
    for chunk in pipeline.generate_chunks(cond, chunks, params, samples=torch.zeros(1, dtype=torch.long)):
        signals = _push(pipeline, decoders, chunk, pending)
        pending = {}
        yield DecodedChunk(signals=signals, seconds=time.perf_counter() - start)
        start = time.perf_counter()
    rest = {m: d.flush() for m, d in decoders.items()}
    yield DecodedChunk(signals=rest, seconds=time.perf_counter() - start)


def _push(
    pipeline: StreamingPipeline, decoders: Mapping[str, Any], chunk: Mapping[str, Stream], pending: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    new = {m: decoders[m].push(pipeline.denormalize(m, chunk[m].latents[0])) for m in chunk}
    return {m: torch.cat([pending[m], x]) if m in pending else x for m, x in new.items()}


@contextmanager
def growing_file(path: Path) -> Generator[IO[bytes]]:
    """Yield a new file that others can read while it is written; it is deleted on failure.

    An existing file of the name is replaced when the new one is complete.
    """
    if path.exists():
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            yield file
        return
    try:
        with path.open("xb") as file:
            yield file
        flush_file(path)
    except FileExistsError:  # of another process
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def clip_seconds(pipeline: StreamingPipeline, chunks: int) -> Fraction:
    """Return the length of a clip: its chunks, and the first frame before them."""
    return chunks * pipeline.metadata.chunk_seconds + (Fraction(1) / pipeline.fps if VIDEO in pipeline.codecs else 0)


def decode_clip(
    pipeline: StreamingPipeline, cond: Condition, chunks: int, params: SamplingParams
) -> Iterator[DecodedChunk]:
    """Yield the chunks of ``decode_stream``; samples after the last frame, of the last latent, are left out."""
    left = int(clip_seconds(pipeline, chunks) * pipeline.sample_rate) if AUDIO in pipeline.codecs else 0
    for chunk in decode_stream(pipeline, cond, chunks, params):
        if AUDIO not in chunk.signals:
            yield chunk
            continue
        samples = chunk.signals[AUDIO][:left]
        left -= len(samples)
        yield replace(chunk, signals={**chunk.signals, AUDIO: samples})


def write_chunks(chunks: Iterable[DecodedChunk], target: Path, format: ClipFormat) -> Iterator[DecodedChunk]:
    """Write chunks into an mp4 file, playable while it grows, and yield each one that is written."""
    muxer = LiveMuxer(fps=format.fps, size=format.size, sample_rate=format.sample_rate, crf=CLIP_CRF)
    with growing_file(target) as file:
        for chunk in chunks:
            file.write(muxer.push(chunk.video, chunk.audio))
            file.flush()
            yield chunk
        file.write(muxer.close())


def stream_to_mp4(
    pipeline: StreamingPipeline, cond: Condition, target: Path, *, chunks: int, params: SamplingParams
) -> dict[str, Any]:
    """Stream row 0 of ``cond`` into an mp4 file, playable while it grows, and return its facts."""
    made = decode_clip(pipeline, cond, chunks, params)
    frames, times = 0, list[float]()
    for chunk in write_chunks(made, target, ClipFormat.of(pipeline)):
        times.append(chunk.seconds)
        frames += 0 if chunk.video is None else len(chunk.video)
    length = float(clip_seconds(pipeline, chunks))
    return {
        "seconds": length,
        "frames": frames,
        "fps": float(pipeline.fps) if VIDEO in pipeline.codecs else None,
        "first_chunk_s": round(times[0], 4),
        "seconds_per_second": round(length / sum(times), 3),
    }
