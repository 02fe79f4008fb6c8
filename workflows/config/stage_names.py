"""Names of the training stages, in a module that loads no torch."""

from typing import Literal

Stage = Literal["video", "audio", "joint", "mutual"]
