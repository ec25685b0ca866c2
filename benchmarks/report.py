"""CSV and Markdown of benchmark rows."""

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.providers import BASELINE

_CASE = ("workload", "distribution", "dtype", "mode", "timer")
_PLACE = ("device", "driver", "torch", "triton", "commit")  # columns of `environment` that a page names


class RowFile:
    """A CSV that gets each row as soon as it is known, so that an early end loses none.

    Attributes:
        lines: the rows so far, as `read` gives them back.
    """

    def __init__(self, path: Path, columns: Iterable[str], environment: dict[str, str]):
        self.lines: list[dict[str, str]] = []
        self._path, self._columns, self._environment = path, [*columns, *environment], environment
        with path.open("w", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writeheader()

    def write(self, row: dict) -> None:
        """Numbers with five digits; the environment is repeated on each line."""
        cells = {key: f"{v:.5g}" if isinstance(v, float) else "" if v is None else str(v) for key, v in row.items()}
        self.lines.append(cells | self._environment)
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(self.lines[-1])


def read(paths: Iterable[Path]) -> list[dict[str, str]]:
    """The lines of some CSVs. Of two measurements of the same the later one stays."""
    lines = {}
    for path in paths:
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                lines[tuple(line[key] for key in (*_CASE, "provider"))] = line
    return list(lines.values())


def short(number: str | float) -> str:
    """With three digits and no exponent."""
    return f"{float(f'{float(number):.3g}'):g}"


def places(lines: list[dict[str, str]]) -> list[str]:
    """On what the lines were measured, each once."""
    found = {tuple((key, line[key]) for key in _PLACE if line.get(key)) for line in lines}
    return sorted(", ".join(f"{key} {value}" for key, value in place) for place in found)


def markdown(lines: list[dict[str, str]]) -> str:
    """Medians in milliseconds with the ratio to the baseline, a line per case and a column per provider."""
    timed = [line for line in lines if line["status"] == "ok"]
    providers = list(dict.fromkeys(line["provider"] for line in timed))
    cases: dict[tuple, dict[str, str]] = defaultdict(dict)
    for line in timed:
        ratio = f" ({short(line['ratio'])}x)" if line["ratio"] and line["provider"] != BASELINE else ""
        case = tuple(line[key] for key in _CASE)
        cases[case][line["provider"]] = short(line["p50_ms"]) + ratio
    page = [f"Medians in ms; in brackets how many times faster than `{BASELINE}`.", ""]
    page += [f"- {place}" for place in places(lines)]
    page += ["", "| workload | locations | dtype | mode | timer | " + " | ".join(providers) + " |"]
    page.append("|---|---|---|---|---|" + "---:|" * len(providers))
    for case, cells in cases.items():
        page.append("| " + " | ".join((*case, *(cells.get(provider, "") for provider in providers))) + " |")
    left_out = [line for line in lines if line["status"] != "ok"]
    if left_out:
        page += ["", "Not timed:", ""]
    for line in left_out:
        what = (line[key] for key in ("provider", *_CASE))
        page.append(f"- {', '.join(filter(None, what))}: {line['status']}")
    return "\n".join(page) + "\n"
