"""Process of one part of ``mfctl bench gpu``: ``python -m workflows.bench.gpu.worker PART --device cuda``."""

import importlib
import sys

from workflows.utils import case_worker

PART_MODULES = {
    "facts": "workflows.bench.gpu.facts",
    "parity": "workflows.bench.gpu.parity",
    "stream": "workflows.bench.gpu.streaming",
    "train": "workflows.bench.gpu.training",
    "profile": "workflows.bench.gpu.profiling",
}


def main() -> int:
    """Run the part that the first argument names."""
    part, *words = sys.argv[1:]
    module = importlib.import_module(PART_MODULES[part])
    return case_worker.main(module.cases, words, needs_device=part != "facts")


if __name__ == "__main__":
    sys.exit(main())
