"""What trains one network on the ranks of a run: plain PyTorch, or DeepSpeed. The only file that imports deepspeed.

Both keep float32 weights and moments; "bf16" computes the network under autocast. Both save the same state: whole
float32 tensors by parameter name, every rank its share of the parameters, as safetensors. So a run resumes under
another engine, ZeRO stage or number of ranks, and nothing pickled is ever read.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mfcore.optim import OptimConfig, adamw
from mfcore.types import VelocityModel
from workflows import ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a run is spread over processes."""

    kind: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 1  # what DeepSpeed shards: nothing, moments, + gradients, + weights
    precision: Literal["fp32", "bf16"] = "fp32"  # of the network's arithmetic; weights and moments stay float32
    workers: int = 2  # processes: one per GPU, or CPU processes that share the cores
    use_gpu: bool = False
    max_failures: int = 2  # restarts from the latest checkpoint before the run is given up

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"a run needs at least one worker, got {self.workers}")


class NonFiniteError(ValueError):
    """A loss or gradient that is not a number, raised on every rank before the weights move."""


class Engine(Protocol):
    """One network, its optimizer, and the ranks they are spread over. Every method is called by all ranks together."""

    @property
    def module(self) -> VelocityModel:
        """The network; calls go through the engine's wrapper."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's loss."""
        ...

    @property
    def bad_gradient(self) -> Tensor:
        """Flag: a gradient of this rank, since the last step, was not finite."""
        ...

    def step(self, lr: float) -> float:
        """Average the gradients over the ranks, clip, update, clear. Returns the norm before clipping."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with its full float32 value; all ranks must walk to the end."""
        ...

    def save(self, folder: Path, name: str) -> list[Path]:
        """Write this rank's share of weights and moments; returns the files."""
        ...

    def load(self, folder: Path, name: str) -> None:
        """Read what any number of ranks saved."""
        ...


def build_engine(module: nn.Module, optim: OptimConfig, config: EngineConfig) -> Engine:
    """The engine of one network, whose weights must be equal on all ranks."""
    if config.kind == "torch":
        return TorchEngine(module, optim, config)
    return DeepSpeedEngine(module, optim, config)


class TorchEngine:
    """Plain PyTorch: gradients as one flat vector, averaged over the ranks, torch AdamW."""

    def __init__(self, module: nn.Module, optim: OptimConfig, config: EngineConfig) -> None:
        self._net = module
        self._optim = optim
        self._autocast = config.precision == "bf16"
        self._trainable = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = adamw(module, optim)
        self._watch = GradientWatch(self._trainable)
        self._steps = 0

    @property
    def module(self) -> VelocityModel:
        return cast(VelocityModel, self._call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self._trainable[0].device.type, torch.bfloat16, enabled=self._autocast):
            return self._net(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @property
    def bad_gradient(self) -> Tensor:
        return self._watch.flag

    def step(self, lr: float) -> float:
        flat = ranks.mean(_flat([_gradient(p) for p in self._trainable]))
        norm = flat.norm()
        flat *= (self._optim.clip / (norm + 1e-6)).clamp(max=1.0)
        for p, gradient in zip(self._trainable, flat.split([p.numel() for p in self._trainable]), strict=True):
            p.grad = gradient.view_as(p)
        _set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._watch.clear()
        self._steps += 1
        return float(norm)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p.detach()) for name, p in self._net.named_parameters())

    def save(self, folder: Path, name: str) -> list[Path]:
        return save_share(folder, name, self._tensors(), self._steps)

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, p in self._net.named_parameters():
            yield "weight", name, p.detach()
            for key in MOMENTS if p in self._optimizer.state else ():
                yield key, name, self._optimizer.state[p][key]

    def load(self, folder: Path, name: str) -> None:
        state = SavedState(folder, name)
        state.check({n: p.shape for n, p in self._net.named_parameters()})
        for key, p in self._net.named_parameters():
            p.data.copy_(state.read("weight", key))
            if state.has("exp_avg", key):
                moments = {moment: state.read(moment, key).to(p.device) for moment in MOMENTS}
                self._optimizer.state[p] = {"step": torch.tensor(float(state.steps)), **moments}
        self._steps = state.steps


