"""What a comparison's recipe says, and what it must not."""

import json
from pathlib import Path

import pytest

import simulations
from fleet.errors import ConfigError
from simulations import compare
from simulations.compare import load_recipe, read_comparison
from simulations.comparison import COLUMNS
from simulations.recipe import parse_axis, parse_seeds, parse_setting


def recipe(**values):
    return load_recipe(values)


def test_axes_are_crossed_with_rows_the_last_fastest():
    asked = recipe(
        rows=[{"name": "plain"}, {"name": "adam", "strategy": "fedadam"}],
        vary={"blocks": ["1", "1,3,5"], "codec": ["float32", "int8"]},
        seeds=3,
    )
    assert asked.num_cells == 24
    variants = asked.variants()
    assert [v.name for v in variants[:3]] == [
        "plain, blocks=1, codec=float32",
        "plain, blocks=1, codec=int8",
        "plain, blocks=1,3,5, codec=float32",
    ]
    last = variants[-1].settings
    assert (last["strategy"], last["blocks"]) == ("fedadam", "1,3,5")
    assert last["codec-up"] == last["codec-down"] == "int8"


def test_what_only_a_simulation_has_is_no_setting_of_the_run():
    (one,) = recipe(settings={"attack": "sign_flip:10", "hostile": 0.2}).variants()
    assert one.adversity == {"attack": "sign_flip:10", "hostile": 0.2}
    assert not {"attack", "seed", "run-dir"} & one.settings.keys()
    (same,) = recipe(simulation={"attack": "sign_flip:10", "hostile": 0.2}).variants()
    assert same == one


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"sedes": 3}, "unknown key sedes; known: seeds, "),
        ({"rounds": 3, "seeds": 2}, "unknown key rounds; .*rounds goes below \\[settings\\]"),
        ({"rounds": 3, "sedes": 2}, "settings: unknown setting sedes; known: schedule and "),
        ({"settings": {"ruonds": 3}}, "settings: unknown setting ruonds; known: rounds "),
        ({"vary": {"strategie": ["fedavg"]}}, "vary: unknown setting strategie; known: strategy"),
        (
            {"settings": {"ruonds": 3}},
            "known: rounds and [0-9]+ more, which fleet simulate --help lists",
        ),
        (
            {"simulation": {"lag": 3}},
            r"\[simulation\] has lag; known: engine, workers, attack, hostile",
        ),
        (
            {"settings": {"drop": 0.1}, "simulation": {"drop": 0.2}},
            r"recipe has drop = 0\.1 among its settings and drop = 0\.2 in \[simulation\]",
        ),
        ({"settings": {"seed": 3}}, "settings: a comparison has no seed; use seeds"),
        ({"columns": ["acuracy"]}, "unknown column acuracy; known: accuracy, "),
        ({"columns": ["accuracy", "accuracy"]}, "columns have accuracy twice; leave one out"),
        ({"within": ["partitoin"]}, "^within: unknown setting partitoin; known: partition and "),
        ({"seeds": 0}, "seeds must be how many, from 1 on, .*; got 0"),
        ({"seeds": [1, 1]}, r"seeds must be .*; got \[1, 1\]"),
        ({"target": 90}, "target must be an accuracy above 0 and up to 1, such as 0.9; got 90"),
        ({"vary": {"blocks": "1"}}, "vary: blocks must be a list of values, got '1'"),
        ({"vary": {"blocks": ["1", "1"]}}, "vary: blocks has 1 twice; leave one out"),
        ({"vary": {"blocks": ["1", 1]}}, "vary: blocks has 1 twice; leave one out"),
        ({"rows": [{"strategy": "fedavg"}]}, "row 1 needs a name, which is text; got None"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "two rows are named a; rename one"),
        (
            {"rows": [{"name": "a", "codec": "int8"}], "vary": {"codec-up": ["int4"]}},
            "codec-up is in row a and in vary; leave one of them out",
        ),
        ({"title": 3}, "title must be text, got 3"),
        (
            {"vary": {"workers": [1, 2]}},
            "vary: workers is for all runs, as it changes none of their results; put it into",
        ),
        ({"rows": [{"name": "a", "workers": 2}]}, "a: workers is for all runs"),
        ({"settings": {"resume": True}}, "settings: a comparison has no resume; the same command"),
    ],
)
def test_a_recipe_that_will_not_do_is_refused_with_the_way_out(values, text):
    with pytest.raises(ConfigError, match=text):
        recipe(**values)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strategy": "fedmagic"}, "row as set: unknown strategy fedmagic; known: fedavg, "),
        (dict([parse_setting("rounds=many")]), "row as set: rounds must be int, got 'many'"),
        (dict([parse_setting("head-start=yes")]), "row as set: head-start must be bool, got 'yes'"),
        ({"codec": "int5"}, "row as set: .*int5.*known"),
        ({"rule": "meen"}, "row as set: .*meen"),
        ({"engine": "warp"}, "row as set: unknown engine warp; known: "),
        ({"workers": 0}, "row as set: workers must be a whole number from 1 on, or auto; got 0"),
        ({"workers": 2, "engine": "flower"}, "row as set: workers is 2, and engine flower has"),
        ({"attack": "sing_flip:10", "hostile": 0.2}, "row as set: unknown attack 'sing_flip:10'"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(settings, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        compare({"settings": settings}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read_or_is_no_toml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read recipe .*: No such file"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("seeds = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML: "):
        load_recipe(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("recipe", "out", "text"),
    [
        (3, "out", "a recipe is the path of a TOML file, or a mapping of the same form; got 3$"),
        (None, "out", "a recipe is the path of a TOML file, .*; got None$"),
        ({}, 3, "^out must be the path of a folder, got 3$"),
        ({1: 2}, "out", "^unknown key 1; known: "),
        (
            {"settings": {1: 2}},
            "out",
            "^settings: unknown setting 1; fleet simulate --help lists the [0-9]+ that there are",
        ),
    ],
)
def test_what_is_given_in_a_wrong_form_is_said_with_the_right_one(recipe, out, text):
    with pytest.raises(ConfigError, match=text):
        compare(recipe, out)


def test_the_command_lines_words():
    assert parse_setting("rounds=5") == ("rounds", 5)
    assert parse_setting("head-start=true") == ("head-start", True)
    assert parse_axis('blocks="1,3,5",5') == ("blocks", ["1,3,5", "5"])
    assert parse_setting('data="my folder"') == ("data", "my folder")
    (one,) = recipe(settings=dict([parse_setting("blocks=3")])).variants()
    assert one.settings["blocks"] == "3"
    assert parse_axis("learning-rate=0.1,0.01") == ("learning-rate", [0.1, 0.01])
    assert parse_seeds("3") == 3
    assert parse_seeds("0,4,7") == [0, 4, 7]


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_setting, "rounds", "--set takes KEY=VALUE, got 'rounds'"),
        (parse_axis, "rounds", "--vary takes KEY=VALUE,VALUE, got 'rounds'"),
        (parse_axis, "blocks=[1]", r"--vary blocks takes text, a number, .*; got \[1\]"),
        (
            parse_axis,
            'blocks="1,3',
            r'--vary blocks: cannot read "1,3 \(unexpected end of data\); a value with commas',
        ),
        (parse_setting, "ruonds=5", "unknown setting ruonds; known: rounds "),
        (parse_seeds, "1,,2", "seeds must be how many, .*; got 1,,2$"),
        (parse_seeds, "1,", "seeds must be how many, .*; got 1,$"),
        (parse_seeds, "three", "seeds must be how many, such as 3, or which, .*; got three"),
    ],
)
def test_words_that_say_nothing_are_refused(parse, text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


@pytest.mark.parametrize("word", ["nan", "inf", "1", "true", "1e3", "2024-01-01"])
def test_a_word_for_a_setting_of_text_is_text_whatever_else_it_looks_like(word):
    for key in ("attack", "codec", "engine", "data", "blocks", "rule"):
        assert parse_setting(f"{key}= {word}") == (key, word)
        assert parse_axis(f"{key}={word},alie") == (key, [word, "alie"])
    assert parse_setting('data="nan"') == ("data", "nan")
    assert parse_setting("rounds=1") == ("rounds", 1)
    asked = recipe(
        settings=dict([parse_setting("hostile=0.5")]),
        vary=dict([parse_axis("attack=nan,alie")]),
    )
    assert [one.adversity["attack"] for one in asked.variants()] == ["nan", "alie"]


def test_settings_alone_are_a_recipe_of_one_run():
    flat = recipe(**{"seed": 4, "rounds": 3, "run-dir": "runs/x", "attack": "nan", "hostile": 0.5})
    assert flat == recipe(seeds=[4], settings={"rounds": 3, "attack": "nan", "hostile": 0.5})
    (path,) = Path(simulations.__file__).parent.glob("recipes/cifar10.toml")
    (one,) = load_recipe(path).variants()
    assert one.settings["data"] == "cifar10" and one.settings["rounds"] == 10
    assert one.name == "as set"


def test_every_column_of_the_issue_is_there():
    assert {"accuracy", "rounds-to-target", "bytes-to-target", "client-memory", "device-flops",
            "seconds", "refused"} <= COLUMNS.keys()  # fmt: skip


EVIL = "\x1b[31mred\n\u202eturned\x00"
HARMLESS = "�[31mred��turned�"


def test_what_a_terminal_would_obey_is_in_no_title_and_no_name():
    asked = recipe(title=EVIL, rows=[{"name": EVIL}], vary={"data": ["digits", f"{EVIL}:x"]})
    assert asked.title == HARMLESS
    assert [name for name, _ in asked.rows] == [HARMLESS]
    assert asked.as_toml().count(HARMLESS) == 2
    names = [variant.name for variant in asked.variants()]
    assert names == [f"{HARMLESS}, data=digits", f"{HARMLESS}, data={HARMLESS}:x"]
    assert asked.variants()[1].settings["data"] == f"{EVIL}:x"  # a path may be what it likes
    asked = recipe(rows=[{"name": "é 日本 “x”"}])  # other scripts stay
    assert [v.name for v in asked.variants()] == ["é 日本 “x”"]


def test_names_that_differ_only_in_what_cannot_be_printed_are_the_same():
    with pytest.raises(ConfigError, match="two rows are named a�; rename one"):
        recipe(rows=[{"name": "a\n"}, {"name": "a\x1b"}])
    with pytest.raises(ConfigError, match="vary: data has a� twice; leave one out"):
        recipe(vary={"data": ["a\n", "a\x1b"]})


def test_nor_is_it_in_those_of_a_comparison_that_an_older_version_wrote(tmp_path):
    title, name = '"\\u001b[31mred\\n\\u202eturned\\u0000"', json.dumps(EVIL)
    (tmp_path / "recipe.toml").write_text(f"title = {title}\n[[rows]]\nname = {title}\n")
    (variant,) = recipe().variants()
    cell = {"seed": 0, "status": "failed", "reason": "killed", "details": "", "engine": "local"}
    cell |= {"settings": dict(variant.settings)}
    (tmp_path / "cells.jsonl").write_text(f'{{"row": {name}, {json.dumps(cell)[1:]}\n')
    table = read_comparison(tmp_path).table()
    assert table.title == table.rows[0][0] == HARMLESS
