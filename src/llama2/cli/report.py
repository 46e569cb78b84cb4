"""`llama2 report`: reports of the commands that measure, side by side."""

from dataclasses import dataclass
from pathlib import Path

from llama2.cli.args import option
from llama2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Lay reports side by side: what bench, perplexity, compare, evaluate and choose wrote with --json. A row for each
    test, a column for each model; the best value of a row is bold."""

    reports: tuple[str, ...] = option((), "the reports", metavar="REPORT.json", positional=True)
    json: bool = option(False, "one report with the rows of all, as JSON")


def run(options: ReportOptions) -> int:
    """Runs the command."""
    from llama2.evaluate import report

    if not options.reports:
        raise InputError("no report was given; add files that a measuring command wrote with --json")
    found = [report.read(path) for path in options.reports]
    names = [Path(path).name for path in options.reports]
    print(report.merged(found, names).as_json() if options.json else report.table(found, names))
    return 0
