"""Compare strategies, plans, codecs, partitions, anything, over seeds: `fleet compare`."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fleet.config import default_settings, read_config, read_toml
from fleet.errors import ConfigError, FleetError
from fleet.records import RunRecord
from fleet.report.names import printable
from simulations.adversity import OF_ADVERSITY, Adversity
from simulations.cell_pool import OnRound, run_cells
from simulations.cells import Cell, CellFolders, Keys
from simulations.checks import check_settings
from simulations.comparison import (
    CELLS,
    COLUMNS,
    RECIPE,
    WRITTEN,
    ComparedRow,
    Comparison,
)
from simulations.recipe import Recipe, Variant, group_of, recipe_of

RUNS = "runs"
_NOT_RUN = "not run yet: the comparison was stopped", ""

# Row, seed, how many cells are done, of how many, and why it failed; empty: it did not.
OnCell = Callable[[str, int, int, int, str], None]


def compare(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    jobs: int = 1,
    keep_models: bool = False,
    on_cell: OnCell = lambda *_: None,
    on_round: OnRound = lambda *_: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run what a recipe asks for and is not there yet, and write tables, pictures and a page.

    A run is known by its configuration, its seed, and the code and libraries that decide
    its result. One that failed is tried again the next time; one that is damaged is set
    aside, told of, and run again. Stopped at any time, the same call goes on; tables and
    pictures then show what is there.

    Args:
        recipe: a TOML file, or a mapping of the same form (see `simulations.recipe`).
        out: folder of the comparison; runs lie in its `runs`.
        jobs: cells that run at once, each in a process of its own with one thread.
        keep_models: keep every run's model and page, which take room; runs that are
            there without them are run again.
        on_cell: is told of each new run as it ends.
        on_round: is told of rounds as they end, by another thread.
        on_note: is told what else the user should know.

    Raises:
        ConfigError: for a recipe that will not do, before anything is run; if another
            comparison is running in the folder, or it cannot be written.
    """
    asked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if type(jobs) is not int or jobs < 1:
        raise ConfigError(f"jobs must be a whole number from 1 on, got {jobs!r}")
    if not isinstance(out, str | Path):
        raise ConfigError(f"out must be the path of a folder, got {out!r:.80}")
    variants = asked.variants()
    folder = Path(out).absolute()
    _check_folder(folder)
    with _alone_in(folder):
        folders = CellFolders(folder / RUNS)
        folders.clear()
        keys = Keys()
        rows = [ComparedRow(variant) for variant in variants]
        bare = 0  # runs that are there without a model that is wanted
        asked_for: list[Cell] = []
        waiting: dict[str, list[tuple[ComparedRow, Cell]]] = {}  # rows may share a run
        for row in rows:
            for seed in asked.seeds:
                with _in_row(row.variant):
                    cell = keys.cell(row.variant, seed)
                asked_for.append(cell)
                measured = _measured(folders, cell, on_note)
                if measured and keep_models and not folders.has_model(cell):
                    bare, measured = bare + 1, None
                if measured is None:
                    waiting.setdefault(cell.key, []).append((row, cell))
                else:
                    row.runs[seed] = RunRecord(folders.path(cell)), measured
            if len(row.runs) < len(asked.seeds):  # of others it is known that they can begin
                with _in_row(row.variant):
                    check_settings(read_config(default_settings() | row.variant.settings))
        total = len(rows) * len(asked.seeds)
        done = total - sum(map(len, waiting.values()))
        on_note(f"{done} of {total} runs are there already")
        if bare:
            on_note(
                f"{bare} of {total} runs are there without their models; they are run again, as "
                f"--keep-models asks for them"
            )
        cells = [sharing[0][1] for sharing in waiting.values()]
        had = _runs_of(folder)
        if left_out := had - {cell.key for cell in asked_for}:
            on_note(
                f"{len(left_out)} of {len(had)} runs of the comparison that is in {folder} are not "
                f"asked for now; its tables, pictures and {RECIPE} are replaced, its runs stay"
            )
        if cells:
            on_note(f"begins with {_named(cells[:jobs])}")
        comparison = Comparison(asked, folder, rows)
        try:
            for ended in run_cells(cells, folders.folder, jobs, keep_models, on_round):
                for row, cell in waiting[ended.cell.key]:
                    done += 1
                    if ended.measured is None:
                        row.failed[cell.seed] = ended.reason, ended.details
                    else:
                        row.runs[cell.seed] = RunRecord(folders.path(cell)), ended.measured
                    on_cell(row.variant.name, cell.seed, done, total, ended.reason)
        except BaseException:  # stopped, or the disk is full: show what there is
            for row in rows:
                missing = set(asked.seeds) - row.runs.keys() - row.failed.keys()
                row.failed |= dict.fromkeys(missing, _NOT_RUN)
            if any(row.runs for row in rows):
                with contextlib.suppress(ConfigError):  # the first error is the one to tell
                    comparison.write()
            raise
        comparison.write()
    return comparison


def redraw(folder: str | Path) -> Comparison:
    """Write a comparison's tables, pictures and page again, of the runs that are there.

    Nothing is run. One that is missing or damaged counts as failed.

    Raises:
        ConfigError: if there is no comparison in the folder, another is running there, or it
            cannot be written.
    """
    folder = Path(folder).absolute()
    if not holds_comparison(folder):  # where there is none, none is locked
        raise _no_comparison(folder)
    with _alone_in(folder):
        comparison = read_comparison(folder)
        comparison.write()
    return comparison


