"""``report.html`` of a sweep: the numbers, the plots and some samples on one page that needs no other file."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from workflows.evaluation.csv_report import MetricRow

MAX_PAGE_BYTES = 24 << 20  # of samples on the page, before base64 makes them a third larger
COLUMNS = (  # metric, heading
    ("frechet", "Frechet distance"),
    ("frechet_bias", "its bias"),
    ("sync", "sync"),
    ("lse_c", "LSE-C"),
    ("sync_within_80ms", "within 80 ms"),
    ("syllable_error", "syllable error"),
    ("wer", "WER"),
    ("valid", "valid"),
    ("entropy", "entropy"),
    ("seam", "seam energy"),
    ("lag1", "lag-1"),
    ("history_use_video", "history use, video"),
    ("history_use_audio", "history use, audio"),
    ("identity_error", "identity error"),
    ("sharpness_over_real", "sharpness / real"),
    ("loudness_db", "loudness, dB"),
    ("silence", "silence"),
    ("frames_per_second", "frames per s"),
    ("first_chunk_s", "first chunk, s"),
    ("failed", "failed clips"),
)
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; margin: 0 auto; max-width: 1480px; padding: 24px }
h1 { font-size: 24px; margin: 0 0 4px } h2 { font-size: 18px; margin: 36px 0 8px }
.scroll { overflow-x: auto } .quiet { color: #5f5f5f; font-size: 13px } .warn { color: #9b1c31; font-weight: 600 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 4px 7px; border-bottom: 1px solid #dcdcdc; text-align: right; white-space: nowrap }
th { vertical-align: bottom; white-space: normal; font-weight: 600 }
td.name, th.name { text-align: left } tr.real { background: #f3f3f0 } img { max-width: 100% }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 14px }
figure { margin: 0 } figcaption { font-size: 13px } video { width: 100%; background: #000 }
"""

Parts = Sequence[Mapping[str, Any]]


def write_html_report(
    folder: Path, title: str, facts: Mapping[str, Any], parts: Parts, lines: Sequence[MetricRow], plots: Sequence[Path]
) -> Path:
    """The page, from what the folder holds."""
    body = [
        f"<h1>{escape(title)}</h1>",
        _facts(facts),
        "<h2>Numbers of whole clips</h2>",
        _numbers([line for line in lines if line.window == "all"]),
        *(f'<h2>{escape(_heading(plot))}</h2><img src="{_data(plot, "image/png")}" alt="">' for plot in plots),
        "<h2>Samples</h2>",
        _samples(folder, parts),
        "<h2>Not measured</h2>",
        _missing(lines),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
    )
    path = folder / "report.html"
    path.write_text(page + "\n".join(body) + "</body></html>\n")
    return path


def _facts(facts: Mapping[str, Any]) -> str:
    lines = [
        f'<p class="quiet">{facts["clips"]} held-out clips of {escape(str(facts["dataset"]))}; '
        f"distances are measured against {escape(facts['reference'])}</p>"
    ]
    for label, overlap in facts["overlap"].items():
        if overlap.get("clips"):
            text = f"{label} was trained on {len(overlap['clips'])} of these clips: its scores are no test."
            lines.append(f'<p class="warn">{escape(text)} {escape(", ".join(overlap["clips"]))}</p>')
        elif "unknown" in overlap:
            lines.append(f'<p class="warn">{escape(label)}: overlap not known: {escape(overlap["unknown"])}</p>')
        else:
            lines.append(f'<p class="quiet">None of them, nor their sources, is in the training set of {label}.</p>')
    lines += [f'<p class="warn">{escape(text)}</p>' for text in facts["doubts"]]
    lines += [f'<p class="quiet">Left out: {escape(text)}</p>' for text in facts["skipped"]]
    return "\n".join(lines)


