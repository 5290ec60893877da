"""What a comparison's recipe says, and what it must not."""

import pytest

from fleet.errors import ConfigError
from simulations.compare import load_recipe
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
        ({"rounds": 3}, "unknown key rounds; .*rounds goes below \\[settings\\]"),
        ({"settings": {"ruonds": 3}}, "settings: unknown setting ruonds; known: rounds, "),
        ({"vary": {"strategie": ["fedavg"]}}, "vary: unknown setting strategie; known: strategy"),
        (
            {"settings": {"ruonds": 3}},
            "known: rounds, [a-z-]+, [a-z-]+ and [0-9]+ more, which fleet simulate --help lists",
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
        ({"within": ["partitoin"]}, "unknown setting partitoin; known: partition, "),
        ({"seeds": 0}, "seeds must be how many, from 1 on, .*; got 0"),
        ({"seeds": [1, 1]}, r"seeds must be .*; got \[1, 1\]"),
        ({"target": 90}, "target must be an accuracy above 0 and up to 1, such as 0.9; got 90"),
        ({"vary": {"blocks": "1"}}, "vary: blocks must be a list of values, got '1'"),
        ({"vary": {"blocks": ["1", "1"]}}, "vary: blocks has 1 twice; leave one out"),
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
    from simulations import compare

    with pytest.raises(ConfigError, match=text):
        compare({"settings": settings}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read_or_is_no_toml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read recipe .*: No such file"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("seeds = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML: "):
        load_recipe(tmp_path / "bad.toml")


def test_the_command_lines_words():
    assert parse_setting("rounds=5") == ("rounds", 5)
    assert parse_setting("head-start=true") == ("head-start", True)
    assert parse_axis('blocks="1,3,5",5') == ("blocks", ["1,3,5", 5])
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
        (parse_setting, "ruonds=5", "unknown setting ruonds; known: rounds, "),
        (parse_seeds, "three", "seeds must be how many, such as 3, or which, .*; got three"),
    ],
)
def test_words_that_say_nothing_are_refused(parse, text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_every_column_of_the_issue_is_there():
    assert {"accuracy", "rounds-to-target", "bytes-to-target", "client-memory", "device-flops",
            "seconds", "refused"} <= COLUMNS.keys()  # fmt: skip
