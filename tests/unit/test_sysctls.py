"""The list of sysctls, and what is set, kept and set back: against a directory that stands for /proc/sys.

What only the initial network namespace may set (nf_conntrack_max) can be tried here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from steerd.errors import KernelError
from steerd.kernel import sysctls
from steerd.kernel.sysctls import Change, Sysctl

LOOSE = "net.netfilter.nf_conntrack_tcp_loose"
MAX = "net.netfilter.nf_conntrack_max"
BUCKETS = "net.netfilter.nf_conntrack_buckets"
TIMESTAMPS = "net.ipv4.tcp_timestamps"
SCALING = "net.ipv4.tcp_window_scaling"
FITTING = {LOOSE: 0, MAX: 262144, BUCKETS: 262144, TIMESTAMPS: 1, SCALING: 1}


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a /proc/sys of these values, and otherwise those that fit; returns its directory."""

    def make(values: dict[str, int]) -> Path:
        for name, value in {**FITTING, **values}.items():
            file = tmp_path / "sys" / name.replace(".", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{value}\n")
        monkeypatch.setattr(sysctls, "PROC_SYS", tmp_path / "sys")
        return tmp_path / "sys"

    return make


def value(proc: Path, name: str) -> int:
    return int((proc / name.replace(".", "/")).read_text())


def test_the_list_names_what_late_steering_needs() -> None:
    listed = {sysctl.name: sysctl for sysctl in sysctls.wanted()}
    assert listed.keys() == FITTING.keys()
    assert {name for name, sysctl in listed.items() if sysctl.need == "must"} == {LOOSE, TIMESTAMPS, SCALING}
    assert all(len(sysctl.reason) > 20 for sysctl in listed.values())
    assert all(listed[name].fits(fitting) for name, fitting in FITTING.items())


@pytest.mark.parametrize(
    ("name", "now", "fits"),
    [
        (LOOSE, 1, False),
        (TIMESTAMPS, 0, False),
        (TIMESTAMPS, 2, True),
        (SCALING, 0, False),
        (BUCKETS, 65536, False),
        (BUCKETS, 0, False),
        (MAX, 262143, False),
        (MAX, 1000000, True),
        (MAX, 0, True),
        (MAX, None, False),
    ],
)
def test_which_values_may_stay(proc: Callable[..., Path], name: str, now: int | None, fits: bool) -> None:
    root = proc({} if now is None else {name: now})
    if now is None:
        (root / name.replace(".", "/")).unlink()
    found = sysctls.check()
    assert [difference.sysctl.name for difference in found] == ([] if fits else [name])
    assert [difference.now for difference in found] == ([] if fits else [now])


def test_limits_are_raised_and_set_back_never_lowered(proc: Callable[..., Path], tmp_path: Path) -> None:
    root = proc({MAX: 65536, BUCKETS: 1000000})
    assert sysctls.apply(tmp_path) == [Change(MAX, 65536, 262144, 262144)]
    assert (value(root, MAX), value(root, BUCKETS)) == (262144, 1000000)
    assert sysctls.check() == []
    assert (tmp_path / "sysctls").read_text() == f"{MAX} 65536 262144\n"
    assert sysctls.restore(tmp_path) == [Change(MAX, 262144, 65536, 262144)]
    assert (value(root, MAX), value(root, BUCKETS)) == (65536, 1000000)


def test_nothing_to_do_leaves_nothing(proc: Callable[..., Path], tmp_path: Path) -> None:
    proc({})
    assert sysctls.restore(tmp_path / "never" / "made") == []
    assert sysctls.apply(tmp_path / "made" / "here") == []
    assert sysctls.restore(tmp_path / "made" / "here") == []
    assert list((tmp_path / "made" / "here").iterdir()) == []
    assert not (tmp_path / "never").exists()


def test_the_first_value_is_kept_whatever_happens_later(proc: Callable[..., Path], tmp_path: Path) -> None:
    root = proc({LOOSE: 1})
    sysctls.apply(tmp_path)
    sysctls.apply(tmp_path)
    proc({MAX: 100, TIMESTAMPS: 0})
    sysctls.apply(tmp_path)
    proc({MAX: 200})
    sysctls.apply(tmp_path)
    assert set((tmp_path / "sysctls").read_text().splitlines()) == {
        f"{LOOSE} 1 0",
        f"{MAX} 100 262144",
        f"{TIMESTAMPS} 0 1",
    }
    sysctls.restore(tmp_path)
    assert (value(root, LOOSE), value(root, MAX), value(root, TIMESTAMPS)) == (1, 100, 0)
    assert not (tmp_path / "sysctls").exists()


def test_a_later_version_that_wants_more_still_knows_the_way_back(
    proc: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = proc({MAX: 65536})
    sysctls.apply(tmp_path)
    monkeypatch.setattr(sysctls, "wanted", lambda: [Sysctl(MAX, "should", "at-least-or-0", 524288, "more")])
    assert sysctls.apply(tmp_path) == [Change(MAX, 262144, 524288, 524288)]
    assert sysctls.restore(tmp_path) == [Change(MAX, 524288, 65536, 524288)]
    assert value(root, MAX) == 65536


def test_what_somebody_else_has_changed_is_left_alone(proc: Callable[..., Path], tmp_path: Path) -> None:
    root = proc({MAX: 65536, LOOSE: 1, TIMESTAMPS: 0})
    sysctls.apply(tmp_path)
    proc({MAX: 500000})
    (root / TIMESTAMPS.replace(".", "/")).unlink()
    changes = {change.name: change for change in sysctls.restore(tmp_path)}
    assert (value(root, MAX), value(root, LOOSE)) == (500000, 1)
    assert str(changes[MAX]) == f"sysctl {MAX} is 500000, not 262144 as steerd had set it, and is left alone"
    assert str(changes[TIMESTAMPS]) == f"sysctl {TIMESTAMPS} is missing, not 1 as steerd had set it, and is left alone"
    assert str(changes[LOOSE]) == f"sysctl {LOOSE} is changed from 0 to 1"
    assert sysctls.restore(tmp_path) == []


def test_a_missing_one_that_must_be_set_stops_it_before_any_change(
    proc: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = proc({MAX: 65536})
    (root / LOOSE.replace(".", "/")).unlink()
    (difference,) = [found for found in sysctls.check() if found.sysctl.name == LOOSE]
    assert difference.fatal
    with pytest.raises(KernelError, match=f"sysctl {LOOSE} is missing, must be 0, and cannot be set here: "):
        sysctls.apply(tmp_path)
    assert value(root, MAX) == 65536
    monkeypatch.setattr(sysctls, "wanted", lambda: [Sysctl(LOOSE, "should", "is", 0, "reason")])
    (difference,) = sysctls.check()
    assert not difference.fatal
    assert sysctls.apply(tmp_path) == []


@pytest.mark.parametrize("text", [f"{LOOSE} 1\n", f"{LOOSE} one 0\n", "../../etc/passwd 1 0\n", "\n", "kernel.x 0 1\n"])
def test_a_damaged_file_is_neither_believed_nor_overwritten(
    proc: Callable[..., Path], tmp_path: Path, text: str
) -> None:
    root = proc({LOOSE: 1})
    (tmp_path / "sysctls").write_text(text)
    for action in (sysctls.apply, sysctls.restore):
        with pytest.raises(KernelError, match="sysctls must have lines of a name and two numbers"):
            action(tmp_path)
    assert (tmp_path / "sysctls").read_text() == text
    assert value(root, LOOSE) == 1


def test_a_run_dir_that_cannot_be_is_a_sentence(proc: Callable[..., Path], tmp_path: Path) -> None:
    proc({LOOSE: 1})
    (tmp_path / "file").touch()
    with pytest.raises(KernelError, match="cannot be opened"):
        sysctls.apply(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    "line", ["net.a must is 1", "net.a may is 1 reason", "net.a must equal 1 reason", "net.a must is -1 reason"]
)
def test_a_line_of_the_list_that_cannot_be_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    path = tmp_path / "sysctls"
    path.write_text(f"# a comment\n\n{line}\n")
    monkeypatch.setattr(sysctls, "list_path", lambda: path)
    with pytest.raises(KernelError, match=r"must have lines of NAME, must or should, "):
        sysctls.wanted()


def test_a_list_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerd.kernel.ruleset.template_path", lambda: tmp_path / "steerd.nft")
    with pytest.raises(KernelError, match="the installation is incomplete"):
        sysctls.wanted()
