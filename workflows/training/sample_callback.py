"""What a run sees of itself while it trains: samples with their scores, history use, and the alarms.

A look is made in line, by rank 0 while the others wait; or aside, by somebody who is given a copy of the weights
(``workflows.training.validation``) and whose word comes when training has gone on. Either way its numbers are logged
at the step of the weights, and nothing that training draws from is touched.
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
    """Puts finished looks into a run's log, each once: what the log on disk has is not put there again."""

    def __init__(self, run_dir: Path, alarms: AlarmStore) -> None:
        self._run_dir, self._alarms = run_dir, alarms
        self._known = {e["step"] for e in read_json_lines(run_dir / METRICS) if LATE_KEY in e}

    def pending(self) -> list[SampleReport]:
        """In the order of steps."""
        found = [load_report(p) for p in sorted((self._run_dir / LOOKS).glob("step-*.json")) if self._new(p)]
        self._known |= {look.step for look in found}
        return found

    def _new(self, path: Path) -> bool:
        return int(path.stem.removeprefix("step-")) not in self._known

    def publish(self, looks: Sequence[SampleReport], tracker: Tracker) -> None:
        for look in looks:
            tracker.log(look.step, look.numbers or {"sample/failed": 1.0}, late=True)
            if look.error:
                _LOGGER.warning(f"no samples at step {look.step}: {look.error}")
                continue
            for path in look.files:
                tracker.artifact(Path(path), FOLDER)
            tracker.artifact(report_path(self._run_dir, look.step), LOOKS)
            seconds = look.numbers["sample/seconds"]
            _LOGGER.info(f"samples of step {look.step} made in {seconds:.1f} s, {FOLDER}/step-{look.step:08d}-*")
            self._alarms.update("samples", look.wrong, look.step)


class SampleCallback:
    """Called by all ranks at every step's end."""

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        card: ExportMetadata,
        ema: Ema,
        sampler: SampleEvaluator,
        tracker: Tracker,
        beat: Callable[[int, str], object],
        watch: HistoryUseMonitor | None,
        aside: SnapshotWriter | None,
    ) -> None:
        self._run_dir, self._config, self._card, self._ema, self._sampler = run_dir, config, card, ema, sampler
        self._tracker, self._beat, self._gap, self._watch, self._aside = tracker, beat, FakeScoreRatio(), watch, aside
        self._alarms = AlarmStore(run_dir)
        self._published = SampleReportPublisher(run_dir, self._alarms)

    def __call__(self, progress: Progress, log: Mapping[str, float]) -> dict[str, float]:
        """Numbers to log besides ``log``."""
        numbers, wrong = self._gap.measure(log)
        if distributed.get_rank() == 0 and numbers:
            self._alarms.update("fake score", wrong, progress.step)
        numbers |= self._history(progress.step)
        if self.is_due(progress):
            self._look(progress.step)
        if distributed.get_rank() == 0 and self._config.sample_every and (log or self.is_due(progress)):
            self._published.publish(self._published.pending(), self._tracker)
        return numbers

    def _history(self, step: int) -> dict[str, float]:
        if self._watch is None or (step % self._config.eval_every and step != self._config.steps):
            return {}
        numbers, wrong = self._watch.measure(self._ema.model)
        if distributed.get_rank() == 0:
            self._alarms.update("history", wrong, step)
        return numbers

    def is_due(self, progress: Progress) -> bool:
        every, seen = self._config.sample_every, progress.samples_seen
        if not every:
            return False
        return progress.step == self._config.steps or seen // every > (seen - self._config.data.batch) // every

    def _look(self, step: int) -> None:
        if distributed.broadcast_from_rank_zero(report_path(self._run_dir, step).exists()):
            return  # of an earlier attempt: the same weights
        model = materialize_ema(self._ema, self._card)
        if self._aside is not None:
            self._aside.write(model, step)
            return
        if distributed.get_rank() == 0:
            self._beat(step - 1, "making samples after")  # the others have beaten for this step that they wait
            self._sampler.evaluate(model, self._card, step)
        distributed.barrier()


def materialize_ema(ema: Ema, card: ExportMetadata) -> nn.Module:
    """The average as a network that one rank can run alone. Called by all ranks."""
    if type(ema.storage) is ReplicatedWeights:
        return ema.module
    weights = ema.state_dict()
    model = build_model(card.model, 0)
    model.load_state_dict(weights)
    return model.to(next(iter(weights.values())).device).eval().requires_grad_(False)
