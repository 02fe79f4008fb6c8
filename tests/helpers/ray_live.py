"""The stand-in that flashes and beeps, on Ray Serve: ``python -m tests.helpers.ray_live FOLDER REPLICAS MOST``.

``FOLDER/makers/SEED`` has the process that made the last chunk of the session with that seed,
``FOLDER/loaded/PID`` exists for each process that has loaded the network.
"""

import os
import sys
from functools import partial
from pathlib import Path

from tests.helpers.flash_beep import FlashBeepTalker
from tests.helpers.random_exports import random_export
from workflows.serving.deployment import LiveArguments, serve_on_ray
from workflows.serving.engine import EngineLimits
from workflows.serving.server import ServerOptions
from workflows.serving.talker import Talker


class NotingTalker(FlashBeepTalker):
    """Stand-in that notes which process makes the chunks of a session."""

    makers: Path

    def advance(self, rows):
        """Return the latents, and note the process."""
        for row in rows:
            (self.makers / str(row.seed)).write_text(str(os.getpid()))
        return super().advance(rows)


def load(folder: Path) -> NotingTalker:
    """Return the stand-in; all replicas have the same network."""
    pipeline = Talker.from_checkpoint(str(folder / "export"), name="", steps=1, device="cpu").pipeline
    talker = NotingTalker(pipeline, name="flash-beep", steps=1)
    talker.makers = folder / "makers"
    (folder / "loaded" / str(os.getpid())).touch()
    return talker


if __name__ == "__main__":
    folder, replicas, most = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for name in ("makers", "loaded"):
        (folder / name).mkdir()
    random_export(folder, "mutual")
    serve_on_ray(
        ServerOptions(port=0, snapshots=str(folder / "snapshots"), limits=EngineLimits(sessions=2)),
        LiveArguments(checkpoint="flash-beep", sessions=2, replicas=replicas, max_replicas=most, snapshot_seconds=0.5),
        on_ready=lambda url: print(url, flush=True),
        load=partial(load, folder),
    )
