import json
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import click
import pytest

import fleet.finetune
from fleet.cli import main
from tests.forked import Forked

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_code_in_the_readme_runs(number, tmp_path, monkeypatch):
    few = partial(fleet.finetune.load_data, limit=200)  # images, of those that it names
    monkeypatch.setattr("fleet.finetune.load_data", few)
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {})


@pytest.fixture(scope="module")
def my_strategy(tmp_path_factory):
    """A folder with the example of a strategy, as a user would have it."""
    (block,) = (block for block in BLOCKS if block.startswith("# my_strategy.py\n"))
    assert len(block.splitlines()) < 40
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_strategy.py").write_text(block)
    return folder


@pytest.mark.parametrize(
    "own",
    [
        ("--strategy", "my_strategy:algorithm"),
        pytest.param(("--rule", "my_strategy:agreed"), marks=pytest.mark.slow),  # found alike
    ],
)
@pytest.mark.usefixtures("quick_runs")
def test_the_strategy_in_the_readme_is_found_in_the_current_directory(my_strategy, own):
    small = "--clients 2 --rounds 2 --train-examples 100 --test-examples 100 --image-size 32"
    words = ["simulate", *small.split(), *own, "--blocks", "0,1", "--run-dir", own[0].strip("-")]

    def be_fleet():
        os.chdir(my_strategy)  # which is not on sys.path, as in a console script
        sys.path[:] = [path for path in sys.path if path]
        main(words)

    run = Forked(be_fleet, sys.__stderr__)
    run.stdout.read()
    assert run.wait() == 0
    lines = (my_strategy / own[0].strip("-") / "rounds.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 3 and losses[-1] < losses[0]


def commands():
    """Every command of the project's in a block of the README, as words."""
    text = README.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}(?:sudo )?(?:\S*/)?(fleet .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_commands_in_the_readme_have_the_options_that_they_name(words):
    command, rest = main, words[1:]
    while isinstance(command, click.Group):
        command = command.commands[rest.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    known |= {option for parameter in command.params for option in parameter.secondary_opts}
    assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known | {"--"}


def test_a_blank_card_becomes_a_client_in_ten_commands():
    _, _, page = README.read_text().partition("**A Raspberry Pi, from a blank card.**")
    page, _, _ = page.partition("**A run**")
    lines = re.findall(r"^ {4}(\S.*)$", page, re.MULTILINE)
    assert len(re.split("&&|\n", "\n".join(lines))) <= 10
    assert lines[-1].startswith("fleet client --bundle")


def test_the_readme_is_finished():
    assert not re.findall(r"@\w+@|TODO|COMMIT|(?m:^[A-Z_]{6,}$)", README.read_text())


def test_the_readme_links_to_files_that_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