def holds_comparison(folder: Path) -> bool:
    """Whether a comparison has written its recipe and cells there."""
    # Path's own is_file raises for a name that is too long.
    return all(os.path.isfile(folder / name) for name in (RECIPE, CELLS))


def read_comparison(folder: str | Path) -> Comparison:
    """A comparison as its folder has it; nothing is run or written.

    Raises:
        ConfigError: if there is none, or it is damaged. A run of it that is missing or
            damaged counts as failed.
    """
    folder = Path(folder).absolute()
    if not holds_comparison(folder):
        raise _no_comparison(folder)
    asked = load_recipe(folder / RECIPE)
    try:
        cells = [json.loads(line) for line in (folder / CELLS).read_text().splitlines()]
        rows = _rows_of(asked, folder, cells)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / CELLS} is damaged: {type(error).__name__}: {error}; run the comparison "
            f"again: fleet compare {folder / RECIPE} --out {folder}"
        ) from error
    return Comparison(asked, folder, rows)


def _no_comparison(folder: Path) -> ConfigError:
    return ConfigError(
        f"{folder} holds no comparison: there is no {RECIPE} with {CELLS} in it; fleet compare "
        f"writes both"
    )


def _rows_of(asked: Recipe, folder: Path, cells: Sequence[Mapping[str, Any]]) -> list[ComparedRow]:
    """The rows of a comparison's `cells.jsonl`, each run held against its digests."""
    folders, rows = CellFolders(folder / RUNS), {}
    for cell in cells:
        settings, name, seed = cell["settings"], cell["row"], cell["seed"]
        told = {key: cell[key] for key in OF_ADVERSITY if key in cell}
        group = group_of(asked.within, settings, cell["engine"], 1, Adversity(**told))
        variant = Variant(
            name=printable(name),
            settings=settings,
            engine=cell["engine"],
            workers=1,
            adversity=told,
            group=group,
        )
        row = rows.setdefault(name, ComparedRow(variant))
        if cell["status"] != "done":
            row.failed[seed] = cell["reason"], cell["details"]
            continue
        one = Cell(variant, seed, Path(cell["run"]).name)
        try:
            measured, why = folders.measured(one), f"its run {cell['run']} is missing"
        except ConfigError as error:
            measured, why = None, f"its run {cell['run']} is damaged: {error}"
        if measured is None:
            row.failed[seed] = why, ""
        else:
            row.runs[seed] = RunRecord(folders.path(one)), measured
    return list(rows.values())


def load_recipe(recipe: Mapping[str, Any] | str | Path) -> Recipe:
    """A recipe from its file, or from a mapping of the same form.

    Raises:
        ConfigError: for one that will not do.
    """
    if not isinstance(recipe, Mapping | str | Path):
        raise ConfigError(
            f"a recipe is the path of a TOML file, or a mapping of the same form; got "
            f"{recipe!r:.80}"
        )
    values = recipe if isinstance(recipe, Mapping) else read_toml(Path(recipe))
    return recipe_of(values, tuple(COLUMNS))


@contextlib.contextmanager
def _in_row(variant: Variant) -> Iterator[None]:
    """Have an error name the row whose runs could not begin.

    Raises:
        ConfigError: naming it.
    """
    try:
        yield
    except FleetError as error:
        raise ConfigError(f"row {variant.name}: {error}") from error


def _measured(
    folders: CellFolders, cell: Cell, on_note: Callable[[str], None]
) -> dict[str, Any] | None:
    try:
        return folders.measured(cell)
    except ConfigError as error:
        place = folders.set_aside(cell)
        on_note(
            f"the run of {cell.variant.name}, seed {cell.seed}, is damaged ({error}); "
            f"it is set aside as {place} and run again"
        )
        return None


def _runs_of(folder: Path) -> set[str]:
    """Keys of the runs in the tables of the comparison in a folder, if there is one."""
    try:
        cells = map(json.loads, (folder / CELLS).read_text().splitlines())
        return {Path(cell["run"]).name for cell in cells if cell["status"] == "done"}
    except (OSError, ValueError, KeyError, TypeError):
        return set()  # of a damaged one nothing is lost


def _named(cells: Sequence[Cell]) -> str:
    first = f"{cells[0].variant.name}, seed {cells[0].seed}"
    return f"{first}, and {len(cells) - 1} more at once" if len(cells) > 1 else first


def _check_folder(folder: Path) -> None:
    """Refuse a folder in which a comparison would write over what is not its own.

    Raises:
        ConfigError: naming it.
    """
    if os.path.isfile(RunRecord(folder).config_path):  # Path's own raises for too long a name
        raise ConfigError(
            f"{folder} is the folder of a run, whose page a comparison would write over; name "
            f"another folder"
        )
    there = [name for name in WRITTEN if os.path.lexists(folder / name)]
    if there and not (CELLS in there and (folder / RUNS).is_dir()):
        raise ConfigError(
            f"{folder} has a file {there[0]} that no comparison wrote, and one would write over "
            f"it; name another folder with --out"
        )


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """The folder, with nobody else at work in it.

    Raises:
        ConfigError: if there is, or it cannot be made.
    """
    try:
        (folder / RUNS).mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot write {folder}: {reason}; name another folder with --out"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released as the process ends
        except BlockingIOError as error:
            raise ConfigError(
                f"another comparison is running in {folder}; wait for it, or name another folder"
            ) from error
        yield
