"""A few launches with strange numbers, for compute-sanitizer to watch; without it they are only compiled and run.

    python -m benchmarks.sanitize    # first: compiles, so that the tools need not wait
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.sanitize
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python -m benchmarks.sanitize
    TRITON_INTERPRET=1 python -m benchmarks.sanitize    # rehearsed on a CPU

Without the variable a tensor lies within a larger piece of PyTorch's memory, and what is read past it is not noticed.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from msda_triton import ms_deform_attn, ms_deform_attn_fused
from msda_triton.call import Call
from msda_triton.kernels import launch
from msda_triton.kernels.plan import INTERPRETED
from tests.attention import make_inputs
from tests.gpu_bodies import deterministic
from tests.interpreter import patch_the_language_once_a_launch

LEVELS = [(6, 9), (3, 5), (1, 1)]
DRY_LEVELS = [(2, 3), (1, 1)]
# the last has channels that are loaded and added one by one
DTYPES = [(torch.bfloat16, 32), (torch.float32, 32), (torch.float16, 30)]
M, P = 2, 4
STRANGE = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31, -(2.0**33)]


def with_strange(x: Tensor) -> Tensor:
    """x with a fifth of its numbers strange."""
    chosen, numbers = torch.rand(x.shape) < 0.2, torch.tensor(STRANGE)
    drawn = numbers[torch.randint(len(STRANGE), x.shape)].to(x)
    return torch.where(chosen.to(x.device), drawn, x.detach()).requires_grad_()


def run(name: str, function, *inputs: Tensor) -> str:
    """Both directions of a call; an error if a gradient is not finite. Strange samples are off the map."""
    grads = torch.autograd.grad(function(*inputs).float().sum(), inputs)
    if not all(grad.isfinite().all() for grad in grads):
        raise AssertionError(f"{name}: expected finite gradients")
    return name


def launches(device: str, levels: list[tuple[int, int]]) -> Iterator[str]:
    """Names of the calls, each after it ran."""
    S, L = sum(h * w for h, w in levels), len(levels)

    def plain(value, locations, weights):
        return ms_deform_attn(value, levels, locations, weights, backend="triton")

    def fused(value, offsets, logits):
        return ms_deform_attn_fused(value, levels, boxes, offsets, logits, value_mask=mask, backend="triton")

    for dtype, D in DTYPES:
        for queries, Q in (("rectangles", S), ("runs", S // 2)):
            value, locations, weights = make_inputs(levels, Q=Q, M=M, D=D, P=P, dtype=dtype, device=device)
            locations = with_strange(locations)
            yield run(f"{dtype} {queries}", plain, value, locations, weights)
        with deterministic(True):
            yield run(f"{dtype} runs, deterministic", plain, value, locations, weights)
        boxes, mask = torch.rand(2, Q, L, 4, device=device), torch.rand(2, S, device=device) < 0.3
        yield run(f"{dtype} runs, boxes", fused, value, locations.detach().to(dtype).requires_grad_(), weights)
    # sizes that only the device knows, and that do not fit the tokens
    value, locations, weights = (x.detach() for x in make_inputs(levels, B=1, Q=3, M=M, D=32, P=P, device=device))
    for wrong in ([(600, 900), *levels[1:]], [*levels[:-1], (2**15, 2**15)], [*levels[:-1], (-3, 5)]):
        call = Call(value, torch.tensor(wrong, device=device), None, locations, weights, [P] * L)
        out = launch.forward(call)
        launch.backward(torch.ones_like(out), call, [True, True, True, False])
        yield f"sizes {wrong}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not (torch.cuda.is_available() or INTERPRETED):
        raise SystemExit("expected a GPU or TRITON_INTERPRET=1, torch finds no GPU")
    if INTERPRETED:
        patch_the_language_once_a_launch()
    torch.manual_seed(0)
    names = []
    for name in launches(*(("cpu", DRY_LEVELS) if INTERPRETED else ("cuda", LEVELS))):
        if not INTERPRETED:
            torch.cuda.synchronize()
        names.append(name)
        print(name, flush=True)
    print(f"sanitize: {len(names)} calls done")


if __name__ == "__main__":
    main()
