"""Engine on DeepSpeed, ZeRO stages 0 to 3."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mfcore.ema import ReplicatedWeights, WeightAccess
from mfcore.optim import OptimConfig, build_adamw
from mfcore.types import VelocityModel
from workflows.config.run import EngineConfig
from workflows.training.engines import zero3
from workflows.training.engines.gradients import NonFiniteGradientDetector, set_lr, trainable_parameters
from workflows.training.engines.state import MOMENTS, ShardedStateReader, StateShard, shard_state

LARGEST_BUCKET = 500_000_000  # elements that DeepSpeed gathers before it sends gradients; it allocates them all at once
UNPARTITIONED_BELOW = 100_000  # elements: smaller weights stay gathered on every rank at ZeRO-3


class DeepSpeedEngine:
    """DeepSpeed at ZeRO stage 0 to 3 around the same torch AdamW."""

    def __init__(self, module: nn.Module, optim: OptimConfig, config: EngineConfig) -> None:
        self._ds = _deepspeed()
        self._zero = config.zero_stage
        self._optim = optim
        self._trained = trainable_parameters(module)
        self._gradient_detector = NonFiniteGradientDetector(self._trained.values())
        self._optimizer = build_adamw(module, optim)
        with contextlib.redirect_stdout(sys.stderr):
            self._engine, *_ = self._ds.initialize(
                model=module, optimizer=self._optimizer, config=self._settings(config), dist_init_required=False
            )
        if self._zero == 3:
            zero3.patch_zero3_linear(self._ds)
        self._norm = 0.0
        self._steps = 0
        if self._zero == 0:  # DeepSpeed does not report the norm at stage 0, so clip in a hook
            self._optimizer.register_step_pre_hook(self._clip)

    def _settings(self, config: EngineConfig) -> dict[str, Any]:
        offload = {"offload_optimizer": {"device": "cpu"}} if config.offload_optimizer else {}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "managed_gradient_accumulation": False,  # the training loop ends steps
            "gradient_clipping": self._optim.clip if self._zero else 0.0,
            "zero_optimization": {
                "stage": self._zero,
                "overlap_comm": False,
                "reduce_bucket_size": min(LARGEST_BUCKET, sum(p.numel() for p in self._trained.values())),
                "stage3_param_persistence_threshold": UNPARTITIONED_BELOW,
                **offload,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # it needs a compiler; torch takes the same steps
            "torch_autocast": {
                "enabled": config.autocast is not None,
                "dtype": "bfloat16",
                # ranks exchange float32: otherwise gathered weights (EMA, export) are rounded
                "lower_precision_safe_modules": [],
            },
        }

    def _clip(self, *_: Any) -> None:
        self._norm = float(nn.utils.clip_grad_norm_(self._engine.module.parameters(), self._optim.clip))

    @property
    def module(self) -> VelocityModel:
        """The network, called through this engine."""
        return cast(VelocityModel, self._engine)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's loss."""
        self._engine.backward(loss, scale_wrt_gas=False)

    @property
    def has_non_finite_gradient(self) -> Tensor:
        """Boolean scalar: a gradient of this rank since the last step was not finite."""
        return self._gradient_detector.flag

    def step(self, lr: float) -> float:
        """Average the gradients, clip, update and clear them. Return the norm before clipping."""
        set_lr(self._optimizer, lr)
        self._engine.step()
        self._gradient_detector.clear()
        self._steps += 1
        return self._norm if self._zero == 0 else float(self._engine.get_global_grad_norm())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each trained parameter with its full float32 value."""
        for name, p in self._trained.items():
            with self._gathered(p):
                yield name, p.detach()

    @property
    def frozen_weight_access(self) -> WeightAccess:
        """Access to the weights that are not trained."""
        return zero3.Zero3ParameterAccess(self._ds) if self._zero == 3 else ReplicatedWeights()

    def _gathered(self, p: nn.Parameter, *, change: bool = False) -> contextlib.AbstractContextManager[Any]:
        """Gather the parameter while the block runs; with ``change``, keep what rank 0 writes into it."""
        return zero3.gathered(self._ds, p, change=change) if self._zero == 3 else contextlib.nullcontext()

    def discard_gradients(self) -> None:
        """Run a DeepSpeed step without the update: it clears the buffers of every ZeRO stage."""
        with _disabled_step(self._optimizer):
            self._engine.step()
        self._gradient_detector.clear()

    def state_shard(self) -> StateShard:
        """Return a copy of this rank's shard of weights and moments."""
        if self._steps:
            self._link_moments()
        return shard_state(self._tensors(), self._steps)

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, p in self._trained.items():
            with self._gathered(p):
                yield "weight", name, p.detach()
            for key in MOMENTS if self._steps else ():
                yield key, name, self._moment(p, key)

    def _moment(self, p: nn.Parameter, key: str) -> Tensor:
        if self._zero == 0:
            return self._optimizer.state[p][key]
        return self._ds.utils.safe_get_full_optimizer_state(p, key)

    @torch.no_grad()
    def load(self, folder: Path, name: str) -> None:
        """Load the state of network ``name``."""
        state = ShardedStateReader(folder, name)
        state.check_shapes(self._shapes())
        if state.steps:
            self._start_moments(state.steps)
            self._link_moments()
        for key, p in self._trained.items():
            value = state.read("weight", key).to(p.device)
            with self._gathered(p, change=True):
                p.copy_(value)
            self._write_shard(p, value)
            for moment in MOMENTS if state.has("exp_avg", key) else ():
                self._write_shard(p, state.read(moment, key).to(value.device), moment)
        self._steps = state.steps

    def _shapes(self) -> dict[str, torch.Size]:
        return {n: torch.Size(getattr(p, "ds_shape", p.shape)) for n, p in self._trained.items()}

    def _write_shard(self, p: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Set this rank's shard of the float32 weight (no key) or of a moment."""
        tools = self._ds.utils
        if self._zero == 0:
            if key:
                self._optimizer.state[p][key].copy_(value)
        elif self._zero == 3:
            shard = zero3.local_shard(value)
            if key:
                tools.safe_set_local_optimizer_state(p, shard, key)
            else:
                tools.safe_set_local_fp32_param(p, shard)
        elif key:
            tools.safe_set_full_optimizer_state(p, value, key)
        else:
            tools.safe_set_full_fp32_param(p, value)

    def _start_moments(self, steps: int) -> None:
        """Create zero moments at ``steps``: DeepSpeed creates them in its first step, after a load."""
        if self._zero == 3:
            flats = self._engine.optimizer.fp32_partitioned_groups_flat
        else:
            flats = [p for group in self._optimizer.param_groups for p in group["params"]]
        for flat in flats:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self._optimizer.state[flat] = {"step": torch.tensor(float(steps)), **moments}

    def _link_moments(self) -> None:
        """Link the moments of all parameter groups for DeepSpeed's per-parameter access.

        DeepSpeed links them once, after the first step of the first group, before those of other groups exist.
        """
        if self._zero in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


@contextlib.contextmanager
def _disabled_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Replace `optimizer.step` by a function without effect while the block runs."""

    def skip_update(closure: Any = None) -> None:
        del closure

    hidden: Any = optimizer
    hidden.step = skip_update  # an attribute of the instance hides the method
    try:
        yield
    finally:
        del hidden.step


def _deepspeed() -> Any:
    """Return the module, without its compilers; its messages go to stderr, since stdout carries ``--json``."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # otherwise a C++ compiler runs for minutes at the first start
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed.* is deprecated")
    with contextlib.redirect_stdout(sys.stderr):
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return deepspeed
