"""Sample reports that are made while training continues, by Ray Train's asynchronous validation.

Ray Train validates what a worker reports as a checkpoint: an existing folder below its own, the same on all ranks. Our
checkpoints do not qualify: they may live in object storage, are completed asynchronously and are deleted later. So
rank 0 writes the weights for the samples into a snapshot folder of the Ray run and reports it. The validation task
waits for the last file, evaluates the samples and deletes the folder.
"""

import contextlib
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from workflows.checkpoints.layout import METADATA_FILE
from workflows.checkpoints.load import load_export
from workflows.checkpoints.model_card import ExportMetadata
from workflows.config import serialization
from workflows.config.run import EngineConfig
from workflows.training.engines.state import to_cpu_copy
from workflows.training.samples import SampleReport, load_report, report_path, sample_evaluator_for
from workflows.utils import distributed
from workflows.utils.json_io import write_json

SNAPSHOT_TIMEOUT_S = 900.0  # seconds that a validation task waits for the weights
_NAME = "look-"


class SnapshotWriter:
    """Writer of weight snapshots below ``root``. Every method is called by all ranks together."""

    def __init__(self, root: Path, metadata: ExportMetadata, report: Callable[[Path], object]) -> None:
        self._root, self._metadata, self._report = root, metadata, report
        self._writing: threading.Thread | None = None

    def write(self, model: nn.Module, step: int) -> None:
        """Copy the weights, start a thread that writes them, and report the folder."""
        # unique name: after a restart the step is repeated while its first snapshot may still be read
        folder = self._root / f"{_NAME}{step:08d}-{secrets.token_hex(4)}"
        if distributed.get_rank() == 0:
            self.close()
            folder.mkdir(parents=True, exist_ok=True)
            weights = {name: to_cpu_copy(value) for name, value in model.state_dict().items()}
            self._writing = threading.Thread(target=self._write, args=(folder, weights), name=folder.name)
            self._writing.start()
        self._report(folder)

    def _write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        with contextlib.suppress(OSError):  # disk full: the reader reports missing weights
            save_file(dict(weights), folder / "ema.safetensors")
            write_json(folder / METADATA_FILE, serialization.to_dict(self._metadata))

    def close(self) -> None:
        """Wait until the latest snapshot is written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None


def evaluate_snapshot(folder: Path, run_dir: Path, timeout: float = SNAPSHOT_TIMEOUT_S) -> dict[str, float]:
    """Generate and score the samples of a snapshot, write the report, delete the snapshot; return the metrics."""
    deadline = time.monotonic() + timeout
    while not (folder / METADATA_FILE).exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the weights of {folder} were not written within {timeout:.0f} s")
        time.sleep(0.1)
    step = _step(folder)
    if not report_path(run_dir, step).exists():
        model, metadata = load_export(folder)
        sample_evaluator_for(run_dir).evaluate(model.to(distributed.local_device()), metadata, step)
    shutil.rmtree(folder, ignore_errors=True)
    return load_report(report_path(run_dir, step)).numbers


def unevaluated_snapshots(run_dir: Path) -> list[Path]:
    """Return the snapshots that were not evaluated before their run or validation task was killed."""
    return sorted((run_dir / "ray").glob(f"*/{_NAME}*"))


def evaluate_remaining(run_dir: Path) -> None:
    """Evaluate the snapshots that a killed run left, and delete them."""
    for folder in unevaluated_snapshots(run_dir):
        if (folder / METADATA_FILE).exists():
            evaluate_snapshot(folder, run_dir)
        elif not report_path(run_dir, _step(folder)).exists():
            SampleReport(step=_step(folder), error="its weights were never written").write(run_dir)
        shutil.rmtree(folder, ignore_errors=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(_NAME).split("-")[0])


def spare_resources(engine: EngineConfig, worker: Mapping[str, float], free: Mapping[str, float]) -> dict[str, float]:
    """Return the resources of a validation task next to the workers; empty if too few are ``free``.

    A run on GPUs needs one more GPU: on a CPU the samples would take hours.
    """
    wanted = {"CPU": 1.0} | ({"GPU": 1.0} if engine.use_gpu else {})
    spare = all(free.get(kind, 0.0) - engine.max_workers * worker.get(kind, 0.0) >= n for kind, n in wanted.items())
    return wanted if spare else {}
