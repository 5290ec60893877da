"""The table of checks, and how they are run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from clients.doctor.address import (
    bundle_finding,
    bundle_server,
    parse_server,
    read_authority,
    read_bundle,
)
from clients.doctor.findings import UNKNOWN, Finding, problem
from clients.doctor.images import images_finding
from clients.doctor.platform_checks import (
    cgroup_finding,
    machine_finding,
    this_machine,
    this_python,
)
from clients.doctor.power import temperature_finding, this_power, this_time_sync
from clients.doctor.room import disk_findings, meminfo, memory_finding, swap_finding
from clients.doctor.server import call, server_findings
from clients.doctor.torch_check import Probe, probe_torch, project_installed, torch_finding
from fleet.errors import ConfigError
from fleet.paths import expanded

_NOT_ASKED = "not looked at"


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        bundle: the device's, an archive or a folder.
        server: `HOST:PORT` instead of a bundle's.
        authority: certificate file that the server's is verified against.
        data: as the client's `--data`.
        state, cache: folders where the client writes; else where it does by default.
        root: where `/proc`, `/sys`, `/etc` and `/boot` lie.
    """

    bundle: Path | None = None
    server: str | None = None
    authority: Path | None = None
    data: str | None = None
    state: Path | None = None
    cache: Path | None = None
    root: Path = field(default_factory=lambda: Path("/"))

    def __post_init__(self) -> None:
        if self.bundle is not None and self.server is not None:
            raise ConfigError("--bundle names its own server; leave out --server, or --bundle")
        if self.authority is not None and self.server is None:
            raise ConfigError("--ca goes with --server; a bundle has its own authority in it")
        if self.server is not None:
            parse_server(self.server)


def diagnose(
    subject: Subject, on_check: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """Run every check; one that fails itself is reported as unknown, and the others go on.

    Args:
        subject: what is looked at.
        on_check: called with the name of each check before it runs.

    Raises:
        ConfigError: if the subject contradicts itself; no check raises.
    """
    findings: list[Finding] = []
    for name, check in CHECKS:
        on_check(name)
        try:
            findings += check(subject)
        except Exception as error:  # what no check foresaw must not hide what the others see
            findings.append(
                Finding(name, UNKNOWN, f"this check failed: {type(error).__name__}: {error}")
            )
    return findings


def _machine(subject: Subject) -> list[Finding]:
    return [machine_finding(this_machine(subject.root)), this_python()]


def _memory(subject: Subject) -> list[Finding]:
    memory = meminfo(subject.root)
    return [memory_finding(memory), swap_finding(memory, subject.root)]


def _cgroup(subject: Subject) -> list[Finding]:
    return [cgroup_finding(subject.root)]


def _disk(subject: Subject) -> list[Finding]:
    state = subject.state or os.environ.get("FLEET_STATE") or "~/.local/state/fleet"
    cache = subject.cache or os.environ.get("FLEET_CACHE") or "~/.cache/fleet/features"
    folders = expanded(state, "state folder"), expanded(cache, "cache folder")
    installation = None if project_installed() else Path.home()
    return disk_findings(*(Path(os.path.abspath(folder)) for folder in folders), installation)


def _torch(subject: Subject) -> list[Finding]:
    return [torch_finding(_probe(subject), project_installed())]


def _probe(subject: Subject) -> Probe:
    return probe_torch(this_machine(subject.root).kernel)


def _power(subject: Subject) -> list[Finding]:
    return [this_power(subject.root), temperature_finding(subject.root), this_time_sync()]


def _bundle(subject: Subject) -> list[Finding]:
    if subject.bundle is None:
        return []
    try:
        user = os.getuid() if hasattr(os, "getuid") else 0
        return [bundle_finding(read_bundle(subject.bundle), user)]
    except ConfigError as error:
        return [problem("bundle", error)]


def _server(subject: Subject) -> list[Finding]:
    if subject.bundle is None and subject.server is None:
        remedy = "give --bundle pi-01.tar.gz, or --server HOST:PORT --ca ca.crt"
        return [Finding("server", UNKNOWN, _NOT_ASKED, remedy)]
    try:
        if subject.bundle is not None:
            server = bundle_server(read_bundle(subject.bundle))
        else:
            authority = read_authority(subject.authority) if subject.authority else None
            server = parse_server(str(subject.server), authority)
    except ConfigError as error:
        return [problem("server", error)]
    return server_findings(call(server), time.time())


def _data(subject: Subject) -> list[Finding]:
    if subject.data is None:
        return [Finding("data", UNKNOWN, _NOT_ASKED, "give --data DIR")]
    return [images_finding(subject.data, readable=project_installed())]


CHECKS: tuple[tuple[str, Callable[[Subject], list[Finding]]], ...] = (
    ("machine", _machine),
    ("memory", _memory),
    ("memory cgroup", _cgroup),
    ("disk", _disk),
    ("PyTorch", _torch),
    ("power", _power),
    ("bundle", _bundle),
    ("server", _server),
    ("data", _data),
)
