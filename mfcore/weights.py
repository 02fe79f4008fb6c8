"""Weights of one network made from those of others: what a branch holds is named ``branches.<modality>.*``."""

from collections.abc import Mapping

from torch import Tensor, nn

Weights = Mapping[str, Tensor]
SHARD_BYTES = 5_000_000_000  # of a file


def shard_weights(name: str, weights: Weights, most: int = SHARD_BYTES) -> dict[str, dict[str, Tensor]]:
    """File names and what they hold: ``name.safetensors``, or ``name-00001-of-00003.safetensors`` and so on, whole
    tensors in their order, where one file would hold more than ``most`` bytes."""
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
    """The weights of one branch, under their full names."""
    prefix = f"branches.{modality}."
    return {name: value for name, value in weights.items() if name.startswith(prefix)}


def merge_branches(parts: Mapping[str, Weights]) -> dict[str, Tensor]:
    """A coupled network from uni-modal ones: each branch from the network of its modality.

    Coupling adds no weight: queries, keys and values of the branches meet in one attention (METHOD 4).
    """
    return {
        name: value for modality, weights in parts.items() for name, value in branch_weights(weights, modality).items()
    }


def load_strict(module: nn.Module, weights: Weights, source: str) -> None:
    """Every weight of ``module`` from ``weights`` and none left over. ValueError names all that do not fit."""
    own = dict(module.named_parameters())
    missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or foreign:
        parts = [
            f"{', '.join(names)} {where}" for names, where in ((missing, "missing"), (foreign, "unknown")) if names
        ]
        raise ValueError(f"{source} is of another network: {'; '.join(parts)}")
    check_shapes(own, weights, source)
    module.load_state_dict(dict(weights))


def check_shapes(own: Weights, others: Weights, source: str) -> None:
    """ValueError lists every weight of ``others`` that has another shape than ours."""
    wrong = [
        f"{name} {tuple(w.shape)} there, {tuple(own[name].shape)} here"
        for name, w in sorted(others.items())
        if w.shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{source} is of another size ({len(wrong)} weights): {'; '.join(wrong)}")
