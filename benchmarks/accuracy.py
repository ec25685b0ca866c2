"""Errors against float64 at a detector's real size, beside those of coordinates in storage precision.

    TRITON_INTERPRET=1 python -m benchmarks.accuracy    # kernels interpreted; on a GPU leave the variable out

The maps are those of an 800 x 1333 image (100 x 167 pixels and coarser), the locations those of `local`, and random
pixels of the encoder are the queries. All implementations get the same rounded inputs. Writes a CSV and prints a
Markdown table: RMS error divided by the RMS of the exact result, and the largest error divided by the largest result.
"""

import argparse
import csv
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import gate
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.run import DTYPES, environment
from benchmarks.workloads import WORKLOADS, Inputs, make_inputs

CSV = Path(__file__).parent / "results" / "accuracy.csv"
LEAVES = ("value", "locations", "weights")


@dataclass
class Error:
    """One line of the CSV."""

    dtype: str
    implementation: str
    tensor: str  # "out" or the gradient of a leaf
    rms: float  # relative to the RMS of the exact tensor
    worst: float  # largest error, relative to the largest entry


def storage_precision(x: Inputs) -> Tensor:
    """The operator with coordinates, weights and sums in value's dtype, as kernels of one scalar type have them."""
    B, _, M, D = x.value.shape
    dtype = x.value.dtype
    locations, attention = x.locations.to(dtype), x.weights.to(dtype)
    b = torch.arange(B, device=x.value.device).view(B, 1, 1, 1)
    m = torch.arange(M, device=x.value.device).view(1, 1, M, 1)
    out = x.value.new_zeros(*attention.shape[:3], D)
    for l, (H, W) in enumerate(x.workload.levels):
        px, py = locations[:, :, :, l, :, 0] * W - 0.5, locations[:, :, :, l, :, 1] * H - 0.5  # [B, Q, M, P]
        x0, y0 = px.detach().floor(), py.detach().floor()
        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
            weight = (1 - (px - x0 - dx).abs()) * (1 - (py - y0 - dy).abs())
            xi, yi = (x0 + dx).long(), (y0 + dy).long()
            inside = (xi >= 0) & (xi < W) & (yi >= 0) & (yi < H)
            token = torch.where(inside, x.starts[l] + yi * W + xi, 0)
            weight = torch.where(inside, weight, 0) * attention[:, :, :, l]
            for p in range(weight.shape[-1]):  # one rounding a sample, as a loop over samples has
                out = out + weight[..., p : p + 1] * x.value[b, token, m][..., p, :]
    return out.flatten(2)


def inputs(dtype: torch.dtype, device: str, queries: int) -> Inputs:
    """Some queries of the encoder's first image."""
    workload = replace(WORKLOADS["encoder"], B=1)
    x = make_inputs(workload, "local", dtype, device)
    chosen = torch.randperm(workload.Q, generator=torch.Generator().manual_seed(2))[:queries].sort()[0].to(device)
    part = {
        name: getattr(x, name)[:, chosen] for name in ("reference_points", "offsets", "logits", "locations", "weights")
    }
    return replace(x, workload=replace(workload, Q=queries), **part)


def errors(names: list[str], dtype: torch.dtype, device: str, queries: int) -> list[Error]:
    """Errors of the result and the gradients of each implementation."""
    x = inputs(dtype, device, queries)
    exact = gate.oracle(x, LEAVES)
    smooth = gate._smooth(x)
    rows = []
    for name in names:
        provider = Provider(storage_precision) if name == "storage precision" else PROVIDERS[name]
        leaves = gate.differentiable(x, LEAVES)
        out = provider.function(leaves)
        grads = torch.autograd.grad(out, [getattr(leaves, leaf) for leaf in LEAVES], gate.gradient(x))
        for tensor, got in zip(("out", *LEAVES), (out.detach(), *grads), strict=True):
            where = smooth if tensor == "locations" else slice(None)
            error, want = got.double()[where] - exact[tensor][where], exact[tensor][where]
            rms, worst = (error.norm() / want.norm()).item(), (error.abs().max() / want.abs().max()).item()
            rows.append(Error(str(dtype).removeprefix("torch."), name, tensor, rms, worst))
    return rows


def markdown(rows: list[Error]) -> str:
    """One line for each dtype and implementation, `RMS / worst` of each tensor."""
    tensors = list(dict.fromkeys(row.tensor for row in rows))
    titles = ["dtype", "implementation", *("out" if t == "out" else f"gradient of {t}" for t in tensors)]
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(tensors)]
    for key in dict.fromkeys((row.dtype, row.implementation) for row in rows):
        cells = [f"{row.rms:.1e} / {row.worst:.1e}" for row in rows if (row.dtype, row.implementation) == key]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=CSV, help="where to write the table (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--queries", type=int, default=500, help="(default: %(default)s)")
    args = parser.parse_args()
    names = ["triton", "fallback", "storage precision"]
    rows = [row for dtype in args.dtype for row in errors(names, DTYPES[dtype], args.device, args.queries)]
    place = environment(args.device)
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *place], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) | place for row in rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
