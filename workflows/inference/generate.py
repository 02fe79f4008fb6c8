"""Stream chunks from a checkpoint into an mp4 file (``mfctl generate``)."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfcore.errors import check_range
from mfcore.solver import Mode, SamplerName
from mfcore.types import VIDEO, Condition
from preprocessing.records import Word
from workflows.checkpoints.load import WeightKind
from workflows.inference.decoding import ClipFormat, clip_seconds, decode_clip, write_chunks
from workflows.inference.pipeline import StreamingPipeline
from workflows.inference.precision import Precision
from workflows.inference.prompt import MAX_SECONDS, ClipPrompt, encode_prompt
from workflows.inference.sampling import MAX_GUIDANCE, MAX_STEPS, SamplingParams, resolve_sampling_params
from workflows.utils.output_file import check_output_file


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
