"""Run the tests of the drop-in entry points and print a table of them: entry point, test, result.

    python -m benchmarks.shim_coverage [--out FILE] [pytest options]

A test names what it covers by `@pytest.mark.entry_point(name)`.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import pytest

FILES = ("functions", "modules", "patch", "transformers")


class Collector:
    """A pytest plugin: the entry points of each test, and what became of it."""

    def __init__(self) -> None:
        self.tests: dict[str, list[str]] = defaultdict(list)  # by entry point
        self.results: dict[str, str] = {}  # by test

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("entry_point"):
                self.tests[mark.args[0]].append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.results[report.nodeid] = report.outcome

    def table(self) -> str:
        lines = ["| entry point | test | result |", "|---|---|---|"]
        for name, tests in sorted(self.tests.items()):
            outcomes = sorted({self.results.get(test, "not run") for test in tests})
            functions = sorted({test.split("[")[0].removeprefix("tests/") for test in tests})
            lines.append(f"| {name} | {', '.join(functions)} | {', '.join(outcomes)} |")
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options, more = parser.parse_known_args()
    collector = Collector()
    files = [f"tests/test_shims_{name}.py" for name in FILES]
    code = pytest.main(["-q", "-m", "entry_point", *files, *more], plugins=[collector])
    table = collector.table()
    passed = sum(all(collector.results.get(t) == "passed" for t in tests) for tests in collector.tests.values())
    print(table, f"\n{passed} of {len(collector.tests)} entry points passed", sep="\n")
    if options.out:
        options.out.write_text(table + "\n")
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
