"""Streaming pipeline: the Python API of a trained network, from text and pictures to chunks and clips."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self, Unpack

import torch

from workflows.checkpoints.load import WeightKind, load_export
from workflows.inference.clips import ClipOptions, GeneratedClip, make_clip, stream_clip
from workflows.inference.decoding import DecodedChunk
from workflows.inference.latents import LatentPipeline
from workflows.inference.precision import Precision, cast_weights, default_precision
from workflows.inference.prompt import TranscriptSource
from workflows.utils import distributed


class StreamingPipeline(LatentPipeline):
    """Generates clips from a checkpoint. It keeps no state between calls."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        weights: WeightKind = "ema",
        precision: Precision | None = None,
        device: str | torch.device | None = None,
        compile: bool = False,
        graphs: bool = False,
    ) -> Self:
        """Load a pipeline that is ready to generate.

        Args:
            path: Run, checkpoint, exported folder (`mfctl export`), packaged model such as ``toy-talker``, or a
                registered model such as ``models:/talker@champion``.
            weights: ``ema`` or ``raw``, where the checkpoint has both.
            precision: ``fp32`` or ``bf16``; None: bf16 on a GPU, fp32 on a CPU.
            device: Such as ``cpu`` or ``cuda:1``; None: the GPU if there is one.
            compile: Compile transformer blocks with torch.compile.
            graphs: Run the passes of a chunk as CUDA graphs.

        Raises:
            UserInputError: The path names no intact checkpoint, or the device does not support an option. The message
                contains the remedy.
        """
        target = torch.device(device) if device is not None else distributed.local_device()
        model, metadata = load_export(path, weights)
        precision = precision or default_precision(target)
        pipeline = cls(cast_weights(model, precision).to(target), metadata, precision)
        pipeline.enable_optimizations(compile=compile, graphs=graphs)
        return pipeline

    def stream(
        self, transcript: TranscriptSource | None = None, **options: Unpack[ClipOptions]
    ) -> Iterator[DecodedChunk]:
        """Return an iterator over the chunks of a clip, each made when it is requested.

        Args:
            transcript: Text, a file (.txt, .srt, .vtt, .json), or words with times in seconds.
            options: See ``ClipOptions``.

        Returns:
            Chunks with ``video`` uint8 (n, H, W, 3) and ``audio`` float32 (n,), None for a missing modality. Signals
            that a codec delays come with later chunks; the last item contains the rest.

        Raises:
            UserInputError: The input is wrong; raised before the first chunk.
        """
        return stream_clip(self, transcript, options)

    def __call__(self, transcript: TranscriptSource | None = None, **options: Unpack[ClipOptions]) -> GeneratedClip:
        """Return a whole clip with ``video``, ``audio`` and ``save(path)``; the arguments are those of ``stream``."""
        return make_clip(self, transcript, options)
