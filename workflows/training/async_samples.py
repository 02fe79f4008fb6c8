"""Looks that are made while training goes on, by Ray Train's asynchronous validation.

Ray Train validates what a worker reports as a checkpoint: a folder below its own, the same for all ranks, that exists
when it is reported. A checkpoint of ours is none of these (it stands on its shelf, may be object storage, comes into
being some time after its step, and goes when newer ones are whole). So rank 0 sets the weights that samples need aside
in a folder of Ray's run, a thread writes them, and that folder is reported; whoever validates waits for its last
file, makes the look, and removes the folder.
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

SNAPSHOT_TIMEOUT_S = 900.0  # seconds that a look waits for its weights
_NAME = "look-"


class SnapshotWriter:
    """Weights set aside under ``root`` for looks that others make. Every method is called by all ranks together."""

    def __init__(self, root: Path, metadata: ExportMetadata, hand_over: Callable[[Path], object]) -> None:
        self._root, self._metadata, self._hand_over = root, metadata, hand_over
        self._writing: threading.Thread | None = None

    def write(self, model: nn.Module, step: int) -> None:
        """Copy the weights, which takes the time of the copy, and hand their place over."""
        # a name of its own: after a restart the step comes again, while its first copy may be being read
        folder = self._root / f"{_NAME}{step:08d}-{secrets.token_hex(4)}"
        if distributed.get_rank() == 0:
            self.close()
            folder.mkdir(parents=True, exist_ok=True)
            weights = {name: to_cpu_copy(value) for name, value in model.state_dict().items()}
            self._writing = threading.Thread(target=self._write, args=(folder, weights), name=folder.name)
            self._writing.start()
        self._hand_over(folder)

    def _write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        with contextlib.suppress(OSError):  # no room: the look says that its weights never came
            save_file(dict(weights), folder / "ema.safetensors")
            write_json(folder / METADATA_FILE, serialization.to_dict(self._metadata))

    def close(self) -> None:
        """Until what was set aside last is written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None


def evaluate_snapshot(folder: Path, run_dir: Path, patience: float = SNAPSHOT_TIMEOUT_S) -> dict[str, float]:
    """Make the look of a snapshot, leave its file in the run, and remove the snapshot; the numbers."""
    end = time.monotonic() + patience
    while not (folder / METADATA_FILE).exists():
        if time.monotonic() > end:
            raise RuntimeError(f"the weights of {folder} were not written within {patience:.0f} s")
        time.sleep(0.1)
    step = _step(folder)
    if not report_path(run_dir, step).exists():
        model, metadata = load_export(folder)
        sample_evaluator_for(run_dir).evaluate(model.to(distributed.local_device()), metadata, step)
    shutil.rmtree(folder, ignore_errors=True)
    return load_report(report_path(run_dir, step)).numbers


def unevaluated_snapshots(run_dir: Path) -> list[Path]:
    """What was set aside and never looked at, because its run or its validation was killed."""
    return sorted((run_dir / "ray").glob(f"*/{_NAME}*"))


def evaluate_remaining(run_dir: Path) -> None:
    """Look at it."""
    for folder in unevaluated_snapshots(run_dir):
        if (folder / METADATA_FILE).exists():
            evaluate_snapshot(folder, run_dir)
        elif not report_path(run_dir, _step(folder)).exists():
            SampleReport(step=_step(folder), error="its weights were never written").write(run_dir)
        shutil.rmtree(folder, ignore_errors=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(_NAME).split("-")[0])


def spare_resources(engine: EngineConfig, worker: Mapping[str, float], free: Mapping[str, float]) -> dict[str, float]:
    """What a look may take of the ``free`` resources, next to the workers' own; empty where nothing would be left.

    A run on GPUs needs one more for its looks: those of a network that trains there would take hours on a CPU.
    """
    wanted = {"CPU": 1.0} | ({"GPU": 1.0} if engine.use_gpu else {})
    spare = all(free.get(kind, 0.0) - engine.max_workers * worker.get(kind, 0.0) >= n for kind, n in wanted.items())
    return wanted if spare else {}
