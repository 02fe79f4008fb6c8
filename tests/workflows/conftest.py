"""Fixtures that several tests read and none changes."""

from fractions import Fraction

import pytest

from preprocessing.config import PreprocessConfig
from preprocessing.toyworld.world import write_toyworld
from workflows.data.build import build_dataset


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> str:
    """Build a dataset of six toy clips of five chunks."""
    folder = tmp_path_factory.mktemp("toy")
    write_toyworld(folder / "clips", clips=6, seconds=2.6, jobs=1)
    config = PreprocessConfig(workers=0, window_seconds=Fraction(5, 2))
    build_dataset([str(folder / "clips")], str(folder / "data"), config, progress=lambda *_: None)
    return str(folder / "data")
