"""What a release consists of: what the wheel brings along, and that requirements.lock has all of its libraries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_has_the_table_the_units_and_all_of_the_package(tmp_path: Path) -> None:
    build = subprocess.run(
        [ROOT / "release" / "wheel", tmp_path],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    with ZipFile(build.stdout.strip()) as wheel:
        names = {re.sub(r"^steerd-[^/]*\.data/data/", "", name) for name in wheel.namelist()}
    package = {path for path in (ROOT / "steerd").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    table = {path for path in (ROOT / "nft").iterdir() if path.is_file()}
    assert {str(path.relative_to(ROOT)) for path in package} <= names
    assert {f"share/steerd/nft/{path.name}" for path in table} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"steerd", "share"}


def test_the_lock_has_every_library_in_range_with_hashes() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE))
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        wanted = Requirement(text)
        assert wanted.name in locked, f"{text}: make lock"
        assert wanted.specifier.contains(locked[wanted.name]), f"{text}: make lock"
    for entry in re.split(r"^(?=[\w.-]+==)", lock, flags=re.MULTILINE)[1:]:
        assert "--hash=sha256:" in entry