class DeepSpeedEngine:
    """DeepSpeed at ZeRO stage 0 to 3 around the same torch AdamW."""

    def __init__(self, module: nn.Module, optim: OptimConfig, config: EngineConfig) -> None:
        self._ds = _deepspeed()
        self._zero = config.zero_stage
        self._optim = optim
        self._watch = GradientWatch([p for p in module.parameters() if p.requires_grad])
        self._optimizer = adamw(module, optim)
        with contextlib.redirect_stdout(sys.stderr):
            self._engine, *_ = self._ds.initialize(
                model=module, optimizer=self._optimizer, config=self._settings(config), dist_init_required=False
            )
        self._norm = 0.0
        self._steps = 0
        if self._zero == 0:  # DeepSpeed does not report the norm at stage 0: clip where it can be seen
            self._optimizer.register_step_pre_hook(self._clip)

    def _settings(self, config: EngineConfig) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            "managed_gradient_accumulation": False,  # we say when a step ends
            "gradient_clipping": self._optim.clip if self._zero else 0.0,
            "zero_optimization": {"stage": self._zero, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        }

    def _clip(self, *_: Any) -> None:
        self._norm = float(nn.utils.clip_grad_norm_(self._engine.module.parameters(), self._optim.clip))

    @property
    def module(self) -> VelocityModel:
        return cast(VelocityModel, self._engine)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    @property
    def bad_gradient(self) -> Tensor:
        return self._watch.flag

    def step(self, lr: float) -> float:
        _set_lr(self._optimizer, lr)
        self._engine.step()
        self._watch.clear()
        self._steps += 1
        return self._norm if self._zero == 0 else float(self._engine.get_global_grad_norm())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self._engine.module.named_parameters():
            with self._whole(p):
                yield name, p.detach()

    def _whole(self, p: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
        """The parameter unsharded (a change made inside, the same on all ranks, is kept)."""
        return self._ds.zero.GatheredParameters([p], modifier_rank=0) if self._zero == 3 else contextlib.nullcontext()

    def save(self, folder: Path, name: str) -> list[Path]:
        if self._steps:
            self._link_moments()
        return save_share(folder, name, self._tensors(), self._steps)

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, p in self._engine.module.named_parameters():
            with self._whole(p):
                yield "weight", name, p.detach()
            for key in MOMENTS if self._steps and p.requires_grad else ():
                yield key, name, self._moment(p, key)

    def _moment(self, p: nn.Parameter, key: str) -> Tensor:
        if self._zero == 0:
            return self._optimizer.state[p][key]
        return self._ds.utils.safe_get_full_optimizer_state(p, key)

    @torch.no_grad()
    def load(self, folder: Path, name: str) -> None:
        state = SavedState(folder, name)
        state.check(self._shapes())
        if state.steps:
            self._start_moments(state.steps)
            self._link_moments()
        for key, p in self._engine.module.named_parameters():
            value = state.read("weight", key).to(p.device)
            with self._whole(p):
                p.copy_(value)
            if p.requires_grad:
                self._put(p, value)
            for moment in MOMENTS if state.has("exp_avg", key) else ():
                self._put(p, state.read(moment, key).to(value.device), moment)
        self._steps = state.steps

    def _shapes(self) -> dict[str, torch.Size]:
        return {n: torch.Size(getattr(p, "ds_shape", p.shape)) for n, p in self._engine.module.named_parameters()}

    def _put(self, p: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Set this rank's part of the float32 weight (no key) or of a moment."""
        tools = self._ds.utils
        if self._zero == 0:
            if key:
                self._optimizer.state[p][key].copy_(value)
        elif self._zero == 3:
            part = -(-value.numel() // ranks.world())
            flat = nn.functional.pad(value.flatten(), (0, part * ranks.world() - value.numel()))
            mine = flat.narrow(0, part * ranks.rank(), part)
            if key:
                tools.safe_set_local_optimizer_state(p, mine, key)
            else:
                tools.safe_set_local_fp32_param(p, mine)
        elif key:
            tools.safe_set_full_optimizer_state(p, value, key)
        else:
            tools.safe_set_full_fp32_param(p, value)

    def _start_moments(self, steps: int) -> None:
        """Zero moments at ``steps``: DeepSpeed makes them at its first step only, and a load comes before it."""
        if self._zero == 3:
            flats = self._engine.optimizer.fp32_partitioned_groups_flat
        else:
            flats = [p for group in self._optimizer.param_groups for p in group["params"]]
        for flat in flats:
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self._optimizer.state[flat] = {"step": torch.tensor(float(steps)), **moments}

    def _link_moments(self) -> None:
        """Let DeepSpeed's per-parameter access see the moments of all groups.

        It links them once, after the first step of the *first* group, when those of other groups do not exist yet.
        """
        if self._zero in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _deepspeed() -> Any:
    """The module, with its compilers off and its chatter away from standard output (which carries ``--json``)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # else a C++ compiler runs for minutes at the first start
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed.* is deprecated")
    with contextlib.redirect_stdout(sys.stderr):
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return deepspeed


class GradientWatch:
    """Looks at every gradient as it is made, before an engine shards or averages it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.flag = torch.zeros((), dtype=torch.bool, device=parameters[0].device)
        for p in parameters:
            p.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        self.flag |= ~torch.isfinite(gradient).all()

    def clear(self) -> None:
        self.flag.zero_()


def _gradient(p: nn.Parameter) -> Tensor:
    """A weight the losses did not touch has gradient zero (as under ZeRO), so it decays alike in all engines."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def save_share(folder: Path, name: str, tensors: Iterator[tuple[str, str, Tensor]], steps: int) -> list[Path]:
    """Write those of ``tensors`` (kind, parameter, value; the same walk on all ranks) that fall to this rank."""
    share: dict[str, Tensor] = {}
    turn: dict[str, int] = {}
    for kind, parameter, value in tensors:
        if turn.setdefault(parameter, len(turn)) % ranks.world() == ranks.rank():
            share[f"{kind}/{parameter}"] = value.float().cpu().clone()
    path = folder / f"{name}-{ranks.rank():05d}-of-{ranks.world():05d}.safetensors"
    save_file(share, path, metadata={"steps": str(steps)})
    return [path]


class SavedState:
    """What ``save_share`` wrote on all ranks, read tensor by tensor."""

    def __init__(self, folder: Path, name: str) -> None:
        files = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no state of the network {name!r}")
        self._where: dict[str, Any] = {}
        self.steps = 0
        for path in files:
            handle = safe_open(path, framework="pt")
            self.steps = int(handle.metadata()["steps"])
            self._where |= dict.fromkeys(handle.keys(), handle)
        self._folder = folder

    def has(self, kind: str, parameter: str) -> bool:
        return f"{kind}/{parameter}" in self._where

    def read(self, kind: str, parameter: str) -> Tensor:
        return self._where[f"{kind}/{parameter}"].get_tensor(f"{kind}/{parameter}")

    def check(self, shapes: dict[str, torch.Size]) -> None:
        """Names and shapes must be the network's own."""
        saved = {key.removeprefix("weight/"): h for key, h in self._where.items() if key.startswith("weight/")}
        if saved.keys() != shapes.keys():
            odd = sorted(saved.keys() ^ shapes.keys())[:3]
            raise ValueError(f"{self._folder} holds the state of another network: {', '.join(odd)} ... differ")
        for name, handle in saved.items():
            shape = tuple(handle.get_slice(f"weight/{name}").get_shape())
            if shape != tuple(shapes[name]):
                raise ValueError(f"{self._folder}: {name} is {shape} there and {tuple(shapes[name])} here")
