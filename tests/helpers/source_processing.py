"""Run the preprocessing steps on a single source."""

from collections.abc import Iterator

from preprocessing.config import PreprocessConfig
from preprocessing.pipeline import process_sources
from preprocessing.records import Clip, Rejected, Source
from preprocessing.steps.encode import Encoders


def process_source(source: Source, config: PreprocessConfig, encoders: Encoders) -> Iterator[Clip | Rejected]:
    """Yield every span of a source, encoded or rejected."""
    return (found for _, found in process_sources([source], config, encoders))
