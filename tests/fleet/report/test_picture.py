from fleet.records import RunRecord
from fleet.report import accuracy_picture


def test_the_picture_names_every_run(record, rounds, tmp_path):
    other = RunRecord(tmp_path / "other")
    other.path.mkdir()
    for report in rounds:
        other.add_round(report)
    picture = accuracy_picture([record, other])
    assert picture.count('<g id="accuracy-axes_') == 2
    assert ">run</text>" in picture and ">other</text>" in picture


def test_a_seventh_run_is_drawn_too(record):
    assert accuracy_picture([record] * 7).count("M ") > accuracy_picture([record] * 6).count("M ")
