"""Weights by name: shards of a file, merged branches, strict loading. A branch is ``branches.<modality>.*``."""

from collections.abc import Mapping

from torch import Tensor, nn

from mfcore.errors import UserInputError

Weights = Mapping[str, Tensor]
SHARD_BYTES = 5_000_000_000  # default size limit of a file


def shard_weights(name: str, weights: Weights, most: int = SHARD_BYTES) -> dict[str, dict[str, Tensor]]:
    """Split weights into files of at most ``most`` bytes; tensors stay whole and in order.

    Returns the weights per file name: ``name.safetensors``, or ``name-00001-of-00003.safetensors`` for several files.
    """
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, weight in weights.items():
        if parts[-1] and size + weight.nbytes > most:
            parts.append({})
            size = 0
        parts[-1][key] = weight
        size += weight.nbytes
    if len(parts) == 1:
        return {f"{name}.safetensors": parts[0]}
    return {f"{name}-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def branch_weights(weights: Weights, modality: str) -> dict[str, Tensor]:
    """Return the weights of one branch, with their full names."""
    prefix = f"branches.{modality}."
    return {name: value for name, value in weights.items() if name.startswith(prefix)}


def merge_branches(parts: Mapping[str, Weights]) -> dict[str, Tensor]:
    """Return the weights of a coupled network: each branch from the network of its modality.

    Coupling adds no weight, because the branches share one attention (METHOD 4).
    """
    merged: dict[str, Tensor] = {}
    for modality, weights in parts.items():
        merged |= branch_weights(weights, modality)
    return merged


def load_strict(module: nn.Module, weights: Weights, source: str) -> None:
    """Load ``weights`` into ``module``. Raises ValueError with all missing, unknown and misshaped names."""
    own = dict(module.named_parameters())
    missing = sorted(own.keys() - weights.keys())
    unknown = sorted(weights.keys() - own.keys())
    parts = [f"{', '.join(missing)} missing"] if missing else []
    if unknown:
        parts.append(f"{', '.join(unknown)} unknown")
    if parts:
        raise UserInputError(f"{source} is of another network: {'; '.join(parts)}")
    check_shapes(own, weights, source)
    module.load_state_dict(dict(weights))


def check_shapes(own: Weights, others: Weights, source: str) -> None:
    """Raise ValueError with every weight of ``others`` that has another shape in ``own``."""
    wrong = [
        f"{name} {tuple(w.shape)} there, {tuple(own[name].shape)} here"
        for name, w in sorted(others.items())
        if w.shape != own[name].shape
    ]
    if wrong:
        raise UserInputError(f"{source} is of another size ({len(wrong)} weights): {'; '.join(wrong)}")
