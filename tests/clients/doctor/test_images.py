import json
import sys

import pytest
from PIL import Image

import fleet.data  # noqa: F401 - for its forks
from clients.doctor import images
from clients.doctor.images import images_finding, listed_finding
from fleet.deploy.addresses import Address
from fleet.deploy.client import ClientOptions
from fleet.errors import ConfigError
from tests.forked import Forked


@pytest.fixture
def folder(tmp_path):
    for name, count in {"cat": 6, "dog": 9}.items():
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def quick_reader(monkeypatch):
    """The client's own reader, in a fork in place of a fresh process."""

    def read(folder):
        def be_reader():
            sys.argv = ["", str(folder)]
            exec(images._READ, {})

        reader = Forked(be_reader, sys.__stderr__)
        said = reader.stdout.read()
        assert reader.wait() == 0
        return json.loads(said.splitlines()[-1])

    monkeypatch.setattr(images, "read_as_client", read)


def test_classes_are_counted_as_the_client_reads_them(folder):
    found = images_finding(str(folder), readable=True)
    assert (found.check, found.state) == ("data", "ok")
    assert found.fact == f"15 images in {folder}: cat 6, dog 9"


def test_before_the_installation_files_are_listed_and_not_opened(folder):
    (folder / "cat" / "0.png").write_bytes(b"no image")
    found = images_finding(str(folder), readable=False)
    assert found.state == "unknown"
    assert found.fact == f"15 files in {folder}: cat 6, dog 9"
    assert found.remedy == "images are opened once the project is installed"


@pytest.mark.usefixtures("quick_reader")
def test_an_unreadable_image_is_named_and_keeps_no_device_from_training(folder):
    (folder / "cat" / "0.png").write_bytes(b"no image")
    found = images_finding(str(folder), readable=True)
    assert found.state == "warning"
    assert found.fact.startswith(f"14 images in {folder}: cat 5, dog 9; skipped 1 unreadable image")
    assert "cat/0.png" in found.fact
    assert found.remedy.startswith("repair or remove them")


@pytest.mark.usefixtures("quick_reader")
def test_a_class_with_few_images_is_a_warning(folder):
    for i in range(6, 9):
        (folder / "dog" / f"{i}.png").unlink()
    for i in range(3, 6):
        (folder / "cat" / f"{i}.png").unlink()
    found = images_finding(str(folder), readable=True)
    assert found.state == "warning"
    assert found.remedy == "add images to cat: fewer than 5 teach little"


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.usefixtures("quick_reader")
def test_a_folder_without_classes_or_none_at_all_is_a_problem(tmp_path, readable):
    empty = images_finding(str(tmp_path), readable=readable)
    gone = images_finding(str(tmp_path / "gone"), readable=readable)
    assert (empty.state, gone.state) == ("problem", "problem")
    assert "class folders" in empty.fact
    assert str(tmp_path / "gone") in gone.fact
    assert empty.remedy.startswith("put the images of each class in a folder of its own")


@pytest.mark.parametrize("readable", [True, False])
def test_what_is_no_folder_is_refused_in_the_words_of_the_client(tmp_path, monkeypatch, readable):
    """A built-in data set too: a device trains on images of its own."""
    monkeypatch.chdir(tmp_path)
    found = images_finding("digits", readable=readable)
    node = {"name": "pi-01", "data": str(tmp_path / "digits")}
    options = ClientOptions(state=tmp_path, node=node, server=Address.parse("127.0.0.1"))
    with pytest.raises(ConfigError) as refused:
        options.check()
    assert found.state == "problem"
    assert f"{found.fact}; {found.remedy}" == str(refused.value)
    assert found.fact == f"--data {tmp_path / 'digits'} is no folder"
    assert found.remedy.startswith("name one that has a folder of images for each class")


@pytest.mark.usefixtures("quick_reader")
def test_a_folder_that_is_named_as_a_built_in_data_set_is_a_folder(folder, monkeypatch):
    (folder / "digits").mkdir()
    for name in ("cat", "dog"):
        (folder / name).rename(folder / "digits" / name)
    monkeypatch.chdir(folder)
    assert images_finding("digits", readable=True).fact.endswith("/digits: cat 6, dog 9")


def test_the_training_part_is_what_is_listed(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "train").symlink_to(folder)
    assert listed_finding(root).fact.startswith(f"15 files in {root / 'train'}")


def test_many_classes_are_shortened(tmp_path):
    for i in range(15):
        (tmp_path / f"class-{i:02}").mkdir()
    assert listed_finding(tmp_path).fact.endswith("class-11 0, and 3 more classes")


def test_where_pytorch_crashes_files_are_listed(folder, monkeypatch, tmp_path_factory):
    code = tmp_path_factory.mktemp("crash")
    (code / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.syspath_prepend(str(code))
    found = images_finding(str(folder), readable=True)
    assert found.state == "unknown"
    assert found.fact.startswith(f"15 files in {folder}: cat 6, dog 9; the client's own reader")
    assert found.remedy.startswith("see the line about PyTorch")


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.usefixtures("quick_reader")
def test_links_behind_which_a_service_sees_nothing_are_counted_and_the_first_is_named(
    folder, tmp_path_factory, readable
):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "far.png"  # below /tmp
    Image.new("RGB", (8, 8)).save(elsewhere)
    (folder / "dog" / "far.png").symlink_to(elsewhere)
    (folder / "dog" / "gone.png").symlink_to("nowhere.png")
    found = images_finding(str(folder), readable=readable)
    assert found.state == "warning"
    assert found.fact.endswith(
        f"; 2 links in {folder} lead to nothing, or to what a service does not see, and what lies "
        f"there takes no part; the first is {folder / 'dog' / 'far.png'}, to {elsewhere}"
    )
    assert found.remedy.endswith(f"copy the images into {folder}")
