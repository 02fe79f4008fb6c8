"""Model card as Markdown with the YAML header of the Hugging Face hub."""

from typing import Any

import yaml

from workflows.checkpoints.layout import PLOT_FILE
from workflows.checkpoints.packaged import CardMetric, ModelCard

PIPELINE_TAG = "image-to-video"  # the task of the hub that is closest to audio and video from a first frame
SHOWN_SWEEP_METRICS = 5  # columns of the table
_LANGUAGE_CODES = {"English": "en"}
_LICENSES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}


def render_card(card: ModelCard, *, has_plot: bool = False) -> str:
    """Return the README of an exported folder."""
    parts = [
        f"---\n{yaml.safe_dump(hub_header(card), sort_keys=False, allow_unicode=True)}---\n",
        f"# {card.name}\n\n{card.summary}\n",
        _facts(card),
        _usage(card),
        f"## Data\n\n{card.data}\n",
    ]
    if card.commands:
        commands = "\n".join(card.commands)
        parts.append(f"## Training\n\n```sh\n{commands}\n```\n")
    parts += [_metrics(card), _sweep(card, has_plot=has_plot)]
    if card.limits:
        parts.append("## Limits\n\n" + "\n".join(f"- {limit}" for limit in card.limits) + "\n")
    return "\n".join(part for part in parts if part)


def hub_header(card: ModelCard) -> dict[str, Any]:
    """Return the fields of the YAML header; see the model card specification of the hub."""
    header: dict[str, Any] = {"license": _LICENSES.get(card.license, card.license)}
    if card.language in _LANGUAGE_CODES:
        header["language"] = _LANGUAGE_CODES[card.language]
    header |= {
        "library_name": "mutual-forcing",
        "pipeline_tag": PIPELINE_TAG,
        "tags": ["audio-video", "streaming", "autoregressive", "mutual-forcing", f"stage:{card.stage}"],
    }
    if card.metrics:
        dataset = {"name": f"held-out clips ({card.dataset or card.name})", "type": card.dataset or card.name}
        metrics = [{"type": name, "value": round(metric.value, 4)} for name, metric in card.metrics.items()]
        result = {"task": {"type": PIPELINE_TAG}, "dataset": dataset, "metrics": metrics}
        header["model-index"] = [{"name": card.name, "results": [result]}]
    return header


def _facts(card: ModelCard) -> str:
    rows = {
        "language": card.language,
        "stage": card.stage,
        "parameters": f"{card.parameters / 1e6:.2f} million",
        "clips seen in training": None if card.samples_seen is None else f"{card.samples_seen:,}",
        "training": None
        if card.training_hours is None
        else f"{card.training_hours:g} hours on {card.training_machine or 'a machine that is not recorded'}",
        "dataset fingerprint": None if card.dataset is None else f"`{card.dataset}`",
        "license": card.license,
    }
    return "\n".join(["| | |", "|-|-|", *(f"| {name} | {value} |" for name, value in rows.items() if value), ""])


def _usage(card: ModelCard) -> str:
    speech = '"Nice to meet you."' if card.language == "English" else '"hello there", first_frame="face.png"'
    return f"""## Use

```python
from workflows.inference.pipeline import StreamingPipeline

pipeline = StreamingPipeline.from_pretrained("{card.name}")  # this folder
pipeline({speech}).save("clip.mp4")
```

`mfctl generate FOLDER clip.mp4 --transcript TEXT` does the same.
"""


def _metrics(card: ModelCard) -> str:
    if not card.metrics:
        return ""
    lines = ["## Metrics\n", "| metric | model | 90% interval | real clips |", "|-|-|-|-|"]
    lines += [
        f"| `{name}` | {_number(m.value)} | {_interval(m)} | {_number(m.real)} |" for name, m in card.metrics.items()
    ]
    if (facts := card.evaluation) is not None:
        setting = f"{facts.clips} held-out clips, {facts.seeds} noise seeds, mode {facts.mode}, {facts.steps} steps"
        commands = "\n".join(facts.commands)
        lines.append(f"\nReal clips are encoded and decoded. {setting}:\n\n```sh\n{commands}\n```")
    return "\n".join(lines) + "\n"


def _sweep(card: ModelCard, *, has_plot: bool) -> str:
    if not card.sweep:
        return ""
    names = list(card.sweep[0].metrics)[:SHOWN_SWEEP_METRICS]
    lines = ["## Quality against function evaluations\n"]
    if has_plot:
        lines.append(f"![Quality against function evaluations per chunk]({PLOT_FILE})\n")
    lines += [
        f"| mode | steps | NFE per chunk | {' | '.join(f'`{name}`' for name in names)} |",
        "|-" * (3 + len(names)) + "|",
    ]
    for point in card.sweep:
        values = " | ".join(_number(point.metrics.get(name)) for name in names)
        lines.append(f"| {point.mode} | {point.steps} | {point.nfe} | {values} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _interval(metric: CardMetric) -> str:
    return "" if metric.low is None or metric.high is None else f"{metric.low:.3g} to {metric.high:.3g}"
