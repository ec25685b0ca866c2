"""CSV, Markdown table and plots of benchmark rows."""

import csv
from collections import defaultdict
from dataclasses import asdict, fields
from pathlib import Path

from benchmarks.bench_op import Row
from benchmarks.providers import BASELINE


def write_csv(path: Path, rows: list[Row], environment: dict[str, str]) -> None:
    """One line per row, the columns of `environment` repeated on each."""
    columns = [field.name for field in fields(Row)] + list(environment)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            cells = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(cells | environment)


def markdown(rows: list[Row], environment: dict[str, str]) -> str:
    """Medians in milliseconds with the ratio to the baseline, a line per case and a column per provider."""
    timed = [row for row in rows if row.status == "ok"]
    providers = list(dict.fromkeys(row.provider for row in timed))
    cases: dict[tuple, dict[str, str]] = defaultdict(dict)
    for row in timed:
        ratio = "" if row.provider == BASELINE else f" ({row.ratio:.3g}x)"
        case = (row.workload, row.distribution, row.dtype, row.mode + (" (graph)" if row.timer == "graph" else ""))
        cases[case][row.provider] = f"{row.p50_ms:.3g}{ratio}"
    lines = [
        f"Medians in ms; in brackets how many times faster than `{BASELINE}`. "
        + ", ".join(f"{key} {value}" for key, value in environment.items() if value),
        "",
        "| workload | locations | dtype | mode | " + " | ".join(providers) + " |",
        "|---|---|---|---|" + "---:|" * len(providers),
    ]
    for case, cells in cases.items():
        lines.append("| " + " | ".join((*case, *(cells.get(provider, "") for provider in providers))) + " |")
    left_out = [row for row in rows if row.status != "ok"]
    if left_out:
        lines += ["", "Not timed:", ""]
        lines += [
            f"- {row.provider}, {row.workload}, {row.distribution}, {row.dtype}: {row.status}" for row in left_out
        ]
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: list[Row], title: str) -> None:
    """Bars of p50 on a logarithmic axis: a panel per mode, a group per workload, distribution and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [row for row in rows if row.status == "ok" and row.timer != "graph"]
    providers = list(dict.fromkeys(row.provider for row in timed))
    modes = list(dict.fromkeys(row.mode for row in timed))
    groups = list(dict.fromkeys((row.workload, row.distribution, row.dtype) for row in timed))
    width = 0.8 / len(providers)
    figure, panels = plt.subplots(
        len(modes),
        1,
        figsize=(max(6, 1.1 * len(groups)), 3 * len(modes)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for mode, panel in zip(modes, panels[:, 0], strict=True):
        for i, provider in enumerate(providers):
            mine = {
                (row.workload, row.distribution, row.dtype): row
                for row in timed
                if (row.provider, row.mode) == (provider, mode)
            }
            at = [g for g, group in enumerate(groups) if group in mine]
            chosen = [mine[groups[g]] for g in at]
            spread = [[row.p50_ms - row.p20_ms for row in chosen], [row.p80_ms - row.p50_ms for row in chosen]]
            positions = [g + (i - (len(providers) - 1) / 2) * width for g in at]
            panel.bar(positions, [row.p50_ms for row in chosen], width, yerr=spread, label=provider)
        panel.set(yscale="log", ylabel=f"{mode}, ms")
        panel.grid(axis="y", alpha=0.3)
    panels[0, 0].set_title(title)
    panels[0, 0].legend(fontsize="small", ncols=len(providers))
    panels[-1, 0].set_xticks(range(len(groups)), ["\n".join(group) for group in groups], fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
