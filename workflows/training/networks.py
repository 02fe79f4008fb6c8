"""Networks and engines of a run: student, EMA and, in the mutual stage, the fake score."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from mfcore.ema import Ema
from mfcore.model.compile import EAGER, check_compiler, compile_block
from mfcore.model.init import initial_cross_bias
from mfcore.model.lora import LoRAModel
from mfcore.model.transformer import build_model, find_transformers
from mfcore.optim import OptimConfig
from mfcore.types import AUDIO, VIDEO
from mfcore.weights import load_strict, merge_branches
from workflows.config.run import EngineConfig, RunConfig
from workflows.config.stage_names import Stage
from workflows.config.stages import STAGES
from workflows.training.engines.base import Engine, build_engine
from workflows.training.pretrained_init import load_wan_weights
from workflows.utils import distributed


@dataclass(frozen=True, kw_only=True)
class TrainingNetworks:
    """Trained networks of a stage by name, and the EMA of its student."""

    ema: Ema
    engines: dict[str, Engine]
    optims: dict[str, OptimConfig]
    nets: dict[str, nn.Module]  # trained by the engines

    @contextmanager
    def record_non_finite(self) -> Iterator[dict[str, str]]:
        """Record, by network, the first block with non-finite activations inside the context."""
        first: dict[str, str] = {}
        # the EMA comes last: it may be part of the fake score too
        parts = [
            (name, part)
            for name, net in (*self.nets.items(), ("ema", self.ema.module))
            for part in find_transformers(net)
        ]
        for name, part in parts:
            part.guard = partial(first.setdefault, name)
        try:
            yield first
        finally:
            for _, part in parts:
                part.guard = None


def build_training_networks(config: RunConfig, student: nn.Module) -> TrainingNetworks:
    """Return the engines of ``student`` and, if the stage has one, of a fake score."""
    ema = Ema(student, config.ema, config.engine.autocast)
    nets = {"student": student}
    optims = {"student": config.optim}
    if "fake" in STAGES[config.stage].trained:
        assert config.fake_optim is not None, "the configuration has been checked"
        nets["fake"] = build_fake_score(config, student, ema)
        optims["fake"] = config.fake_optim
    configure_networks([*nets.values(), ema.module], config.engine)
    engines = {name: build_engine(net, optims[name], config.engine) for name, net in nets.items()}
    if "fake" in nets and config.fake.rank is not None:
        ema.storage = engines["fake"].frozen_weight_access  # the EMA is the frozen base of the fake score
    return TrainingNetworks(ema=ema, engines=engines, optims=optims, nets=nets)


def configure_networks(nets: Iterable[nn.Module], engine: EngineConfig) -> None:
    """Configure compilation, recomputation and sequence parallelism. Called by all ranks.

    Raises CompilerNotFoundError if blocks cannot be compiled.
    """
    if engine.compile:
        check_compiler(distributed.local_device())
    sequence = distributed.new_sequence_parallel_group(engine.sequence)
    for net in nets:
        for part in find_transformers(net):
            part.recompute, part.sequence = engine.recompute, sequence
            part.code = compile_block() if engine.compile else EAGER


def build_fake_score(config: RunConfig, student: nn.Module, ema: Ema) -> nn.Module:
    """Return a network equal to the EMA at the start: low-rank terms on the EMA, or a full copy."""
    if config.fake.rank is None:
        return copy.deepcopy(student)
    return LoRAModel(ema.module, config.fake, config.seed)


def build_initial_network(config: RunConfig, parents: Mapping[Stage, Path]) -> nn.Module:
    """Return the student before step 1: EMA weights of the parents, or random weights and ``init_video``.

    A single parent, of the stage before or of the same stage, gives all weights.
    """
    model = build_model(config.model, config.seed)
    if config.init_video:
        load_wan_weights(model, config.model, config.init_video)
    if not parents:
        return model
    from workflows.checkpoints.load import load_weights  # pydantic: not needed by `mfctl bench gpu`

    weights = {stage: load_weights(path) for stage, path in parents.items()}
    if config.stage == "joint" and "joint" not in weights:
        start = initial_cross_bias(model, config.model.cross_bias or 0.0)
        merged = merge_branches({VIDEO: weights["video"], AUDIO: weights["audio"]})
        load_strict(model, start | merged, "the two parents")
    else:
        parent = next(iter(weights.values()))
        missing = initial_cross_bias(model, 0.0)  # of a network without the bias
        load_strict(model, missing | parent, str(next(iter(parents.values()))))
    return model
