"""A page of bars from the CSVs of `benchmarks.run`: a picture, and a table of the same lines.

    python -m benchmarks.bars benchmarks/results/h100/5_bench.csv --out benchmarks/results/h100/
    python -m benchmarks.bars A.csv B.csv --out FOLDER    # of two measurements of the same the later file's counts

Writes `bars.png` and `bars.md`. Both show local locations only. A bar is one time of a provider: of a CUDA graph where
there is one, else of device events, on a CPU of the host clock. The table has all times.
"""

import argparse
import itertools
from pathlib import Path

from benchmarks.report import markdown, places, read, short

# Colours of Okabe and Ito, which people with any kind of colour vision tell apart.
COLOURS = {
    "triton": "#0072B2",
    "triton_fused": "#56B4E9",
    "torch": "#E69F00",
    "torch_compiled": "#F0E442",
    "fallback": "#009E73",
    "inductor": "#999999",
    "torch_ms_deform_attn": "#D55E00",
    "MultiScaleDeformableAttention": "#CC79A7",
    "mmcv": "#000000",
    "deformops": "#7A4B2A",
    "DCNv4": "#5B2A86",
}
NAMES = {"torch": "torch (grid_sample)"}
LEGEND = """\
- `torch`: `grid_sample` for each level; `fallback`: this package's PyTorch code; `triton`: `ms_deform_attn`;
  `triton_tensors`: the same with sizes that only the device knows; `triton_fused`: softmax and locations inside;
  `triton_unfused`: the same work in steps; the others are packages.
- `events`: device time of a call, cold L2 cache, with what the host takes longer; `graph`: of a CUDA graph's replay,
  warm cache; `wall`: the host's clock over eager calls. Small calls have all three.
- An empty cell was not measured: not every provider can be captured in a graph, and a run may have reached its limit.
"""
MODES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward and backward"}
_BAR = 0.17  # inches


def chosen(lines: list[dict[str, str]]) -> dict[tuple[str, str], dict[tuple[str, str], dict[str, dict[str, str]]]]:
    """The lines of the picture by (workload, dtype), then (mode, provider), then timer."""
    groups = {}
    for line in lines:
        if line["status"] == "ok" and line["distribution"] == "local" and line["provider"] in COLOURS:
            group = groups.setdefault((line["workload"], line["dtype"]), {})
            group.setdefault((line["mode"], line["provider"]), {})[line["timer"]] = line
    return groups


def draw(lines: list[dict[str, str]]):
    """A matplotlib figure, bars of medians on a logarithmic axis: a panel per mode, a group per workload and dtype."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    matplotlib.rcParams["hatch.linewidth"] = 0.4
    groups = chosen(lines)
    in_group = [[name for name in COLOURS if name in {name for _, name in group}] for group in groups.values()]
    providers = [name for name in COLOURS if any(name in names for names in in_group)]
    ends = list(itertools.accumulate(len(names) + 1 for names in in_group))  # bars, and a gap after each group
    starts = [end - len(names) - 1 for end, names in zip(ends, in_group, strict=True)]
    figure = Figure(figsize=(12, _BAR * ends[-1] + 1.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(MODES), sharex=True, sharey=True)
    notes = [*places(lines), "Medians, local locations."]
    for (mode, title), panel in zip(MODES.items(), panels, strict=True):
        for group, names, start in zip(groups.values(), in_group, starts, strict=True):
            small = any("graph" in timers for timers in group.values())
            for at, name in enumerate(names, start):
                if (mode, name) not in group:
                    continue
                times = {timer: float(line["p50_ms"]) for timer, line in group[mode, name].items()}
                timer = next(timer for timer in ("graph", "events", "wall") if timer in times)
                hatch = "////" if small and timer != "graph" else None
                panel.barh(at, times[timer], 0.85, color=COLOURS[name], hatch=hatch, edgecolor="#333333", linewidth=0)
                wall = times.get("wall", times[timer])
                if timer != "wall" and "wall" in times:
                    panel.plot([wall, wall], [at - 0.42, at + 0.42], color="black", linewidth=1.5)
                    notes.append("Black line: wall time of eager calls.")
                if hatch:
                    notes.append("Hatched: small calls by device events, which include what the host takes.")
                panel.annotate(
                    short(times[timer]), (max(times[timer], wall), at), (3, 0), textcoords="offset points",
                    va="center", fontsize=7.5,
                )  # fmt: skip
        panel.set(xscale="log", xlabel="ms", title=title)
        panel.xaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    low, high = panels[0].get_xlim()
    panels[0].set_xlim(low, high * (high / low) ** 0.12)  # room for the last label
    middles = [start + (len(names) - 1) / 2 for start, names in zip(starts, in_group, strict=True)]
    panels[0].set_yticks(middles, ["\n".join(group) for group in groups])
    panels[0].set_ylim(ends[-1] - 1, -1)
    handles = [Patch(color=COLOURS[name], label=NAMES.get(name, name)) for name in providers]
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False)
    figure.supxlabel("\n".join(dict.fromkeys(notes)), fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", nargs="+", type=Path, help="of benchmarks.run")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    for path in args.csv:
        try:
            read([path])
        except KeyError as error:
            parser.error(f"csv: expected a CSV of benchmarks.run, got {path}, which has no column {error}")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"csv: expected a CSV of benchmarks.run, got {path}: {error}")
    lines = [line for line in read(args.csv) if line["distribution"] == "local"]
    if not chosen(lines):
        parser.error("csv: expected a time with local locations, got none")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(lines).savefig(args.out / "bars.png")
    source = ", ".join(path.name for path in args.csv)
    page = (
        f"Drawn from {source} by `python -m benchmarks.bars`; local locations.\n\n![bars of the times below](bars.png)"
    )
    (args.out / "bars.md").write_text(f"{page}\n\n{LEGEND}\n{markdown(lines)}")
    print(f"wrote bars.png and bars.md to {args.out}")


if __name__ == "__main__":
    main()
