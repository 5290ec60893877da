import errno
import shutil
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import click
import pytest
from flwr.cli import install
from flwr.cli.install import install_from_fab

from fleet.deploy import installed_app
from fleet.deploy.app_bundle import build_app
from fleet.deploy.installed_app import install_whole


@pytest.fixture(scope="module")
def bundle() -> bytes:
    return build_app()


@pytest.fixture
def apps(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "apps"


def folders(apps: Path) -> list[Path]:
    """Those that Flower would take for an app."""
    return [path for path in apps.iterdir() if path.is_dir() and not path.name.startswith(".")]


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_app_is_as_flower_installs_it_and_where_flower_looks_for_it(apps, bundle, tmp_path):
    flowers = install_from_fab(bundle, tmp_path / "flowers", skip_prompt=True)
    ours = install_whole(bundle)
    assert ours == apps / flowers.name
    assert content(ours) == content(flowers)
    assert [path.name for path in apps.parent.iterdir()] == ["apps"]


def test_an_app_is_unpacked_once(apps, bundle, monkeypatch):
    folder = install_whole(bundle)
    monkeypatch.setattr(install, "install_from_fab", None)
    assert install_whole(bundle) == folder


def test_half_an_app_that_flower_left_is_made_whole(apps, bundle):
    whole = content(install_whole(bundle))
    shutil.rmtree(apps)
    folder = install_from_fab(bundle, apps.parent, skip_prompt=True)
    (folder / "pyproject.toml").unlink()
    assert install_from_fab(bundle, apps.parent, skip_prompt=True) == folder
    assert content(folder) != whole  # as Flower leaves it
    assert install_whole(bundle) == folder
    assert content(folder) == whole


def test_an_app_whose_folder_is_gone_is_unpacked_again(apps, bundle):
    folder = install_whole(bundle)
    whole = content(folder)
    shutil.rmtree(folder)
    assert content(install_whole(bundle)) == whole


def test_an_app_of_the_same_first_digits_is_not_taken_for_it(apps, bundle):
    """Flower names a folder by eight digits of an app's hash."""
    folder = install_whole(bundle)
    (mark,) = apps.glob(".whole-*")
    mark.rename(mark.with_name(".whole-" + "0" * 64))  # so it was another app's
    (folder / "pyproject.toml").write_text("another app's")
    assert install_whole(bundle) == folder
    assert "another" not in (folder / "pyproject.toml").read_text()
    assert len([*apps.glob(".whole-*")]) == 1


def test_a_full_disk_leaves_nothing_that_passes_for_an_app(apps, bundle, monkeypatch):
    def no_room(source, target, **others):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(shutil, "copytree", no_room)
        with pytest.raises(OSError, match="No space left"):
            install_whole(bundle)
    assert not folders(apps)
    assert "pyproject.toml" in content(install_whole(bundle))


def test_whoever_is_killed_meanwhile_leaves_nothing_that_passes_for_an_app(apps, bundle, tmp_path):
    (tmp_path / "bundle").write_bytes(bundle)
    code = """
import os, shutil, signal, sys
from pathlib import Path
from fleet.deploy.installed_app import install_whole
copytree, copied = shutil.copytree, []
def killed(*arguments, **named):
    copied.append(arguments)
    if len(copied) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return copytree(*arguments, **named)
shutil.copytree = killed
install_whole(Path(sys.argv[1]).read_bytes())
"""
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "bundle"], check=False)
    assert killed.returncode == -9
    assert not folders(apps)
    assert {"fleet", "clients", "strategies"} <= {p.name for p in install_whole(bundle).iterdir()}
    assert len([path for path in apps.iterdir() if path.is_dir()]) == 1


def test_two_processes_install_one_after_the_other(apps, bundle):
    context = get_context("fork")
    with context.Pool(2) as pool:
        first, second = pool.map(install_whole, [bundle, bundle])
    assert first == second
    assert "pyproject.toml" in content(first)


def test_a_damaged_bundle_is_refused_as_by_flower(apps, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(install, "_verify_hashes", lambda *args: False)
    with pytest.raises(click.ClickException, match="hashes couldn't be verified"):
        install_whole(bundle)
    assert not folders(apps)


def test_what_is_installed_is_on_the_disk_before_it_counts(apps, bundle, monkeypatch):
    synced = []
    monkeypatch.setattr(installed_app, "sync_folder", synced.append)
    written = []
    monkeypatch.setattr(
        installed_app, "write_durably", lambda path, parts: written.append(len(synced))
    )
    folder = install_whole(bundle)
    files = {path.relative_to(folder) for path in folder.rglob("*")}
    assert {Path(*path.parts[-len(f.parts) :]) for f in files for path in synced} >= files
    assert written == [len(synced)]
