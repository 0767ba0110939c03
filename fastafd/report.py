"""python -m fastafd.report: the paper's tables and figures, and an HTML page, from run folders.

    python -m fastafd.report results runs/*                 # every run, whatever its scale
    python -m fastafd.report table1 runs                    # ResNet-18 beside the paper; table2 is WRN-34-10
    python -m fastafd.report table3 runs                    # ablation; table4: f1 and f2; table6: pre-trained models
    python -m fastafd.report parameters runs
    python -m fastafd.report figure1a runs --out figures    # feature gap; figure3, figure5: t-SNE; figure4: sweeps
    python -m fastafd.report page runs/NAME                 # writes runs/NAME/report.html; for several: OUT/report.html

Tables are Markdown. Tables 1 to 6 take only runs of the published settings on whole data sets; they name the runs that
they leave out, and why. A row without runs says "not run". A row of several seeds has the mean and the standard
deviation, a row of one seed the Wilson 95 % interval. For Table 5, training times, run
`python -m benchmarks.epoch_time --methods`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from fastafd import cli
from fastafd.reporting.figures import FIGURES
from fastafd.reporting.markdown import markdown
from fastafd.reporting.page import made, report
from fastafd.reporting.runs import read_runs
from fastafd.reporting.tables import TABLES
from fastafd.settings import UsageError, check, path, setting, unknown, user_path


@dataclass(frozen=True)
class ReportConfig:
    """The settings of `python -m fastafd.report`, besides the name of a table or figure and the run folders."""

    out: Path = setting(Path("report"), "folder for figures, and for the page of several runs", path)

    def __post_init__(self) -> None:
        check(self)


def main(argv: list[str]) -> None:
    words, argv = cli.words_apart(argv, ReportConfig())
    config: ReportConfig = cli.parse(ReportConfig(), argv, prog="fastafd.report", about=__doc__)
    names = [*TABLES, *FIGURES, "page"]
    if not words:
        raise UsageError(f"report: got nothing to report, takes one of {', '.join(names)}, then run folders")
    name = words[0]
    if name not in names:
        raise unknown("report", name, names)
    runs = read_runs([user_path(word, "runs") for word in words[1:] or ["runs"]])
    if name in TABLES:
        print(markdown(TABLES[name](runs)))
    elif name in FIGURES:
        print(FIGURES[name](runs, made(config.out)))
    else:
        into_run = len(runs) == 1 and not any(word.startswith("--out") for word in argv)
        print(report(runs, runs[0].folder if into_run else made(config.out)))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
