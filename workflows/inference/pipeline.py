"""A trained network with its codecs: conditions in, chunks of picture and sound out, one after the other."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from fractions import Fraction
from itertools import tee
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mfcore.codecs.base import Codec, StreamDecoder
from mfcore.codecs.factory import codec_from_id, text_codec_from_id
from mfcore.model.cuda_graphs import apply_inference_optimizations, check_inference_optimizations
from mfcore.model.ring_cache import to_ring_cache
from mfcore.model.transformer import AVTransformer, find_transformers
from mfcore.rollout import GeneratedChunk, noise_starts, rollout
from mfcore.solver import DenoiserContext, Schedule, denoise, schedule
from mfcore.types import AUDIO, VIDEO, Condition, Stream, Streams, VelocityModel
from preprocessing.records import Word
from workflows.checkpoints.load import WeightKind, load_export
from workflows.checkpoints.model_card import ExportMetadata
from workflows.inference.precision import Precision, autocast, cast_weights, default_precision
from workflows.inference.sampling import SamplingParams
from workflows.utils import distributed


class NonFiniteActivationError(FloatingPointError):
    """Numbers inside a network that are not finite, with the block and the chunk where they first are."""


class StreamingPipeline:
    """Generates; keeps no state between calls, so one instance serves many clips."""

    def __init__(self, model: nn.Module, card: ExportMetadata, precision: Precision = "fp32") -> None:
        """``precision`` is that of ``model``'s weights, see ``workflows.precision.narrow``."""
        self.model, self.card, self.timeline = model.eval(), card, card.timeline
        self.precision: Precision = precision
        self._asked = cast(VelocityModel, model)
        self.codecs: dict[str, Codec] = {
            m: codec_from_id(i, card.clocks[m], card.folders.get(m, "")) for m, i in card.codecs.items()
        }
        self.text = text_codec_from_id(card.text_codec, card.folders.get("text", ""))
        self._device = next(model.parameters()).device

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, weights: WeightKind = "ema", precision: Precision | None = "fp32"
    ) -> "StreamingPipeline":
        """From a run, a checkpoint or an export; on the GPU where there is one. ``precision`` None: as usual there."""
        model, card = load_export(path, weights)
        precision = precision or default_precision(distributed.local_device())
        return cls(cast_weights(model, precision).to(distributed.local_device()), card, precision)

    def enable_optimizations(self, *, compile: bool, graphs: bool) -> None:
        """Stream faster from now on, the same clips. ValueError for what cannot be done here."""
        check_inference_optimizations(self._device, compile=compile, graphs=graphs)
        self._asked = apply_inference_optimizations(cast(AVTransformer, self.model), compile=compile, graphs=graphs)

    def autocast(self) -> AbstractContextManager[Any]:
        """Where the network is asked something, products are in the streamer's precision."""
        return autocast(self._device, self.precision)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.card.clocks)

    @property
    def fps(self) -> Fraction:
        """Frames per second of the picture."""
        codec: Any = self.codecs[VIDEO]
        return Fraction(codec.config.fps)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the picture, pixels."""
        codec: Any = self.codecs[VIDEO]
        height, width = self.card.model.branches[VIDEO].size
        return height * codec.config.block, width * codec.config.block

    @property
    def sample_rate(self) -> int:
        """Samples per second of the sound."""
        codec: Any = self.codecs[AUDIO]
        return int(codec.config.sample_rate)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Latent shape (C, ...) per modality."""
        branches = self.card.model.branches
        return {m: (b.channels, *(b.size if m == VIDEO else ())) for m, b in branches.items()}

    def encode_conditions(
        self,
        *,
        caption: str,
        transcript: Sequence[Word],
        first_frame: UInt8[Tensor, "H W 3"] | None = None,
        voice: Float[Tensor, " samples"] | None = None,
    ) -> Condition:
        """One row. ``voice``: a recording to speak like, cut to one chunk; None lets the network choose a voice."""
        words = self.text.encode([w.word for w in transcript]) if transcript else torch.zeros(1, self.text.width)
        about = self.text.encode_caption(caption)
        spoken = len(about) > 0
        about = about if spoken else torch.zeros(1, self.text.width)
        times = [(w.start, w.end) for w in transcript] or [(0.0, 0.0)]
        return Condition(
            caption=about[None],
            caption_mask=torch.full((1, len(about)), spoken),
            words=words[None],
            words_mask=torch.full((1, len(words)), bool(transcript)),
            word_times=torch.tensor(times, dtype=torch.float64)[None],
            first_frame=self._first_latent(first_frame),
            voice=self._voice_latents(voice),
            voice_mask=torch.tensor([voice is not None]) if AUDIO in self.codecs else None,
        ).to(self._device)

    def _first_latent(self, frame: Tensor | None) -> Tensor | None:
        if VIDEO not in self.codecs:
            return None
        if frame is None:
            raise ValueError("this model draws from a first frame: pass one with --first-frame IMAGE")
        if tuple(frame.shape[:2]) != self.frame_size:
            raise ValueError(f"the first frame must be {self.frame_size} pixels, got {tuple(frame.shape[:2])}")
        latent = self.codecs[VIDEO].encode(frame[None])
        return self.card.stats[VIDEO].whiten(latent, head=True, space=2)

    def _voice_latents(self, voice: Tensor | None) -> Tensor | None:
        if AUDIO not in self.codecs:
            return None
        n = self.timeline.count(AUDIO, 1)
        if voice is None:
            return torch.zeros(1, n, self.codecs[AUDIO].channels)
        latents = self.codecs[AUDIO].encode(voice)
        if len(latents) < n:
            raise ValueError(
                f"the reference voice is too short: at least {float(self.card.chunk_seconds)} s are needed"
            )
        return self.card.stats[AUDIO].whiten(_loudest(latents, voice, n))[None]

    @torch.no_grad()
    def generate_chunks(
        self,
        cond: Condition,
        chunks: int,
        how: SamplingParams,
        samples: Tensor | None = None,
        conds: Iterable[Condition] | None = None,
    ) -> Iterator[dict[str, Stream]]:
        """Whitened clean chunks, for all rows of ``cond``, as they are finished; row i draws from ``samples[i]``.

        ``conds``: the condition of each chunk where caption or transcript change on the way; asked for one by one.
        """
        rows = cond.caption.shape[0]
        samples = torch.arange(rows) if samples is None else samples
        like = cond.caption.float()
        starts = noise_starts(self.timeline, self.shapes(), range(chunks), how.seed, samples, like)
        most = sum(self.timeline.max_count(m) * b.tokens for m, b in self.card.model.branches.items())
        with self.autocast():
            context = DenoiserContext(model=self._asked, cond=cond, guidance=how.guidance).prefill()
        context = context.map_memories(lambda memory: to_ring_cache(memory, most))
        trust = None if how.trust_label is None else torch.full((rows,), how.trust_label, device=self._device)
        plan = schedule(how.steps, self.card.shift)
        starts, same = tee(starts)
        made = rollout(context, starts, plan, mode=how.mode, trust=trust, conds=conds)
        for start, chunk in self._each(zip(same, made, strict=False)):
            if not all(bool(s.latents.isfinite().all()) for s in chunk.clean.values()):
                self._blame(chunk, start, plan, how)
            yield chunk.clean

    def _each(self, made: Iterator[tuple[Streams, GeneratedChunk]]) -> Iterator[tuple[Streams, GeneratedChunk]]:
        """Each is made in the streamer's precision; what is done between them is not."""
        while True:
            with self.autocast():
                one = next(made, None)
            if one is None:
                return
            yield one

    def _blame(self, chunk: GeneratedChunk, start: Streams, plan: Schedule, how: SamplingParams) -> NoReturn:
        """Make a chunk that is not finite again, looking at every block. NonFiniteActivation names the place."""
        try:
            for network in find_transformers(self.model):
                network.guard = _raise
            with self.autocast():
                denoise(replace(chunk.before, model=self.model), start, plan, mode=how.mode)
        finally:
            for network in find_transformers(self.model):
                network.guard = None
        number = int(next(iter(start.values())).chunk[0])
        raise NonFiniteActivationError(
            f"chunk {number} is not finite, though what leaves its blocks is: look at the head"
        )

    def denormalize(self, modality: str, whitened: Float[Tensor, "..."], *, head: bool = False) -> Tensor:
        """Latents as the codec reads them."""
        space = 2 if modality == VIDEO else 0
        return self.card.stats[modality].restore(whitened.float().cpu(), head=head, space=space)

    def decoders(self, cond: Condition) -> list[dict[str, StreamDecoder]]:
        """A decoder per row and modality; those of the picture have been given the first frame."""
        rows: list[dict[str, StreamDecoder]] = []
        for i in range(cond.caption.shape[0]):
            row = {m: codec.decoder() for m, codec in self.codecs.items()}
            rows.append(row)
            if VIDEO in row and cond.first_frame is None:
                raise ValueError(f"row {i} has no first frame")
        return rows

    def first_frame_latent(self, cond: Condition, row: int) -> Tensor:
        """The raw first-frame latent of a row, (1, C, h, w)."""
        assert cond.first_frame is not None
        return self.denormalize(VIDEO, cond.first_frame[row : row + 1], head=True)

    def decode(self, cond: Condition, chunks: Sequence[Mapping[str, Stream]], row: int) -> dict[str, Tensor]:
        """Whole signals of one row: frames uint8 (n, H, W, 3) and samples float32."""
        out: dict[str, Tensor] = {}
        for m, codec in self.codecs.items():
            latents = self.denormalize(m, torch.cat([c[m].latents[row] for c in chunks]))
            if m == VIDEO:
                latents = torch.cat([self.first_frame_latent(cond, row), latents])
            out[m] = codec.decode(latents)
        return out


def _raise(odd: str) -> NoReturn:
    raise NonFiniteActivationError(odd)


def _loudest(latents: Tensor, sound: Tensor, n: int) -> Tensor:
    """The run of ``n`` latents whose sound has the most energy: a pause would say nothing of a voice."""
    per = len(sound) // len(latents)
    energy = sound[: per * len(latents)].reshape(len(latents), per).square().mean(1)
    runs = energy.unfold(0, n, 1).sum(1)
    first = int(runs.argmax())
    return latents[first : first + n]
