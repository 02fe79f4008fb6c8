"""Weights of one network made from those of others: what a branch holds is named ``branches.<modality>.*``."""

from collections.abc import Mapping

from torch import Tensor, nn

Weights = Mapping[str, Tensor]


def branch_weights(weights: Weights, modality: str) -> dict[str, Tensor]:
    """The weights of one branch, under their full names."""
    prefix = f"branches.{modality}."
    return {name: value for name, value in weights.items() if name.startswith(prefix)}


def joined(parts: Mapping[str, Weights]) -> dict[str, Tensor]:
    """A coupled network from uni-modal ones: each branch from the network of its modality.

    Coupling adds no weight: queries, keys and values of the branches meet in one attention (METHOD 4).
    """
    return {
        name: value for modality, weights in parts.items() for name, value in branch_weights(weights, modality).items()
    }


def load_strict(module: nn.Module, weights: Weights, source: str) -> None:
    """Every weight of ``module`` from ``weights`` and none left over. ValueError names the first that does not fit."""
    own = dict(module.named_parameters())
    odd = sorted(own.keys() ^ weights.keys())
    wrong = [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if odd:
        where = "is missing in" if odd[0] in own else "stands only in"
        raise ValueError(f"{source} is of another network: {odd[0]} {where} it ({len(odd)} such weights)")
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"{source} is of another size: {name} is {tuple(weights[name].shape)} there, {tuple(own[name].shape)} here"
        )
    module.load_state_dict(dict(weights))
