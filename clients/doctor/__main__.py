"""`python3 -m clients.doctor`: the doctor where nothing is installed yet."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from clients.doctor import Finding, Subject, diagnose, report
from clients.doctor.findings import PROBLEM, verdict
from fleet.errors import FleetError


def main(arguments: list[str] | None = None) -> int:
    """Print what was found.

    Returns:
        1 if something blocks, 2 if the arguments contradict each other, else 0.
    """
    options = _parser().parse_args(arguments)
    try:
        subject = Subject(
            options.bundle, options.server, options.ca, options.data, options.state, options.cache
        )
    except FleetError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    findings = diagnose(subject)
    if options.format == "json":
        print(json.dumps(report(findings), indent=2))
    else:
        print("\n".join(map(_line, findings)), verdict(findings), sep="\n\n")
    return int(any(finding.state == PROBLEM for finding in findings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m clients.doctor",
        description="Check whether this device can take part; the same as fleet doctor.",
    )
    parser.add_argument("--bundle", type=Path, help="the device's, an archive or a folder")
    parser.add_argument("--server", metavar="HOST:PORT", help="instead of a bundle's")
    parser.add_argument("--ca", type=Path, help="certificate of the server's authority")
    parser.add_argument("--data", metavar="DIR", help="the device's images")
    parser.add_argument("--state", type=Path, metavar="DIR", help="where the client writes")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where its features lie")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    return parser


def _line(finding: Finding) -> str:
    line = f"{finding.state:<8} {finding.check:<15} {finding.fact}"
    return f"{line}\n{'':<24} → {finding.remedy}" if finding.remedy else line


if __name__ == "__main__":
    sys.exit(main())
