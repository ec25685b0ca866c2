"""Bytes that the attention between the projections keeps for its backward, fused and step by step. Needs no GPU.

    python -m benchmarks.memory

Sizes are those of the workload `encoder` in bfloat16, as `MSDeformAttn` has them: value, offsets and logits come out of
linear layers, reference points are float32. A storage counts once, whoever keeps it. Tensors are PyTorch's fakes:
nothing is computed, and this is what autograd would keep on a GPU.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.workloads import WORKLOADS
from msda_triton import ms_deform_attn, ms_deform_attn_fused


def fused(value, shapes, reference, offsets, logits, mask) -> Tensor:
    return ms_deform_attn_fused(value, shapes, reference, offsets, logits, value_mask=mask, backend="triton")


def unfused(value, shapes, reference, offsets, logits, mask, softmax_dtype=torch.float32) -> Tensor:
    """Mask, locations and softmax by PyTorch; the softmax in float32, as autocast has it."""
    value = value.masked_fill(mask[..., None, None], 0)
    locations = reference[:, :, None, :, None] + offsets / shapes.flip(-1)[:, None]
    weights = logits.flatten(3).softmax(-1, dtype=softmax_dtype).view(logits.shape)
    return ms_deform_attn(value, shapes, locations, weights, backend="triton")


def unfused_low(*inputs) -> Tensor:
    """The same with the softmax in bfloat16."""
    return unfused(*inputs, softmax_dtype=torch.bfloat16)


def saved_bytes(attention) -> int:
    """What autograd keeps of a call on the encoder's sizes."""
    w = WORKLOADS["encoder"]
    L = len(w.levels)
    kept = {}

    def keep(x: Tensor) -> Tensor:
        kept[id(x.untyped_storage())] = x.untyped_storage()
        return x

    with FakeTensorMode(), torch.device("cuda"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = torch.empty(w.B, w.S, w.M, w.D, dtype=torch.bfloat16, requires_grad=True)
        offsets = torch.empty(w.B, w.Q, w.M, L, w.P, 2, dtype=torch.bfloat16, requires_grad=True)
        logits = torch.empty(w.B, w.Q, w.M, L, w.P, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.empty(w.B, w.S, dtype=torch.bool)
        out = attention(value, torch.empty(L, 2, dtype=torch.int64), torch.empty(w.B, w.Q, L, 2), offsets, logits, mask)
        assert out.requires_grad
        return sum(storage.nbytes() for storage in kept.values())


def main() -> None:
    mine = saved_bytes(fused)
    print(f"fused: {mine / 1e6:.1f} MB")
    for attention in (unfused, unfused_low):
        other = saved_bytes(attention)
        print(f"{attention.__name__}: {other / 1e6:.1f} MB; fused keeps {mine / other:.0%} of it")


if __name__ == "__main__":
    main()
