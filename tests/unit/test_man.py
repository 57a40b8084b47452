"""The manual pages are those of the code as it is, say something of every command and key, and are well-formed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import msgspec
import pytest

from steerd.cli import ctl, main, man
from steerd.config import schema

PAGES = man.pages()


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_up_to_date(name: str) -> None:
    assert (man.DIRECTORY / name).read_text() == PAGES[name], "run: python -m steerd.cli.man"
    assert {path.name for path in man.DIRECTORY.glob("*.[1-8]")} == PAGES.keys()


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_well_formed(name: str, tmp_path: Path) -> None:
    page = tmp_path / name
    page.write_text(PAGES[name])
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_command_and_option_is_there_and_says_something() -> None:
    for app, page in ((ctl.app, PAGES["steerctl.1"]), (main.app, PAGES["steerd.8"])):
        name = "steerctl" if app is ctl.app else "steerd"
        commands = re.findall(rf"^\.SS {name} (.*)$", page, re.MULTILINE)
        words = [" ".join(words) for words, _ in man.leaves(app)]
        assert [
            command
            for command, word in zip(commands, words, strict=True)
            if not command.startswith(word.replace("-", r"\-"))
        ] == []
    assert r"\fB\-\-client PREFIX\fP" in PAGES["steerctl.1"]
    assert r"\-\-as\-json" not in PAGES["steerctl.1"]
    for page in PAGES.values():
        assert re.findall(r"^\.(?:SS|SH) .*\n(?=\.)(?!\.(?:B|BR|SS|TP|nf)\b)", page, re.MULTILINE) == []
        assert re.findall(r"^\.TP\n.*\n(?=\.|\\&$|\Z)", page, re.MULTILINE) == []


def test_every_key_of_the_configuration_is_explained() -> None:
    page = PAGES["steerd.toml.5"]
    structs = [struct for _, struct in man.sections(schema.File, "")] + [schema.Target]
    assert len(structs) > 10
    for struct in structs:
        for field in msgspec.structs.fields(struct):
            if man.nested(field.type) is None:
                assert man.meanings(struct).get(field.name), f"{struct.__name__}.{field.name} has no docstring"
                assert rf"\fB{field.encode_name}\fP (" in page
    headings = re.findall(r"^\.SH (\[.*\])$", page, re.MULTILINE)
    assert {"[gateway]", "[pools.NAME]", "[services.NAME]", "[[services.NAME.routes]]"} <= set(headings)


def test_exit_statuses_are_those_of_the_help() -> None:
    for number in range(5):
        assert f".TP\n\\fB{number}\\fP\n" in PAGES["steerctl.1"]
