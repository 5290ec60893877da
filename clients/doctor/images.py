"""The device's own images, read as the client would read them, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from clients.doctor.findings import OK, PROBLEM, UNKNOWN, WARNING, Finding, problem
from fleet.device_files import image_folder, links_lost_to_services, told_of_links
from fleet.errors import ConfigError

SECONDS = 600  # every image is opened: 0.1 to 1 ms each, and a Pi's card is slow
FEW_EXAMPLES = 5  # of a class; fewer and the held-out fifth has none

_REPAIR = "put the images of each class in a folder of its own: DIR/CLASS/image.jpg"
_READ = """
import json, sys, warnings
from fleet.data import load_device_data
from fleet.errors import FleetError
try:
    counts = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        training, held_out = load_device_data(sys.argv[1])
    for images in (training, held_out):
        for label in images.labels:
            name = images.classes[label]
            counts[name] = counts.get(name, 0) + 1
    skipped = [str(each.message) for each in told] if training.skipped else []
    print(json.dumps({"counts": counts, "skipped": skipped}))
except FleetError as error:
    print(json.dumps({"fault": str(error)}))
"""


def images_finding(data: str, *, readable: bool) -> Finding:
    """Classes and counts of the images that a client would train on.

    Args:
        data: as the client's `--data`.
        readable: whether the project's own packages are there to read them; else class
            folders are listed.
    """
    try:
        folder = image_folder(data)
    except ConfigError as error:
        return problem("data", error)
    found = _seen_finding(folder, readable)
    told = told_of_links(folder, links_lost_to_services(folder))
    if told is None or found.state == PROBLEM:
        return found
    fact, remedy = told
    remedies = [found.remedy] if found.remedy else []
    return Finding("data", WARNING, f"{found.fact}; {fact}", "; ".join([*remedies, remedy]))


def _seen_finding(folder: Path, readable: bool) -> Finding:
    if not readable:
        return listed_finding(folder)
    told = read_as_client(folder)
    if told is None:
        listed = listed_finding(folder)
        if listed.state != UNKNOWN:
            return listed
        return replace(
            listed,
            fact=f"{listed.fact}; the client's own reader did not run, or took over {SECONDS} s",
            remedy="see the line about PyTorch, or try again with fewer images",
        )
    return read_finding(folder, told)


def read_as_client(folder: Path) -> dict[str, object] | None:
    """What the project's own reader says.

    It is `counts`, class → examples, with what is said of those `skipped`, or a `fault`.

    Returns:
        None if it could not run, or took too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _READ, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        return json.loads(done.stdout.decode().strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def read_finding(folder: Path, told: dict[str, object]) -> Finding:
    """From what `read_as_client` said."""
    check = "data"
    if "fault" in told:
        return problem(check, told["fault"], _REPAIR)
    counts: dict[str, int] = told["counts"]  # type: ignore[assignment]
    seen = f"{sum(counts.values())} images in {folder}: {_listing(counts)}"
    if skipped := told.get("skipped"):
        return Finding(
            check,
            WARNING,
            f"{seen}; {' '.join(skipped)}",
            "repair or remove them: each round leaves out what it cannot read",
        )
    if few := sorted(name for name, count in counts.items() if count < FEW_EXAMPLES):
        return Finding(
            check,
            WARNING,
            seen,
            f"add images to {', '.join(few[:5])}: fewer than {FEW_EXAMPLES} teach little",
        )
    return Finding(check, OK, seen)


def listed_finding(folder: Path) -> Finding:
    """Class folders and how many files are in them, without opening any."""
    check = "data"
    try:
        top = folder / "train" if (folder / "train").is_dir() else folder
        counts = {
            child.name: sum(len(files) for _, _, files in os.walk(child))
            for child in sorted(top.iterdir())
            if child.is_dir() and not child.name.startswith(".")
        }
    except OSError as error:
        return Finding(
            check, PROBLEM, f"{error.filename}: {error.strerror}", "make it readable for this user"
        )
    if not counts:
        return Finding(check, PROBLEM, f"{top} has no class folders", _REPAIR)
    return Finding(
        check,
        UNKNOWN,
        f"{sum(counts.values())} files in {top}: {_listing(counts)}",
        "images are opened once the project is installed",
    )


def _listing(counts: dict[str, int], most: int = 12) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:most]]
    more = [f"and {len(counts) - most} more classes"] if len(counts) > most else []
    return ", ".join(shown + more)
