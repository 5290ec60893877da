import pytest

from fleet import device_files
from fleet.device_files import dead_links, links_lost_to_services, told_of_links


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of images in a home that a service does not see but for it."""
    home = tmp_path / "home"
    (home / "images" / "cat").mkdir(parents=True)
    (tmp_path / "stick" / "dogs").mkdir(parents=True)
    for file in (home / "a.png", home / "images" / "cat" / "b.png", tmp_path / "stick" / "c.png"):
        file.touch()
    monkeypatch.setattr(device_files, "_HIDDEN", (home,))
    return home / "images"


def test_links_are_told_by_what_is_behind_them(data, tmp_path):
    for name, target in {
        "lost": data.parent / "a.png",
        "inside": data / "cat" / "b.png",
        "on-a-stick": tmp_path / "stick" / "c.png",
        "gone": data / "no.png",
        "round": data / "cat" / "round",
        ".hidden": data.parent / "a.png",
    }.items():
        (data / "cat" / name).symlink_to(target)
    (data / "dog").symlink_to(tmp_path / "stick" / "dogs")
    (data / "eel").symlink_to(data.parent)
    cat = data / "cat"
    assert dead_links(data) == [cat / "gone", cat / "round"]
    assert links_lost_to_services(data) == [data / "eel", cat / "gone", cat / "lost", cat / "round"]


def test_a_folder_that_is_itself_behind_a_link_has_its_own_images(data):
    (data / "cat" / "again.png").symlink_to(data / "cat" / "b.png")
    (data.parent / "link").symlink_to(data)
    assert links_lost_to_services(data.parent / "link") == []


def test_without_links_there_is_nothing_to_tell(data):
    assert told_of_links(data, links_lost_to_services(data)) is None
    assert links_lost_to_services(data / "none") == []
