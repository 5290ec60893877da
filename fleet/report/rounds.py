"""Rounds as lines and cells of a table."""

from collections.abc import Iterable

from fleet.records import RoundReport

MIB = 2**20

COLUMNS = (
    "round",
    "acc. %",
    "loss",
    "up MiB",
    "down MiB",
    "peak MiB",
    "seconds",
    "clients",
    "refused",
)


def round_cells(report: RoundReport) -> tuple[str, ...]:
    """One round as text, in the order of `COLUMNS`."""
    return (
        str(report.server_round),
        "–" if report.accuracy is None else f"{100 * report.accuracy:.1f}",
        "–" if report.loss is None else f"{report.loss:.3f}",
        f"{report.bytes_up / MIB:.2f}",
        f"{report.bytes_down / MIB:.2f}",
        f"{report.peak_client_bytes / MIB:.1f}" if report.peak_client_bytes else "–",
        f"{report.seconds:.1f}",
        str(len(report.clients)),
        str(len(report.refused)),
    )


def round_line(report: RoundReport, rounds: int) -> str:
    """One round as a sentence, for where there is no terminal."""
    cells = dict(zip(COLUMNS, round_cells(report), strict=True))
    return (
        f"round {cells['round']}/{rounds}: accuracy {cells['acc. %']} %, loss {cells['loss']}, "
        f"up {cells['up MiB']} MiB, down {cells['down MiB']} MiB, "
        f"client peak {cells['peak MiB']} MiB, {cells['seconds']} s, "
        f"{cells['clients']} clients, {cells['refused']} refused"
        + (f", {len(report.late)} late" if report.late else "")
        + ("; abandoned, the model stayed as it was" if report.abandoned else "")
    )


def refusals(rounds: Iterable[RoundReport]) -> list[str]:
    """Who was refused in which round, and why."""
    return [
        f"round {report.server_round}: {client}: {reason.strip().splitlines()[-1]}"
        for report in rounds
        for client, reason in report.refused.items()
        if reason.strip()
    ]
