"""`mfctl models`: list the models of the Python package."""

from typing import Any

from workflows.cli import output
from workflows.cli.options import JsonFlag

SHOWN_METRICS = 6  # per model, without --json


def models(*, json: JsonFlag = False) -> None:
    """List the packaged models with the facts of their cards. Their names are valid checkpoints.

    Example: mfctl models
    """

    def work() -> Any:
        from workflows.checkpoints.packaged import list_models

        return list_models()

    output.run_command(work, as_json=json, render=format_models)


def format_models(found: dict[str, Any]) -> str:
    """Return a paragraph per model."""
    paragraphs: list[str] = []
    for model in found["models"]:
        metrics = list(model["metrics"].items())[:SHOWN_METRICS]
        facts = {
            "stage": model["stage"],
            "parameters": f"{model['parameters'] / 1e6:.2f} million",
            "size": f"{model['bytes'] / 1e6:.1f} MB",
            "language": model["language"],
            "training": f"{model['training_hours']:g} hours on {model['training_machine']}",
            "license": model["license"],
            "metrics": ", ".join(f"{name} {_value(metric)}" for name, metric in metrics) or "none",
            "card": f"{model['path']}/README.md",
        }
        lines = [f"{model['name']}: {model['summary']}", *(f"  {name:<12}{value}" for name, value in facts.items())]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs) or "no packaged models"


def _value(metric: dict[str, Any]) -> str:
    real = metric.get("real")
    return f"{metric['value']:.3g}" + ("" if real is None else f" (real clips {real:.3g})")
