"""Attention: the three backends agree, and the visibility is that of METHOD 4."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mfcore.model.attention import AttentionVisibility, additive_mask, attend
from mfcore.solver import DenoiserContext, constant_levels
from mfcore.types import AUDIO, VIDEO
from tests.helpers.tiny_model import batch, network
from workflows.bench.gpu.parity import noisy_visibility, random_qkv


def test_a_chunk_sees_its_window_and_itself():
    visible = noisy_visibility().dense()
    for q in range(len(noisy_visibility().chunk)):
        k = torch.arange(35) // 7
        history = [(q // 7 - int(c)) in (1, 2) for c in k]
        assert visible[q].tolist() == history + [int(c) == q // 7 for c in k]


@pytest.mark.parametrize(
    ("groups", "dtype", "tolerance"),
    [(4, torch.float32, 1e-5), (2, torch.float32, 1e-5), (4, torch.bfloat16, 2e-2), (1, torch.bfloat16, 2e-2)],
)
@torch.no_grad()
def test_backends_differ_by_less_than_the_noise_of_the_type(groups, dtype, tolerance):
    visible = noisy_visibility()
    q, k, v = random_qkv(visible, dtype, groups=groups)
    dense, flex = attend(q, k, v, visible.mask("sdpa", q.device)), attend(q, k, v, visible.blocks(q.device))
    assert dense.dtype == flex.dtype == dtype
    torch.testing.assert_close(flex, dense, atol=tolerance, rtol=tolerance)
    keys, values = (x.float().repeat_interleave(4 // groups, 1) for x in (k, v))
    logits = (q.float() @ keys.mT / 4).masked_fill(~visible.dense(), -torch.inf)
    torch.testing.assert_close(dense.float(), logits.softmax(-1) @ values, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_an_additive_mask_gives_bit_equal_attention():
    visible = noisy_visibility()
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = random_qkv(visible, dtype)
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible.dense())
        assert torch.equal(attend(q, k, v, additive_mask(visible.dense())), plain)


class Called(TorchDispatchMode):
    """Names of the operators that run in the context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_layer_copies_no_heads_and_builds_no_mask(monkeypatch):
    """Require that only the attention output is copied, once per branch."""
    model, data = network(layers=3), batch(2, 4)
    context = DenoiserContext(model=model, cond=data.cond).append_history(data.streams, None)
    t = constant_levels(data.streams, dict.fromkeys(data.streams, 0.6))
    calls, run_layer = [], model.run_layer

    def recorded(*args):
        calls.append(args)
        return run_layer(*args)

    monkeypatch.setattr(model, "run_layer", recorded)
    context.velocity(data.streams, t, t)
    with Called() as called:
        run_layer(*calls[-1])
    assert called.names.count("clone") <= len(data.streams) + 1  # plus the sink keys per chunk
    assert not {"where", "masked_fill", "masked_fill_", "bitwise_not"} & set(called.names)


@torch.no_grad()
def test_statistics_of_the_softmax_are_float32_for_bfloat16():
    """Use a thousand equal keys: a bfloat16 sum stops growing at 256."""
    q, k = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16), torch.zeros(1, 1, 1000, 16, dtype=torch.bfloat16)
    v = torch.ones(1, 1, 1000, 16, dtype=torch.bfloat16)
    assert torch.equal(attend(q, k, v, None), torch.ones_like(q))


@pytest.mark.parametrize("changes", [{}, {"coupled": False}], ids=str)
@torch.no_grad()
def test_the_network_agrees_between_backends(changes, monkeypatch):
    """Run parallel passes over history and noisy chunks, coupled and uncoupled."""
    model, data = network(**changes), batch(rows=2, chunks=4)
    t = constant_levels(data.streams, dict.fromkeys(data.streams, 0.6))

    def velocities() -> dict[str, torch.Tensor]:
        return (
            DenoiserContext(model=model, cond=data.cond).append_history(data.streams, None).velocity(data.streams, t, t)
        )

    dense = velocities()

    def block_mask(self, backend, device):
        return self.blocks(device)

    monkeypatch.setattr(AttentionVisibility, "mask", block_mask)
    flex = velocities()
    for m in (VIDEO, AUDIO):
        torch.testing.assert_close(flex[m], dense[m], atol=1e-5, rtol=1e-5)


def test_flex_on_a_cpu_uses_the_reference_with_gradient():
    assert isinstance(noisy_visibility().mask("flex", torch.device("cpu")), torch.Tensor)
    data = batch(rows=1, chunks=2)
    t = constant_levels(data.streams, dict.fromkeys(data.streams, 0.6))
    model = network(attention="flex")
    u = DenoiserContext(model=model, cond=data.cond).prefill().velocity(data.streams, t, t)
    u[VIDEO].sum().backward()
    assert model.branch(VIDEO).block(0).qkv.weight.grad is not None
