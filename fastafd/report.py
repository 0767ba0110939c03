"""python -m fastafd.report: the paper's tables and figures, and an HTML page, from run folders.

    python -m fastafd.report results runs/*                 # every run, whatever its scale
    python -m fastafd.report table1 runs                    # ResNet-18 beside the paper; table2 is WRN-34-10
    python -m fastafd.report table3 runs                    # ablation; table4: f1 and f2; table6: pre-trained models
    python -m fastafd.report parameters runs
    python -m fastafd.report figure1a runs --out figures    # feature gap; figure3, figure5: t-SNE; figure4: sweeps
    python -m fastafd.report page runs/NAME                 # runs/NAME/report.html; of several: OUT/report.html

Tables are Markdown. Tables 1 to 6 take runs of the published settings on whole data sets, and say which they left out
and why; what was not run is shown as not run. Of several seeds they show mean and standard deviation, of one the Wilson
95 % interval. Table 5, training times, is `python -m benchmarks.epoch_time --methods`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastafd import cli
from fastafd.reporting import figures
from fastafd.reporting.page import write_page
from fastafd.reporting.runs import Run, in_order, read_runs
from fastafd.reporting.tables import OF_PAPER, TABLES, fits, parameters, results
from fastafd.settings import UsageError, check, path, setting, unknown


@dataclass(frozen=True)
class ReportConfig:
    """What `python -m fastafd.report` takes behind its words."""

    out: Path = setting(Path("report"), "folder for figures, and for the page of several runs", path)

    def __post_init__(self) -> None:
        check(self)


def main(argv: list[str]) -> None:
    words = []
    while argv and not argv[0].startswith("-"):
        words.append(argv[0])
        argv = argv[1:]
    config: ReportConfig = cli.parse(ReportConfig(), argv, prog="fastafd.report", about=__doc__)
    known = [*TABLES, *FIGURES, "page"]
    if not words:
        raise UsageError(f"report: got nothing to report, takes one of {', '.join(known)}, then run folders")
    what = words[0]
    if what not in known:
        raise unknown("report", what, known)
    runs = read_runs([Path(word).expanduser() for word in words[1:] or ["runs"]])
    if what in TABLES:
        print(TABLES[what](runs))
    elif what in FIGURES:
        print(FIGURES[what](runs, made(config.out)))
    else:
        single = len(runs) == 1 and not any(word.startswith("--out") for word in argv)
        print(page(runs, runs[0].folder if single else made(config.out)))


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def page(runs: Sequence[Run], folder: Path) -> Path:
    """`report.html` in the folder: every table and figure that the runs have something for."""
    tables = [("Results", results(runs)), ("Parameters", parameters(runs))]
    tables += [(title, TABLES[what](runs)) for what, title in OF_PAPER.items() if any(fits(run) for run in runs)]
    drawn = []
    for draw in FIGURES.values():
        try:
            drawn.append(draw(runs, made(folder / "figures")))
        except UsageError as error:
            if str(error).startswith("plot"):  # else nothing of that kind was run
                raise
    write_page(in_order(runs), tables, drawn, folder / "report.html")
    return folder / "report.html"


FIGURES: dict[str, Callable[[Sequence[Run], Path], Path]] = {
    "figure1a": figures.feature_gap,
    "figure3": figures.tsne,
    "figure4": figures.sweep,
    "figure5": figures.tsne_methods,
}


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
