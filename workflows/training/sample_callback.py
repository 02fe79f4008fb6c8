"""Samples, history use and alarms during training.

Samples are generated inline by rank 0 while the other ranks wait, or asynchronously from a copy of the weights
(``workflows.training.async_samples``). Their metrics are logged at the step of the weights. Sampling changes no random
number of the training.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from mfcore.ema import Ema, ReplicatedWeights
from mfcore.model.transformer import build_model
from workflows.checkpoints.model_card import ExportMetadata
from workflows.config.run import RunConfig
from workflows.tracking.tracker import LATE_KEY, METRICS, Tracker, read_json_lines
from workflows.training.async_samples import SnapshotWriter
from workflows.training.collapse_alarms import AlarmStore, FakeScoreRatio, HistoryUseMonitor
from workflows.training.progress import Progress
from workflows.training.samples import FOLDER, LOOKS, SampleEvaluator, SampleReport, load_report, report_path
from workflows.utils import distributed

_LOGGER = logging.getLogger(__name__)


class SampleReportPublisher:
    """Publisher of finished sample reports: each enters the run's log once, also across restarts."""

    def __init__(self, run_dir: Path, alarms: AlarmStore) -> None:
        self._run_dir, self._alarms = run_dir, alarms
        self._published = {e["step"] for e in read_json_lines(run_dir / METRICS) if LATE_KEY in e}

    def pending(self) -> list[SampleReport]:
        """Return the unpublished reports in the order of steps and mark them as published."""
        found = [load_report(p) for p in sorted((self._run_dir / LOOKS).glob("step-*.json")) if self._is_new(p)]
        self._published |= {report.step for report in found}
        return found

    def _is_new(self, path: Path) -> bool:
        return int(path.stem.removeprefix("step-")) not in self._published

    def publish(self, reports: Sequence[SampleReport], tracker: Tracker) -> None:
        """Log the metrics and files of the reports and update the alarms."""
        for report in reports:
            tracker.log(report.step, report.numbers or {"sample/failed": 1.0}, late=True)
            if report.error:
                _LOGGER.warning(f"no samples at step {report.step}: {report.error}")
                continue
            for path in report.files:
                tracker.artifact(Path(path), FOLDER)
            tracker.artifact(report_path(self._run_dir, report.step), LOOKS)
            seconds = report.numbers["sample/seconds"]
            _LOGGER.info(
                f"samples of step {report.step} generated in {seconds:.1f} s, {FOLDER}/step-{report.step:08d}-*"
            )
            self._alarms.update("samples", report.wrong, report.step)


class SampleCallback:
    """Callback of the training loop, called on all ranks after each step."""

    def __init__(
        self,
        run_dir: Path,
        *,
        config: RunConfig,
        metadata: ExportMetadata,
        ema: Ema,
        evaluator: SampleEvaluator,
        tracker: Tracker,
        heartbeat: Callable[[int, str], object],
        history_use: HistoryUseMonitor | None,
        snapshots: SnapshotWriter | None,
    ) -> None:
        self._run_dir, self._config, self._metadata = run_dir, config, metadata
        self._ema, self._evaluator, self._tracker = ema, evaluator, tracker
        self._heartbeat, self._snapshots = heartbeat, snapshots
        self._fake_score, self._history_use = FakeScoreRatio(), history_use
        self._alarms = AlarmStore(run_dir)
        self._publisher = SampleReportPublisher(run_dir, self._alarms)

    def __call__(self, progress: Progress, log: Mapping[str, float]) -> dict[str, float]:
        """Sample and update the alarms where due; return metrics in addition to ``log``.

        Raises:
            OSError: Files could not be written, such as on a full disk. Raised on rank 0 after all collectives.
        """
        numbers, fake_score = self._fake_score.measure(log)
        alarms = {"fake score": fake_score} if numbers else {}
        history_numbers, history = self._measure_history_use(progress.step)
        if history is not None:
            alarms["history"] = history
        if self.is_due(progress):
            self._sample(progress.step)
        if distributed.get_rank() == 0:
            for source, wrong in alarms.items():
                self._alarms.update(source, wrong, progress.step)
            if self._config.sample_every and (log or self.is_due(progress)):
                self._publisher.publish(self._publisher.pending(), self._tracker)
        return numbers | history_numbers

    def _measure_history_use(self, step: int) -> tuple[dict[str, float], dict[str, str] | None]:
        """Return the metrics and alarms of the history use, or None in place of the alarms where not due."""
        if self._history_use is None or (step % self._config.eval_every and step != self._config.steps):
            return {}, None
        return self._history_use.measure(self._ema.model)

    def is_due(self, progress: Progress) -> bool:
        """Return True if samples are due at this step."""
        every, seen = self._config.sample_every, progress.samples_seen
        if not every:
            return False
        return progress.step == self._config.steps or seen // every > (seen - self._config.data.batch) // every

    def _sample(self, step: int) -> None:
        if distributed.broadcast_from_rank_zero(report_path(self._run_dir, step).exists()):
            return  # written before a restart, from the same weights
        model = materialize_ema(self._ema, self._metadata)
        if self._snapshots is not None:
            self._snapshots.write(model, step)
            return
        failed: OSError | None = None
        if distributed.get_rank() == 0:
            self._heartbeat(step - 1, "generating samples after")  # the other ranks report that they wait at this step
            try:
                self._evaluator.evaluate(model, self._metadata, step)
            except OSError as error:  # the other ranks wait at the barrier
                failed = error
        distributed.barrier()
        if failed is not None:
            raise failed


def materialize_ema(ema: Ema, metadata: ExportMetadata) -> nn.Module:
    """Return the EMA as a network that one rank can run alone. Called by all ranks."""
    if type(ema.storage) is ReplicatedWeights:
        return ema.module
    weights = ema.state_dict()
    model = build_model(metadata.model, 0)
    model.load_state_dict(weights)
    return model.to(next(iter(weights.values())).device).eval().requires_grad_(False)
