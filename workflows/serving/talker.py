"""A network that serves sessions: conditions, chunks of several rows, and streaming decoders."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from mfcore.model.kv_cache import LayeredKVCache
from mfcore.solver import DenoiserContext
from mfcore.types import AUDIO, VIDEO, Condition, Stream
from preprocessing.records import Frames, Waveform, Word
from preprocessing.speech.frontend import phonemes_of_text
from workflows.checkpoints.load import load_export
from workflows.config import serialization
from workflows.inference.inputs import estimate_word_times
from workflows.inference.latents import NonFiniteActivationError
from workflows.inference.pipeline import StreamingPipeline
from workflows.inference.precision import Precision, cast_weights, default_precision
from workflows.inference.sampling import resolve_sampling_params
from workflows.serving.batching import ChunkSampler, ClipRow
from workflows.utils import distributed

Latents = Mapping[str, Stream]


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Frames and samples that became final."""

    frames: Frames | None  # uint8 (n, height, width, 3); None without video
    samples: Waveform | None  # float32 (n,); None without audio


class ClipDecoder:
    """Streaming decoders of one clip."""

    def __init__(self, pipeline: StreamingPipeline, first_frame: Tensor | None) -> None:
        """Open the decoders; ``first_frame``: its latent (1, C, h, w) in units of the codec, None without video."""
        self._pipeline = pipeline
        self._decoders = {m: codec.decoder() for m, codec in pipeline.codecs.items()}
        self._pending = None if first_frame is None else self._decoders[VIDEO].push(first_frame)
        self.frames = self.samples = 0  # decoded so far

    def push(self, latents: Latents) -> Signals:
        """Return the signals that are final after the next chunk, given as latents of one row."""
        made = {
            m: self._decoders[m].push(self._pipeline.denormalize(m, stream.latents[0])) for m, stream in latents.items()
        }
        if self._pending is not None:
            made[VIDEO] = torch.cat([self._pending, made[VIDEO]])
            self._pending = None
        return self._count(made)

    def flush(self, chunks: int) -> Signals:
        """Return the rest of a clip of this many chunks; sound ends with the last frame."""
        rest = {m: decoder.flush() for m, decoder in self._decoders.items()}
        if AUDIO in rest:
            rest[AUDIO] = rest[AUDIO][: max(0, self._clip_samples(chunks) - self.samples)]
        return self._count(rest)

    def _clip_samples(self, chunks: int) -> int:
        length = chunks * self._pipeline.metadata.chunk_seconds
        if VIDEO in self._decoders:
            length += Fraction(1) / self._pipeline.fps
        return int(length * self._pipeline.sample_rate)

    def _count(self, made: Mapping[str, Tensor]) -> Signals:
        frames = made[VIDEO].numpy() if VIDEO in made else None
        samples = made[AUDIO].numpy().astype(np.float32) if AUDIO in made else None
        self.frames += 0 if frames is None else len(frames)
        self.samples += 0 if samples is None else len(samples)
        return Signals(frames=frames, samples=samples)

    def state(self) -> dict[str, Tensor]:
        """Return the state between two chunks."""
        found = {f"{m}.{name}": part for m, d in self._decoders.items() for name, part in d.state().items()}
        pending = {} if self._pending is None else {"pending": self._pending}
        return found | pending | {"counts": torch.tensor([self.frames, self.samples])}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue after the state of another decoder."""
        self._pending = state.get("pending")
        self.frames, self.samples = (int(n) for n in state["counts"])
        for m, decoder in self._decoders.items():
            decoder.load_state({k.removeprefix(f"{m}."): v for k, v in state.items() if k.startswith(f"{m}.")})


class Talker:
    """Network with all that sessions share."""

    def __init__(self, pipeline: StreamingPipeline, *, name: str, steps: int | None = None) -> None:
        """Take a pipeline; ``steps``: solver steps per chunk, None: the default of its stage."""
        self.pipeline, self.name = pipeline, name
        card = pipeline.metadata
        self.params = resolve_sampling_params(card.stage, mode=None, steps=steps, guidance=1.0, trust=None, seed=0)
        self._sampler = ChunkSampler(
            model=pipeline.velocity_model,
            config=card.model,
            timeline=card.timeline,
            shapes=pipeline.shapes(),
            levels=self.params.schedule(card.shift),
            params=self.params,
        )
        self.chunk_seconds: Fraction = card.chunk_seconds
        self.english = card.transcript == "phonemes"
        self.fps = pipeline.fps if VIDEO in pipeline.codecs else None
        self.size = pipeline.frame_size if VIDEO in pipeline.codecs else None
        self.sample_rate = pipeline.sample_rate if AUDIO in pipeline.codecs else None
        self._encode_token = lru_cache(maxsize=4096)(lambda token: pipeline.text.encode([token])[0])

    @classmethod
    def from_checkpoint(cls, path: str, *, name: str, steps: int | None = None, device: str | None = None) -> "Talker":
        """Load the averaged weights of a run, checkpoint or export; ``device``: cpu or cuda, None: a GPU if any."""
        target = torch.device(device) if device else distributed.local_device()
        model, metadata = load_export(path, "ema")
        precision: Precision = default_precision(target)
        pipeline = StreamingPipeline(cast_weights(model, precision).to(target), metadata, precision)
        return cls(pipeline, name=name, steps=steps)

    @cached_property
    def fingerprint(self) -> str:
        """Return a digest of network and sampling, which a snapshot must share."""
        card = json.dumps(
            [serialization.to_dict(self.pipeline.metadata), self.params.steps, self.params.sampler], sort_keys=True
        )
        digest = hashlib.blake2b(card.encode(), digest_size=8)
        for name, weight in self.pipeline.model.state_dict().items():
            digest.update(f"{name} {float(weight.float().sum()):.6g}".encode())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        """Return the device of the network."""
        return self.pipeline.device

    @property
    def horizon(self) -> float:
        """Return the largest distance of a word that a chunk reads, in seconds."""
        return self.pipeline.metadata.model.word_horizon_seconds

    @property
    def window_chunks(self) -> int:
        """Return the number of chunks in a full cache."""
        return self.pipeline.metadata.model.window_chunks

    def timed_words(self, text: str) -> list[Word]:
        """Return the transcript of a text that starts at 0. Raises UserInputError if it cannot be spoken."""
        return phonemes_of_text(text, start=0.0) if self.english else estimate_word_times(text.split())

    def encode(self, *, caption: str, first_frame: Tensor | None, voice: Tensor | None) -> Condition:
        """Return the condition of one row without words. Raises UserInputError."""
        return self.pipeline.encode_conditions(caption=caption, transcript=(), first_frame=first_frame, voice=voice)

    def with_words(self, cond: Condition, words: Sequence[Word]) -> Condition:
        """Return the condition with these words and no others."""
        if not words:
            vectors, times = torch.zeros(1, self.pipeline.text.width), [(0.0, 0.0)]
        else:
            vectors = torch.stack([self._encode_token(word.word) for word in words])
            times = [(word.start, word.end) for word in words]
        device = cond.caption.device
        return replace(
            cond,
            words=vectors[None].to(device),
            words_mask=torch.full((1, len(vectors)), bool(words), device=device),
            word_times=torch.tensor(times, dtype=torch.float64, device=device)[None],
        )

    def start_row(self, cond: Condition, *, seed: int) -> ClipRow:
        """Return the row of a new clip."""
        with self.pipeline.autocast():
            return self._sampler.start_row(cond, seed=seed)

    def replace_voice(self, row: ClipRow, cond: Condition) -> None:
        """Continue a clip with the voice of another condition."""
        row.cond = replace(row.cond, voice=cond.voice, voice_mask=cond.voice_mask)
        with torch.no_grad(), self.pipeline.autocast():
            sink = DenoiserContext(model=self.pipeline.velocity_model, cond=row.cond).prefill().cache
        assert isinstance(sink, LayeredKVCache)
        row.cache = replace(row.cache, sink=sink.sink, passes=None)

    def batch_key(self, row: ClipRow) -> tuple[int, int]:
        """Return what rows of one forward pass have in common."""
        return self._sampler.batch_key(row)

    def advance(self, rows: Sequence[ClipRow]) -> list[Latents]:
        """Generate the next chunk of rows of one ``batch_key``. Raises NonFiniteActivationError."""
        with self.pipeline.autocast():
            made = self._sampler.advance_rows(rows)
        if not all(bool(s.latents.isfinite().all()) for latents in made for s in latents.values()):
            raise NonFiniteActivationError("a chunk is not finite: the network cannot be served")
        return list(made)

    def decoder(self, cond: Condition) -> ClipDecoder:
        """Return the decoders of a new clip."""
        has_video = cond.first_frame is not None
        return ClipDecoder(self.pipeline, self.pipeline.first_frame_latent(cond, 0) if has_video else None)
