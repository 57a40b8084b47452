"""The sysctls that late steering needs: what differs, setting them, and setting them back.

The list is nft/sysctls, which `nft/install.sh` reads too. What a sysctl was before steerd's first change is kept in
`run_dir/sysctls`, and whatever sets a sysctl next keeps that first value, so that either of the two can undo what
either has done. The file has one line for each: NAME, the first value, the value that steerd has set.

/proc/sys shows the network namespace of the calling thread. A run_dir belongs to one namespace.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from steerd.errors import KernelError
from steerd.kernel import ruleset

PROC_SYS = Path("/proc/sys")
SAVED = "sysctls"
"""The file's name in run_dir."""

_CONDITIONS: dict[str, Callable[[int, int], bool]] = {
    "is": lambda now, value: now == value,
    "at-least": lambda now, value: now >= value,
    # nf_conntrack_max, for one: 0 is no limit at all (nf_conntrack_core.c, __nf_conntrack_alloc).
    "at-least-or-0": lambda now, value: now == 0 or now >= value,
}
_NEEDS = ("must", "should")


class Sysctl(NamedTuple):
    """One line of the list."""

    name: str
    """With dots: net.ipv4.tcp_timestamps."""
    need: str
    """`must`: where it cannot be set, late steering must not run; `should`: the operator is told."""
    condition: str
    """`is`, `at-least`, or `at-least-or-0`."""
    value: int
    reason: str

    def fits(self, now: int | None) -> bool:
        """Whether the sysctl may stay as it is; None: there is no such sysctl."""
        return now is not None and _CONDITIONS[self.condition](now, self.value)


class Difference(NamedTuple):
    """A sysctl that is not as it must or should be."""

    sysctl: Sysctl
    now: int | None
    """None: there is no such sysctl."""
    settable: bool
    """By this process, in this network namespace."""

    @property
    def fatal(self) -> bool:
        """It must be otherwise, and cannot be set: late steering would go wrong."""
        return self.sysctl.need == "must" and not self.settable

    def __str__(self) -> str:
        name, need, condition, value, reason = self.sysctl
        want = value if condition == "is" else f"at least {value}"
        refused = "" if self.settable else ", and cannot be set here"
        return f"sysctl {name} is {_shown(self.now)}, {need} be {want}{refused}: {reason}"


class Change(NamedTuple):
    """What became of one sysctl."""

    name: str
    before: int | None
    after: int | None
    """The same as `before`: it was not what steerd had set any more, and was left alone."""
    ours: int
    """What steerd has set, now or before."""

    def __str__(self) -> str:
        if self.before == self.after:
            return (
                f"sysctl {self.name} is {_shown(self.before)}, not {self.ours} as steerd had set it, and is left alone"
            )
        return f"sysctl {self.name} is changed from {self.before} to {self.after}"


class _Kept(NamedTuple):
    first: int
    ours: int


def list_path() -> Path:
    """Where nft/sysctls is: beside steerd.nft."""
    path = ruleset.template_path().with_name("sysctls")
    if not path.is_file():
        raise KernelError(f"the list of sysctls is not at {path}: the installation is incomplete")
    return path


def wanted() -> list[Sysctl]:
    """The list. Raises KernelError if it is not there or cannot be understood."""
    path = list_path()
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [_parsed(line, path) for line in lines]


def _parsed(line: str, path: Path) -> Sysctl:
    fields = line.split(maxsplit=4)
    if len(fields) == 5:
        name, need, condition, value, reason = fields
        if need in _NEEDS and condition in _CONDITIONS and value.isdecimal():
            return Sysctl(name, need, condition, int(value), reason)
    raise KernelError(
        f"{path} must have lines of NAME, {' or '.join(_NEEDS)}, {' or '.join(_CONDITIONS)}, a whole number, and a"
        f" reason, not {line!r}"
    )


