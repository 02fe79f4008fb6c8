"""A CUDA device without a GPU: its tensors have shape, dtype and device, but no data. CPU tensors are real.

Mixed devices, shapes that do not fit and reads of values raise errors, as far as torch's fake tensors know the kernels.
Backward passes are not run.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
CUDA, META = 1, 14  # torch/headeronly/core/DeviceType.h
aten = torch.ops.aten
READS = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select, aten._unique2)

ALLOCATIONS = (
    aten._unsafe_view,
    aten.empty,
    aten.new_empty,
    aten.empty_like,
    aten.empty_strided,
    aten.detach,
    aten.lift_fresh,
)


class HostSynchronizationError(AssertionError):
    """An operator makes the CPU wait for the GPU."""


class CpuGenerator(torch.Generator):
    """Generator on the CPU in place of the device, which would need a driver."""

    def __new__(cls, device="cpu"):
        """Ignore the device."""
        return super().__new__(cls, "cpu")


class FakeCuda(FakeTensorMode):
    """Mode in which tensors on ``DEVICE`` are fake.

    Attributes:
        kernels: Number of operators that run a kernel on the device.
        host_copies: Operators that copied from the CPU.
        blocking_copies: Those that wait until the copy is done.
        may_read: Reads are counted in ``reads`` instead of an error; those of a number return 0.
        cpu_masks: CPU masks that index a tensor of the device; their indices are copied, and the CPU waits.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._depth = 0
        self.cpu_masks = 0
        self.may_read = False
        self.reads = 0
        self.kernels = 0
        self.host_copies: list[str] = []
        self.blocking_copies: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator on fake tensors if one of them is on the device, else on real ones."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        is_fake = any(isinstance(x, FakeTensor) for x in tensors)
        if not is_fake and not any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves):
            return func(*args, **kwargs)
        if func is aten.index.Tensor:
            args = (args[0], self._indices(args[1]))
        if any(x.device.type == "cuda" for x in tensors) and func.overloadpacket in READS:
            if func.overloadpacket is aten._local_scalar_dense and self.may_read:
                self.reads += 1
                return torch.zeros((), dtype=args[0].dtype).item()
            raise HostSynchronizationError(f"{func} reads a value of the device")
        self._depth += 1
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._depth -= 1
        if not self._depth:  # not a part of another operator
            self._check_copies(func, args, kwargs, out)
            self.kernels += not func.is_view and func.overloadpacket not in ALLOCATIONS
        return out

    def _indices(self, indices) -> list:
        """Replace CPU masks by indices, as torch does before it copies them to the device."""
        found: list = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
                self.cpu_masks += 1
                found += index.nonzero().unbind(1)
            else:
                found.append(index)
        return found

    def _check_copies(self, func, args, kwargs, out) -> None:
        if func.overloadpacket not in (aten._to_copy, aten.copy_):
            return
        target, source = (out, args[0]) if func.overloadpacket is aten._to_copy else args[:2]
        non_blocking = kwargs.get("non_blocking", False) or (func.overloadpacket is aten.copy_ and len(args) > 2)
        if source.device.type == "cuda" and target.device.type == "cpu":
            if not self.may_read:
                raise HostSynchronizationError(f"{func} copies {tuple(source.shape)} to the CPU")
            self.reads += 1
        if source.device.type == "cpu" and target.device.type == "cuda":
            self.host_copies.append(f"{func} {tuple(source.shape)}")
            self.blocking_copies += [] if non_blocking else [f"{func} {tuple(source.shape)}"]


def give_gradients(loss: Tensor) -> None:
    """Give every weight in the graph of ``loss`` a gradient: the autograd engine needs a driver for CUDA."""
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        weight = getattr(node, "variable", None)
        if weight is not None:
            weight.grad = torch.empty_like(weight)
        pending += [before for before, _ in node.next_functions]


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Yield the mode, with autocast and gradients for the device also in a torch that is built without CUDA."""
    with (
        _device_guard(),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.Generator", CpuGenerator),
        mock.patch("torch.Tensor.backward", give_gradients),
        mock.patch("torch.nn.Module.float", lambda module: module),  # it swaps tensors, which fake ones refuse
        FakeCuda() as mode,
    ):
        yield mode


@contextmanager
def _device_guard() -> Iterator[None]:
    """Give CUDA the guard of the meta device, which does nothing: torch without CUDA has none."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = registry[CUDA]
    registry[CUDA] = before or registry[META]
    try:
        yield
    finally:
        registry[CUDA] = before
