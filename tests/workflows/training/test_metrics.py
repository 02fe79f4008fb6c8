"""Progress of a run: speed, time left, a bar or plain lines."""

import io
import sys

import pytest

from workflows.training import metrics
from workflows.training.metrics import ThroughputMeter, format_count, format_duration, progress_event
from workflows.training.progress import Progress
from workflows.utils.progress import ProgressEvent, training_progress


def test_speed_excludes_evaluation_and_time_left_includes_it(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    watch = ThroughputMeter()
    for _ in range(2):  # each step: 1 s of waiting, 3 s of computing
        now += 1
        watch.batch_ready()
        now += 3
        watch.count(8, 400)
        watch.step_end()
    with watch.exclude():
        now += 8  # samples
    with watch.saving():
        now += 2
    found = watch.collect(left=32)
    assert found["speed/samples_per_s"] == 16 / 10
    assert found["speed/tokens_per_s"] == 800 / 10
    assert found["speed/data_wait_s"] == 1.0
    assert found["speed/data_wait_share"] == 0.2
    assert found["speed/checkpoint_s"] == 2.0
    assert found["speed/left_s"] == 32 * 18 / 16
    assert 0.01 < found["memory/rss_gib"] < 100
    now += 2
    watch.count(8, 400)
    again = watch.collect(left=24)
    assert again["speed/samples_per_s"] == 4.0, "since the last entry"
    assert again["speed/left_s"] == 24 * 20 / 24, "at the mean of the run"
    assert "speed/checkpoint_s" not in again


def test_a_progress_line_has_step_losses_speed_and_time_left():
    progress = Progress(step=20, samples_seen=160, first={"flow_matching/video": 2.5}, last={})
    log = {
        "flow_matching/video": 1.25,
        "flow_matching/video/t0": 9.0,
        "held_out/flow_matching/video": 1.5,
        "lr/fake": 1,
    }
    log |= {"speed/samples_per_s": 12.34, "speed/tokens_per_s": 45_678.0, "speed/left_s": 199.2, "alarm/raised": 1.0}
    assert str(progress_event("video", 300, progress, log)) == (
        "video 20/300  flow_matching/video 1.2500  held_out/flow_matching/video 1.5000  "
        "12.3 samples/s  45.7k tokens/s  3 min 20 s left"
    )
    assert str(progress_event("video", 300, progress, {})) == "video 20/300  held_out/flow_matching/video 2.5000"


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (60, "1 min 0 s"), (7501, "2 h 5 min")])
def test_durations_are_rounded_up(seconds, text):
    assert format_duration(seconds) == text


def test_counts_have_three_digits():
    assert [format_count(n) for n in (9.5, 950, 1234, 4.56e6)] == ["9.5", "950", "1.23k", "4.56M"]


ENTRIES = (
    "video: resuming at step 4",
    ProgressEvent(stage="video", step=5, steps=10, text="loss 1.25  9 samples/s"),
    "no samples: [red] is a folder [/x]",
)


def test_without_a_terminal_entries_are_plain_lines(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with training_progress() as show:
        for entry in ENTRIES:
            show(entry)
    assert out.getvalue().splitlines() == [ENTRIES[0], "video 5/10  loss 1.25  9 samples/s", ENTRIES[2]]


def test_a_terminal_shows_a_bar_with_the_latest_losses(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", out)
    with training_progress() as show:
        for entry in ENTRIES:
            show(entry)
    text = out.getvalue()
    assert "5/10" in text
    assert "loss 1.25  9 samples/s" in text
    assert "video: resuming at step 4" in text
    assert "no samples: [red] is a folder [/x]" in text, "paths are not parsed as colors"
