"""How many different rows of value a program reads, by the shape of its queries: what a cache near it can save.

    python -m benchmarks.locality

Counted, not timed: of the four rows of value that a sample reads, those inside the map are "reads", and those that no
other sample of the same program has read are "rows".
"""

import torch

from benchmarks.workloads import WORKLOADS, Workload, make_inputs
from msda_triton.reference import level_of_point

TILES = [(1, 32), (2, 16), (4, 8), (8, 4), (8, 8), (1, 64)]  # height, width, in queries; the kernel's default is 4 x 8


def program_of_query(workload: Workload, height: int, width: int) -> torch.Tensor:
    """Number of the program that has each query, [Q]; runs of queries cross rows and levels, rectangles do not."""
    if height == 1:
        return torch.arange(workload.Q) // width
    programs, count = [], 0
    for H, W in workload.levels:
        y, x = torch.meshgrid(torch.arange(H) // height, torch.arange(W) // width, indexing="ij")
        across = -(-W // width)
        programs.append((count + y * across + x).flatten())
        count += -(-H // height) * across
    return torch.cat(programs)


def reads_and_rows(workload: Workload, distribution: str, height: int, width: int) -> tuple[int, int]:
    """Of the first image."""
    inputs = make_inputs(workload, distribution, torch.float32, "cpu")
    level = level_of_point(inputs.shapes, [workload.P] * len(workload.levels))
    sizes = inputs.shapes[level]  # [K, 2] (H, W)
    locations = inputs.locations[0].flatten(2, 3)  # [Q, M, K, 2]
    program = program_of_query(workload, height, width)[:, None, None] * workload.M + torch.arange(workload.M)[:, None]
    found = []
    for dy in (0, 1):
        for dx in (0, 1):
            x = (locations[..., 0] * sizes[:, 1] - 0.5).floor().long() + dx
            y = (locations[..., 1] * sizes[:, 0] - 0.5).floor().long() + dy
            inside = (x >= 0) & (x < sizes[:, 1]) & (y >= 0) & (y < sizes[:, 0])
            row = inputs.starts[level] + y * sizes[:, 1] + x
            found.append((program * workload.S + row)[inside])
    keys = torch.cat(found)
    return keys.numel(), keys.unique().numel()


def main() -> None:
    workload = WORKLOADS["encoder"]
    print("encoder, one image: queries of a program, reads per (query, head), rows per (query, head)")
    for distribution in ("local", "uniform"):
        for height, width in TILES:
            reads, rows = (n / workload.Q / workload.M for n in reads_and_rows(workload, distribution, height, width))
            print(f"{distribution:8} {height:2} x {width:2}  {reads:5.1f}  {rows:5.1f}", flush=True)


if __name__ == "__main__":
    main()