def _numbers(lines: Sequence[MetricRow]) -> str:
    """A row per setting; beside a value its spread over seeds, or below it the interval over clips."""
    shown = [
        (metric, name) for metric, name in COLUMNS if any(x.metric == metric and x.value is not None for x in lines)
    ]
    settings = dict.fromkeys((x.label, x.mode, x.steps, x.nfe, x.guidance) for x in lines)
    found = {(x.label, x.mode, x.steps, x.nfe, x.guidance, x.metric): x for x in lines}
    head = "".join(f"<th>{escape(name)}</th>" for _, name in shown)
    rows = [_row(key, [found.get((*key, metric)) for metric, _ in shown]) for key in settings]
    head = f'<tr><th class="name">setting</th><th>NFE</th>{head}</tr>'
    return (
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
        '<p class="quiet">Small figures: standard deviation over seeds, and the 90% bootstrap interval over clips. '
        "A clip that failed counts with the worst score of each metric. A Frechet distance is too high by about the "
        "bias beside it; the row of real clips shows the floor.</p>"
    )


def _row(key: tuple[str, str, int, int, float], lines: Sequence[MetricRow | None]) -> str:
    start = f'<tr class="{"real" if key[1] == "real" else ""}"><td class="name">{escape(_setting(*key))}</td>'
    missing = "-" if key[1] == "real" else "not measured"  # real clips have no speed and read no history
    return start + f"<td>{key[3]}</td>" + "".join(f"<td>{_cell(line, missing)}</td>" for line in lines) + "</tr>"


def _setting(label: str, mode: str, steps: int, nfe: int, guidance: float) -> str:
    if mode == "real":
        return "real clips, coded"
    return f"{label}: {mode}, {steps} step{'s' * (steps > 1)}" + (f", w = {guidance:g}" if guidance != 1 else "")


def _cell(line: MetricRow | None, missing: str) -> str:
    if line is None or line.value is None:
        return f'<span class="quiet">{missing}</span>'
    spread = "" if line.spread is None else f' <span class="quiet">&plusmn; {_figure(line.spread)}</span>'
    wide = line.low is not None and line.high is not None
    bounds = f'<br><span class="quiet">{_figure(line.low)} to {_figure(line.high)}</span>' if wide else ""
    return _figure(line.value) + spread + bounds


def _figure(value: float | None) -> str:
    assert value is not None
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _heading(plot: Path) -> str:
    names = {
        "frontier": "Against network evaluations",
        "seconds": "Against seconds of computation",
        "over_time": "Over the length of a clip",
        "offsets": "Offsets of sound and picture",
        "sheet": "The same prompt",
    }
    return names.get(plot.stem, plot.stem)


def _samples(folder: Path, parts: Parts) -> str:
    """The first prompt of every setting, then the second ones, until the page is large enough."""
    figures: list[str] = []
    left = MAX_PAGE_BYTES
    most = max(len(part["samples"]) for part in parts)
    queue = [(part, part["samples"][i]) for i in range(most) for part in parts if len(part["samples"]) > i]
    for part, name in queue:
        file, row = folder / name, part["rows"][0]
        if file.stat().st_size > left:
            continue
        left -= file.stat().st_size
        setting = _setting(row["label"], row["mode"], row["steps"], row["nfe"], row["guidance"])
        seeded = f", seed {row['seed']}" if row["seed"] else ""
        video = f'<video controls preload="metadata" src="{_data(file, "video/mp4")}"></video>'
        figures.append(f"<figure>{video}<figcaption>{escape(setting + seeded)}</figcaption></figure>")
    rest = len(queue) - len(figures)
    note = f'<p class="quiet">{rest} more in {escape(str(folder / "samples"))}</p>' if rest else ""
    return f'<div class="samples">{"".join(figures)}</div>{note}'


def _missing(lines: Sequence[MetricRow]) -> str:
    """Metrics without a value in any setting, and what they need."""
    known = {line.metric for line in lines if line.value is not None}
    notes = {line.metric: line.note for line in lines if line.metric not in known}
    rows = "".join(
        f'<tr><td class="name">{escape(k)}</td><td class="name">{escape(v)}</td></tr>' for k, v in notes.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>' if rows else '<p class="quiet">Nothing.</p>'


def _data(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
