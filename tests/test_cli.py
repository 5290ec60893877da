import json
import subprocess
import sys
import tomllib

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from fleet.baselines import CONTENDERS
from fleet.cli import main
from fleet.config import default_settings
from fleet.records import RoundReport, RunRecord

SMALL = (
    *("--clients", "2", "--rounds", "1", "--train-examples", "60", "--test-examples", "30"),
    *("--image-size", "32", "--local-epochs", "1", "--blocks", "0,1"),
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = invoke("simulate", *SMALL, "--run-dir", str(folder))
    assert result.exit_code == 0, result.output
    return folder


def invoke(*arguments):
    return CliRunner().invoke(main, arguments)


def test_simulate_has_an_option_for_every_setting():
    text = invoke("simulate", "--help").output
    for key in default_settings():
        assert f"--{key}" in text


def test_options_reach_the_run(run_dir):
    settings = tomllib.loads((run_dir / "config.toml").read_text())["settings"]
    assert settings["clients"] == 2
    assert settings["blocks"] == "0,1"
    assert settings.keys() == default_settings().keys()


def test_a_run_ends_with_its_page_and_pictures(run_dir):
    page = (run_dir / "report.html").read_text()
    assert page.count("<svg") >= 3 and "Who took part" in page


def test_report_prints_the_table_and_the_paths(run_dir):
    text = invoke("report", str(run_dir)).output
    assert "acc. %" in text
    assert "Who took part" in text and "Shares by k" in text and "headers" in text
    assert str(run_dir / "model.safetensors") in text.replace("\n", "")


def test_report_in_json_is_the_summary_and_the_rounds(run_dir):
    result = invoke("report", str(run_dir), "--format", "json")
    lines = (run_dir / "rounds.jsonl").read_text().splitlines()
    values, summary = json.loads(result.stdout), json.loads((run_dir / "summary.json").read_text())
    clients = values.pop("participation")["clients"]
    assert [(one["blocks"], one["asked"], one["counted"]) for one in clients] == [
        (0, 1, 1),
        (1, 1, 1),
    ]
    for link in ("up", "down"):
        assert sum(one[f"bytes_{link}"] for one in clients) == summary[f"bytes_{link}"] > 0
        assert sum(values["bytes_by_role"][link].values()) == summary[f"bytes_{link}"]
    del values["bytes_by_role"]
    assert values == summary | {
        "ended": True,
        "per_round": [json.loads(line) for line in lines],
    }


def test_report_in_json_of_a_run_under_way_has_the_totals_so_far(tmp_path):
    record = RunRecord.create(str(tmp_path / "run"), {})
    record.add_round(RoundReport(server_round=0, accuracy=0.1, loss=float("nan")))
    record.add_round(RoundReport(server_round=1, accuracy=0.5, loss=float("inf"), bytes_up=3))
    result = invoke("report", str(record.path), "--format", "json")
    assert not {"NaN", "Infinity"} & set(result.stdout.split())
    values = json.loads(result.stdout)
    assert [one["accuracy"] for one in values.pop("per_round")] == [0.1, 0.5]
    assert values == {
        "accuracy": 0.5,
        "loss": None,
        "rounds": 1,
        "bytes_up": 3,
        "bytes_down": 0,
        "peak_client_bytes": 0,
        "seconds": 0.0,
        "refused": 0,
        "late": 0,
        "full_states": 0,
        "abandoned_rounds": 1,
        "participation": {"clients": [], "by_blocks": []},
        "bytes_by_role": {"up": {}, "down": {}},
        "ended": False,
    }


def test_report_in_json_of_a_run_before_its_first_round(tmp_path):
    record = RunRecord.create(str(tmp_path / "run"), {})
    result = invoke("report", str(record.path), "--format", "json")
    assert json.loads(result.stdout) == {
        "ended": False,
        "rounds": 0,
        "participation": {"clients": [], "by_blocks": []},
        "bytes_by_role": {"up": {}, "down": {}},
        "per_round": [],
    }


def test_report_of_a_folder_that_cannot_be_written_still_prints(tmp_path):
    record = RunRecord.create(str(tmp_path / "run"), {})
    record.add_round(RoundReport(server_round=0, accuracy=0.123, loss=1.0))
    record.page_path.mkdir()  # permissions would not stop root
    result = invoke("report", str(record.path))
    assert result.exit_code == 0
    assert "12.3" in result.stdout
    assert f"Warning: cannot write page {record.page_path}: Is a directory" in result.stderr
    values = json.loads(invoke("report", str(record.path), "--format", "json").stdout)
    assert len(values["per_round"]) == 1


def test_report_of_a_record_that_lost_its_rounds_leaves_the_page_as_it_was(tmp_path):
    record = RunRecord.create(str(tmp_path / "run"), {})
    for number in range(3):
        record.add_round(RoundReport(server_round=number, accuracy=0.5, loss=1.0))
    record.write_summary({"rounds": 2})
    assert invoke("report", str(record.path)).exit_code == 0
    page, rounds = record.page_path.read_bytes(), record.rounds_path.read_bytes()
    other = RunRecord.create(str(tmp_path / "other"), {})
    other.add_round(RoundReport(server_round=0, accuracy=0.5, loss=1.0))
    for damage, text in (
        (rounds[:100], "is damaged: it has no round, and summary.json beside it says 2 rounds"),
        (rounds.replace(b"0.5", b'"x"', 1), "accuracy must be a number or null, got 'x'; remove"),
    ):
        record.rounds_path.write_bytes(damage)
        against = invoke("report", str(other.path), "--against", str(record.path))
        for result in (against, invoke("report", str(record.path))):
            assert result.exit_code == 1
            assert text in result.output and "Traceback" not in result.output
            assert result.stdout == ""
    assert record.page_path.read_bytes() == page
    assert not other.page_path.exists()
    record.rounds_path.write_bytes(rounds)
    record.summary_path.write_text("{")
    result = invoke("report", str(record.path))
    assert result.exit_code == 1 and "summary.json is not a summary: " in result.output
    assert record.page_path.read_bytes() == page


def test_against_draws_another_run_into_page_and_picture(run_dir, tmp_path):
    other = RunRecord.create(str(tmp_path / "other-run"), {})
    other.add_round(RoundReport(server_round=0, accuracy=0.1, loss=1.0))
    picture = tmp_path / "picture.svg"
    options = ("--against", str(other.path), "--picture", str(picture))
    result = invoke("report", str(run_dir), *options)
    assert result.exit_code == 0, result.output
    page = (run_dir / "report.html").read_text()
    assert picture.read_text().startswith("<svg")
    for text in (page, picture.read_text()):
        assert ">run</text>" in text and ">other-run</text>" in text
    assert not other.page_path.exists()
    invoke("report", str(run_dir))
    assert "other-run" not in (run_dir / "report.html").read_text()


def test_against_refuses_a_folder_without_a_run(run_dir, tmp_path):
    result = invoke("report", str(run_dir), "--against", str(tmp_path))
    assert result.exit_code == 1
    assert f"{tmp_path} holds no run: there is no config.toml in it" in result.output


def test_a_name_that_is_too_long_for_a_folder_is_refused_without_a_traceback(run_dir):
    name = "a" * 300
    for arguments in ((name,), (str(run_dir), "--against", name)):
        result = invoke("report", *arguments)
        assert result.exit_code == 1 and "Traceback" not in result.output
        assert f"/{name}: File name too long; name the folder of a run" in result.output
        assert "cannot read /" in result.output
    result = invoke("compare", "--seeds", "1", "--out", name)
    assert result.exit_code == 1
    assert f"/{name}: File name too long; name another folder with --out" in result.output
    result = invoke("simulate", "--resume", name)
    assert f"/{name} holds no run: there is no config.toml in it" in result.output


def test_a_picture_that_cannot_be_written_is_refused_without_a_traceback(run_dir, tmp_path):
    result = invoke("report", str(run_dir), "--picture", str(tmp_path))
    assert result.exit_code == 1
    text = f"cannot write picture {tmp_path}: Is a directory; name another file with --picture"
    assert text in result.output


def test_simulate_in_json_prints_nothing_else_on_standard_output(tmp_path):
    result = invoke("simulate", *SMALL, "--run-dir", str(tmp_path / "run"), "--format", "json")
    assert set(json.loads(result.stdout)) == {
        "accuracy",
        "loss",
        "rounds",
        "bytes_up",
        "bytes_down",
        "peak_client_bytes",
        "seconds",
        "refused",
        "late",
        "full_states",
        "abandoned_rounds",
        "strategy",
        "seed",
        "plan_digest",
        "engine",
    }


def test_a_recipe_is_read_and_options_go_before_it(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('momentum = 0.5\nblocks = "1"')
    options = [*SMALL, "--blocks", "0"]
    result = invoke("simulate", str(recipe), *options, "--run-dir", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["settings"]
    assert (settings["blocks"], settings["momentum"]) == ("0", 0.5)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("ruonds = 3", "unknown setting ruonds; known: rounds, "),
        ("rounds = 'three'", "rounds must be int, got 'three'"),
        ("rounds =", "is not TOML"),
        (b"data = '\xff'", "is not TOML: 'utf-8' codec can't decode byte 0xff"),
        ("settings = 3", "unknown setting settings; fleet simulate --help lists the "),
        (
            "rounds = 3\n[settings]\nseed = 1",
            "has rounds beside [settings]; move it into [settings], or remove the header",
        ),
        (
            "seeds = 3\n[settings]\nrounds = 1",
            "recipe.toml is one of several runs; run them with: fleet compare ",
        ),
        (None, "cannot read recipe"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_without_a_traceback(tmp_path, content, text):
    recipe = tmp_path / "recipe.toml"
    if content is not None:
        recipe.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = invoke("simulate", str(recipe))
    assert result.exit_code == 1
    assert text in result.output
    assert "Traceback" not in result.output


def test_a_run_is_repeated_from_its_own_config(run_dir, tmp_path):
    again = tmp_path / "again"
    result = invoke("simulate", str(run_dir / "config.toml"), "--run-dir", str(again))
    assert result.exit_code == 0, result.output
    first, second = (
        tomllib.loads((folder / "config.toml").read_text())["settings"]
        for folder in (run_dir, again)
    )
    assert second == first | {"run-dir": str(again)}
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run_dir, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def test_an_attacked_run_is_repeated_with_its_attack(tmp_path):
    first, again, calm = (tmp_path / name for name in ("first", "again", "calm"))
    hostile = ("--attack", "gaussian:0.1", "--hostile", "0.5")
    for recipe, folder, options in (
        ((), first, (*SMALL, *hostile)),
        ((str(first / "config.toml"),), again, ()),
        ((str(first / "config.toml"),), calm, ("--attack", "", "--hostile", "0")),
    ):
        result = invoke("simulate", *recipe, *options, "--run-dir", str(folder))
        assert result.exit_code == 0, result.output
    ours, theirs, honest = (load_file(f / "model.safetensors") for f in (first, again, calm))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert any(not torch.equal(ours[name], honest[name]) for name in ours)
    tables = [tomllib.loads((f / "config.toml").read_text()) for f in (first, again, calm)]
    assert tables[0]["simulation"] == tables[1]["simulation"]
    assert "simulation" not in tables[2]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("simulation = 3", "simulation must be a table, got 3"),
        ("[simulation]\nlag = 3", "[simulation] has lag; known: attack, hostile, drop"),
        ('engine = "warp"', "unknown engine warp; known: local, flower"),
        ("workers = 0", "workers must be a whole number from 1 on, or auto; got 0"),
        ("[settings]\nseed = 1\ndrop = 2", "drop must be a number in [0, 1), got 2"),
        (
            "drop = 0.1\n[simulation]\ndrop = 0.2",
            "has drop = 0.1 among its settings and drop = 0.2 in [simulation]; leave one of them",
        ),
        ("[simulation]\ndrop = 'all'", "drop must be a number in [0, 1), got 'all'"),
    ],
)
def test_a_simulation_table_that_is_wrong_is_refused(tmp_path, content, text):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(content)
    result = invoke("simulate", str(recipe), "--run-dir", str(tmp_path / "run"))
    assert result.exit_code == 1
    assert text in result.output
    assert "Traceback" not in result.output


def test_a_folder_without_a_run_is_refused(tmp_path):
    result = invoke("report", str(tmp_path))
    assert result.exit_code == 1
    assert "holds no run" in result.output


TINY = (
    *("--backbone", "mobilenet_v3_small", "--image-size", "32", "--batch-size", "4"),
    *("--blocks", "2", "--repetitions", "1", "--no-resident"),
)


TINIEST = ("--backbone", "timm:test_efficientnet", *TINY[2:])  # has two blocks


def measure(*arguments, of=TINY):
    result = invoke("measure", *of, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_measure_in_json_is_the_contract():
    values = json.loads(measure("--format", "json"))
    contract = (
        *("saved_bytes", "peak_bytes", "resident_bytes"),
        *("cpu_seconds", "flops", "trainable_bytes"),
    )
    assert tuple(values)[: len(contract)] == contract
    assert values["resident_bytes"] is None  # left out here
    assert all(values[key] > 0 for key in contract if key != "resident_bytes")
    asked = {"method": "mobiletl", "stash": "recompute", "blocks": 2, "cached": False}
    assert {key: values[key] for key in asked} == asked


@pytest.mark.slow  # the process is that of fleet/measure/test_resident
def test_measure_takes_resident_growth_in_a_process_of_its_own():
    value = json.loads(measure("--resident", "--format", "json"))["resident_bytes"]
    assert value is None or value > 2**20


def test_measure_prints_what_it_measured():
    text = measure("--cached", "--stash", "int8")
    assert "mobilenet_v3_small, mobiletl, 2 blocks, stash int8, from cached features" in text
    assert "32 px, batch 4" in text
    for noun in ("kept for backward", "allocator peak", "resident growth", "CPU", "GFLOP"):
        assert noun in text
    (growth,) = (line for line in text.splitlines() if line.startswith("resident growth"))
    assert growth.split()[-1] == "–"


def test_measure_takes_all_blocks():
    assert json.loads(measure("--blocks", "all", "--format", "json"))["blocks"] == 11


def test_measure_compares_all_methods_side_by_side():
    more = ("--backbone", "mobilenet_v3_small", "--compare", "--cached", "--format", "json")
    values = json.loads(measure(*more, of=TINIEST))
    assert len(values) == 2 * 13
    assert {v["backbone"] for v in values} == {"timm:test_efficientnet", "mobilenet_v3_small"}
    by_method = {v["method"]: v for v in values if v["backbone"] == "mobilenet_v3_small"}
    assert by_method["blocks"]["cached"] and not by_method["full"]["cached"]
    assert by_method["full"]["flops"] > by_method["blocks"]["flops"]


def test_measure_compares_in_markdown_and_in_a_table():
    lines = measure("--compare", "--format", "markdown", of=TINIEST).splitlines()
    assert lines[0].startswith("32 px, batch 4, weights none, one thread, torch ")
    table = [line.strip("| ").split(" | ") for line in lines[2:] if "---" not in line]
    assert {len(row) for row in table} == {15}
    assert table[1][:2] == ["timm:test_efficientnet", "full"]
    text = measure("--compare", of=TINIEST)
    for method in (row[1] for row in table[1:]):
        assert method in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--backbone", "mobilenet_v9", "--compare"), "unknown backbone mobilenet_v9; examples"),
        (("--backbone", "mobilenet_v2"), "2 backbones are for --compare; give one, or add it"),
        (("--method", "lora"), "unknown method lora; known: mobiletl"),
        (("--stash", "zip"), "unknown stash zip; known: recompute"),
        (("--blocks", "12"), "blocks is 12, mobilenet_v3_small has 11; choose 0 to 11"),
        (("--blocks", "12", "--compare"), "blocks is 12, mobilenet_v3_small has 11"),
        (("--blocks", "most"), "blocks must be a number or all, got most"),
        (("--image-size", "16"), "image-size must be at least 32 pixels"),
        (("--batch-size", "0"), "batch-size must be at least 1, got 0"),
        (("--repetitions", "0"), "repetitions must be at least 1, got 0"),
        (("--method", "full", "--batch-size", "1"), "full cannot train on a batch of one image"),
        (("--method", "full", "--cached"), "leaves no block frozen whose output could be cached"),
        (("--method", "full", "--compare"), "--compare measures all methods and stashes"),
    ],
)
def test_what_cannot_be_measured_is_refused_without_a_traceback(arguments, text):
    result = invoke("measure", *TINY, *arguments)
    assert result.exit_code == 1
    assert text in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_backbones_are_all_known_before_one_is_measured():
    result = invoke("measure", *TINIEST, "--backbone", "mobilenet_v9", "--compare")
    assert result.stderr.startswith("Error: unknown backbone mobilenet_v9")  # no progress


def test_help_of_measure_names_every_method():
    text = " ".join(invoke("measure", "--help").output.split()).replace("- ", "-")
    assert all(method in text for method in CONTENDERS)


def test_help_does_not_wait_for_pytorch():
    code = "import sys, fleet.cli; print({'torch', 'torchvision', 'flwr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