def check() -> list[Difference]:
    """Every sysctl that is not as the list wants it. Changes nothing.

    Ask before `apply`, and tell the operator what it says: some of them are felt on the whole host. Ask after it, and
    what is left are those that cannot be set here. Raises KernelError if nft is not installed.
    """
    _load_conntrack()
    differences = []
    for sysctl in wanted():
        now = _read(sysctl.name)
        if not sysctl.fits(now):
            differences.append(Difference(sysctl, now, _may_set(sysctl.name)))
    return differences


def apply(run_dir: Path) -> list[Change]:
    """Set what differs and can be set, and keep in `run_dir`, which is made if need be, what it was at first.

    Raises KernelError before anything is changed if one that must be set cannot be, or if `run_dir` holds a file that
    cannot be read back or cannot be written.
    """
    with _locked(run_dir):
        differences = check()
        for difference in differences:
            if difference.fatal:
                raise KernelError(str(difference))
        changes = []
        for (name, _, _, value, _), now, settable in differences:
            if settable and now is not None:
                _keep(run_dir, name, now, value)
                _write(name, value)
                changes.append(Change(name, now, value, value))
        return changes


def restore(run_dir: Path) -> list[Change]:
    """Set back what `apply`, or install.sh, has set, unless somebody has changed it since; nothing if nothing was.

    Raises KernelError if a value cannot be set back; the file in `run_dir` is then kept.
    """
    if not run_dir.is_dir():
        return []
    with _locked(run_dir):
        changes = []
        for name, kept in _all_kept(run_dir).items():
            now = _read(name)
            if now == kept.ours:
                _write(name, kept.first)
            changes.append(Change(name, now, kept.first if now == kept.ours else now, kept.ours))
        (run_dir / SAVED).unlink(missing_ok=True)
        return changes


def _shown(value: int | None) -> str:
    return "missing" if value is None else str(value)


def _file(name: str) -> Path:
    return PROC_SYS / name.replace(".", "/")


def _read(name: str) -> int | None:
    try:
        return int(_file(name).read_text())
    except FileNotFoundError:
        return None


def _write(name: str, value: int) -> None:
    try:
        _file(name).write_text(f"{value}\n")
    except OSError as error:
        raise KernelError(f"sysctl {name} cannot be set to {value}: {error.strerror}") from error


def _may_set(name: str) -> bool:
    # By the real user alone, the kernel would leave out that CAP_NET_ADMIN opens net.* to anybody.
    return os.access(_file(name), os.W_OK, effective_ids=True)


def _load_conntrack() -> None:
    """Have the kernel load nf_conntrack: before that its sysctls do not exist. To ask about a rule that looks at
    connections is enough, and needs no tool that the table does not need anyway."""
    if _file("net.netfilter.nf_conntrack_max").exists():
        return
    probe = "table inet steerd_probe { chain probe { ct state new ; } ; }"
    try:
        subprocess.run(["nft", "--check", "-f", "-"], input=probe, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise KernelError("nft is not installed: install nftables") from None


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """One at a time, install.sh included: two that keep and set in turn would take each other's value for the first.

    The directory itself is locked, so that no file is left over.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KernelError(f"{run_dir} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _all_kept(run_dir: Path) -> dict[str, _Kept]:
    path = run_dir / SAVED
    kept = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        if not re.fullmatch(r"net\.[a-z0-9_.]+ [0-9]+ [0-9]+", line):
            raise KernelError(
                f"{path} must have lines of a name and two numbers: set the sysctls back by hand and remove it"
            )
        name, first, ours = line.split()
        kept[name] = _Kept(int(first), int(ours))
    return kept


def _keep(run_dir: Path, name: str, now: int, ours: int) -> None:
    """Before a change. The value before the first change stays, whoever has changed it since."""
    kept = _all_kept(run_dir)
    kept[name] = _Kept(kept[name].first if name in kept else now, ours)
    path = run_dir / SAVED
    new = path.with_name(f"{SAVED}.new")
    try:
        new.write_text("".join(f"{name} {first} {ours}\n" for name, (first, ours) in kept.items()))
        new.replace(path)
    except OSError as error:
        raise KernelError(f"{path} cannot be written: {error.strerror}") from error
