"""A trained network with its codecs, from conditions to chunks of latents."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from fractions import Fraction
from itertools import tee
from pathlib import Path
from typing import Any, NoReturn, Self, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mfcore.codecs.base import Codec
from mfcore.codecs.factory import codec_from_id, text_codec_from_id
from mfcore.errors import UserInputError
from mfcore.model.cuda_graphs import apply_inference_optimizations, check_inference_optimizations
from mfcore.model.ring_cache import to_ring_cache
from mfcore.model.transformer import AVTransformer, find_transformers
from mfcore.rollout import GeneratedChunk, noise_starts, rollout, step_noise
from mfcore.solver import DenoiserContext, Schedule, denoise
from mfcore.types import AUDIO, VIDEO, Condition, Stream, Streams, VelocityModel
from preprocessing.records import Word
from workflows.checkpoints.load import WeightKind, load_export
from workflows.checkpoints.model_card import ExportMetadata
from workflows.inference.precision import Precision, autocast, cast_weights, default_precision
from workflows.inference.sampling import SamplingParams
from workflows.utils import distributed


class NonFiniteActivationError(FloatingPointError):
    """Non-finite activations, with the first block and chunk that contain them."""


class LatentPipeline:
    """Generates latents of clips from a checkpoint. It keeps no state between calls."""

    def __init__(self, model: nn.Module, metadata: ExportMetadata, precision: Precision = "fp32") -> None:
        """Take a model with weights in ``precision``, see ``cast_weights``."""
        self.model = model.eval()
        self.metadata = metadata
        self.timeline = metadata.timeline
        self.precision: Precision = precision
        self.velocity_model = cast(VelocityModel, model)
        self.codecs: dict[str, Codec] = {
            m: codec_from_id(i, metadata.clocks[m], metadata.folders.get(m, "")) for m, i in metadata.codecs.items()
        }
        self.text = text_codec_from_id(metadata.text_codec, metadata.folders.get("text", ""))
        self._device = next(model.parameters()).device

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, weights: WeightKind = "ema", precision: Precision | None = "fp32"
    ) -> Self:
        """Load a run, a checkpoint or an export, onto the GPU if there is one; precision None: its default."""
        model, metadata = load_export(path, weights)
        precision = precision or default_precision(distributed.local_device())
        return cls(cast_weights(model, precision).to(distributed.local_device()), metadata, precision)

    def enable_optimizations(self, *, compile: bool, graphs: bool) -> None:
        """Enable torch.compile or CUDA graphs. Raises ValueError if the device does not support them."""
        check_inference_optimizations(self._device, compile=compile, graphs=graphs)
        self.velocity_model = apply_inference_optimizations(
            cast(AVTransformer, self.model), compile=compile, graphs=graphs
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context for forward passes."""
        return autocast(self._device, self.precision)

    @property
    def device(self) -> torch.device:
        """Return the device of the network."""
        return self._device

    @property
    def fps(self) -> Fraction:
        """Return the frames per second."""
        codec: Any = self.codecs[VIDEO]
        return Fraction(codec.config.fps)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Return height and width of the frames in pixels."""
        codec: Any = self.codecs[VIDEO]
        height, width = self.metadata.model.branches[VIDEO].size
        return height * codec.config.block, width * codec.config.block

    @property
    def sample_rate(self) -> int:
        """Return the audio sample rate in Hz."""
        codec: Any = self.codecs[AUDIO]
        return int(codec.config.sample_rate)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the latent shape (C, ...) per modality."""
        branches = self.metadata.model.branches
        return {m: (b.channels, *(b.size if m == VIDEO else ())) for m, b in branches.items()}

    def encode_conditions(
        self,
        *,
        caption: str,
        transcript: Sequence[Word],
        first_frame: UInt8[Tensor, "H W 3"] | None = None,
        voice: Float[Tensor, " samples"] | None = None,
    ) -> Condition:
        """Encode the conditions of one clip as a batch of one row.

        ``voice`` is a recording of at least one chunk; its loudest span is used. Without it the voice is random.
        """
        words = self.text.encode([w.word for w in transcript]) if transcript else torch.zeros(1, self.text.width)
        caption_embedding = self.text.encode_caption(caption)
        has_caption = len(caption_embedding) > 0
        caption_embedding = caption_embedding if has_caption else torch.zeros(1, self.text.width)
        times = [(w.start, w.end) for w in transcript] or [(0.0, 0.0)]
        return Condition(
            caption=caption_embedding[None],
            caption_mask=torch.full((1, len(caption_embedding)), has_caption),
            words=words[None],
            words_mask=torch.full((1, len(words)), bool(transcript)),
            word_times=torch.tensor(times, dtype=torch.float64)[None],
            first_frame=self._encode_first_frame(first_frame),
            voice=self._encode_voice(voice),
            voice_mask=torch.tensor([voice is not None]) if AUDIO in self.codecs else None,
        ).to(self._device)

    def _encode_first_frame(self, frame: Tensor | None) -> Tensor | None:
        if VIDEO not in self.codecs:
            return None
        if frame is None:
            raise UserInputError("the model needs a first frame. Use --first-frame IMAGE.")
        if tuple(frame.shape[:2]) != self.frame_size:
            raise UserInputError(f"the first frame must be {self.frame_size} pixels, got {tuple(frame.shape[:2])}")
        latent = self.codecs[VIDEO].encode(frame[None])
        return self.metadata.stats[VIDEO].whiten(latent, head=True, space=2)

    def _encode_voice(self, voice: Tensor | None) -> Tensor | None:
        if AUDIO not in self.codecs:
            return None
        n = self.timeline.count(AUDIO, 1)
        if voice is None:
            return torch.zeros(1, n, self.codecs[AUDIO].channels)
        latents = self.codecs[AUDIO].encode(voice)
        if len(latents) < n:
            raise UserInputError(
                f"--voice: the recording is too short. Use at least {float(self.metadata.chunk_seconds)} s."
            )
        return self.metadata.stats[AUDIO].whiten(_loudest_span(latents, voice, n))[None]

    @torch.no_grad()
    def generate_chunks(
        self,
        cond: Condition,
        chunks: int,
        params: SamplingParams,
        *,
        samples: Tensor | None = None,
        conds: Iterable[Condition] | None = None,
    ) -> Iterator[dict[str, Stream]]:
        """Yield the whitened clean latents of each chunk, for all rows of ``cond``.

        The noise of row i depends on ``samples[i]``. ``conds`` gives one condition per chunk, if caption or transcript
        change; it is read chunk by chunk. Raises NonFiniteActivationError.
        """
        rows = cond.caption.shape[0]
        samples = torch.arange(rows) if samples is None else samples
        template = cond.caption.float()
        starts = noise_starts(
            self.timeline, self.shapes(), range(chunks), seed=params.seed, samples=samples, like=template
        )
        max_tokens = sum(self.timeline.max_count(m) * b.tokens for m, b in self.metadata.model.branches.items())
        with self.autocast():
            context = DenoiserContext(model=self.velocity_model, cond=cond, guidance=params.guidance).prefill()
        context = context.map_caches(lambda cache: to_ring_cache(cache, max_tokens))
        trust = None if params.trust_label is None else torch.full((rows,), params.trust_label, device=self._device)
        levels = params.schedule(self.metadata.shift)
        renoising = params.renoising(step_noise(params.seed, samples))
        starts, starts_again = tee(starts)
        chunks_made = rollout(context, starts, levels, mode=params.mode, trust=trust, conds=conds, renoising=renoising)
        for start, chunk in self._iterate_in_autocast(zip(starts_again, chunks_made, strict=False)):
            if not all(bool(s.latents.isfinite().all()) for s in chunk.clean.values()):
                self._raise_non_finite(chunk, start, levels, params)
            yield chunk.clean

    def _iterate_in_autocast(
        self, chunks_made: Iterator[tuple[Streams, GeneratedChunk]]
    ) -> Iterator[tuple[Streams, GeneratedChunk]]:
        """Iterate with autocast inside the iterator only, not in the code of the caller."""
        while True:
            with self.autocast():
                item = next(chunks_made, None)
            if item is None:
                return
            yield item

    def _raise_non_finite(
        self, chunk: GeneratedChunk, start: Streams, levels: Schedule, params: SamplingParams
    ) -> NoReturn:
        """Repeat a non-finite chunk with checks after each block, to name the first non-finite one."""
        try:
            for transformer in find_transformers(self.model):
                transformer.guard = _raise_error
            with self.autocast():
                denoise(replace(chunk.before, model=self.model), start, levels, mode=params.mode)
        finally:
            for transformer in find_transformers(self.model):
                transformer.guard = None
        number = int(next(iter(start.values())).chunk[0])
        raise NonFiniteActivationError(
            f"chunk {number} is not finite, but all block outputs are: check the output head"
        )

    def denormalize(self, modality: str, whitened: Float[Tensor, "..."], *, head: bool = False) -> Tensor:
        """Return latents in the units of the codec."""
        space = 2 if modality == VIDEO else 0
        return self.metadata.stats[modality].restore(whitened.float().cpu(), head=head, space=space)

    def first_frame_latent(self, cond: Condition, row: int) -> Tensor:
        """Return the raw latent of the first frame of a row, (1, C, h, w)."""
        assert cond.first_frame is not None
        return self.denormalize(VIDEO, cond.first_frame[row : row + 1], head=True)


def _raise_error(message: str) -> NoReturn:
    raise NonFiniteActivationError(message)


def _loudest_span(latents: Tensor, sound: Tensor, n: int) -> Tensor:
    """Return the ``n`` neighboring latents with the most audio energy, to avoid pauses."""
    samples_per_latent = len(sound) // len(latents)
    energy = sound[: samples_per_latent * len(latents)].reshape(len(latents), samples_per_latent).square().mean(1)
    runs = energy.unfold(0, n, 1).sum(1)
    start_index = int(runs.argmax())
    return latents[start_index : start_index + n]
