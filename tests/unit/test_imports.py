"""Imports go one way: wire turns bytes into facts, core facts into decisions, kernel decisions into effects.

Read from the source with `ast`, so that imports inside functions and for type checking count too.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import steerd

ROOT = Path(steerd.__file__).parent

EVERYTHING = None
"""For those that put the others together: daemon, worker and cli. In nobody else's list does one of them stand."""
MAY_IMPORT: dict[str, set[str] | None] = {
    "model": set(),
    "errors": set(),
    "paths": set(),
    "shared": set(),
    "wire": {"model", "errors"},
    "core": {"wire", "model", "errors"},
    "kernel": {"core", "model", "errors"},
    "config": {"core", "wire", "model", "errors", "paths"},
    "control": {"core", "wire", "model", "errors", "config", "shared"},
    "telemetry": {"model", "errors", "shared"},
    "privileges": {"config", "kernel", "errors"},
    "client": {"wire", "model", "errors"},
    "late": {"core", "kernel", "wire", "model", "telemetry"},
    "datagram": {"core", "kernel", "wire", "model", "telemetry"},
    "relay": {"kernel", "wire", "model", "telemetry", "errors"},
    "offload": {"core", "kernel", "wire", "errors", "telemetry"},
    "record": {"control", "core", "wire", "model", "errors", "telemetry"},
    "orders": {"telemetry"},
    "main": {
        "config",
        "control",
        "core",
        "errors",
        "kernel",
        "model",
        "orders",
        "privileges",
        "relay",
        "telemetry",
    },
    "worker": EVERYTHING,
    "nursery": EVERYTHING,
    "daemon": EVERYTHING,
    "cli": EVERYTHING,
    "__main__": EVERYTHING,
}
PURE = {"wire", "core", "model", "errors"}
IMPURE_MODULES = {
    "socket", "time", "os", "random", "logging", "structlog", "subprocess", "asyncio", "secrets", "select", "threading",
}  # fmt: skip


def part_of(module: str) -> str:
    """`steerd.wire.http` belongs to `wire`; `steerd` itself to ""."""
    return module.split(".")[1] if "." in module else ""


def imports(file: Path, module: str) -> Iterator[str]:
    """Full names of what a file imports: `from steerd import client` is steerd.client."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = [node.module] if node.module else []
            if node.level:
                parents = package.split(".")
                origin = parents[: len(parents) - node.level + 1] + origin
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def sources() -> Iterator[tuple[Path, str]]:
    """Every file of the package and its module name."""
    for file in sorted(ROOT.rglob("*.py")):
        module = ".".join(file.relative_to(ROOT.parent).with_suffix("").parts)
        yield file, module.removesuffix(".__init__")


def test_every_part_has_a_rule() -> None:
    assert {part_of(module) for _, module in sources()} - {""} <= MAY_IMPORT.keys()


def test_imports_go_one_way() -> None:
    wrong = []
    for file, module in sources():
        part = part_of(module)
        allowed = MAY_IMPORT[part] if part else set()
        for name in imports(file, module):
            wanted = part_of(name)
            if name.split(".")[0] != "steerd" or wanted == part:
                continue
            if allowed is not EVERYTHING and wanted not in allowed:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_pure_code_reads_no_clock_no_socket_and_writes_no_log() -> None:
    wrong = [
        f"{module} imports {name}"
        for file, module in sources()
        if part_of(module) in PURE
        for name in imports(file, module)
        if name.split(".")[0] in IMPURE_MODULES
    ]
    assert wrong == []


def prose(file: Path) -> Iterator[str]:
    """Comments and strings of several lines, such as docstrings."""
    for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.string.endswith('"""')):
            yield token.string


def is_there(name: str) -> bool:
    """Whether `kernel.queue.RESERVED` or `steerd.kernel.queue` is a module, or something that one says."""
    parts = name.removeprefix("steerd.").split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        source = next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)
        if source is not None:
            text = source.read_text()
            return all(re.search(rf"\b{part}\b", text) for part in parts[length:])
    return False


def test_what_prose_names_is_there() -> None:
    """A part of steerd that was renamed is renamed where others speak of it, too."""
    packages = "|".join(file.parent.name for file in ROOT.glob("*/__init__.py"))
    named = re.compile(rf"(?<![\w./])(?:steerd\.\w|(?:steerd\.)?(?:{packages})\.[a-z_]{{2}})\w*(?:\.\w+)*\b(?![./])")
    wrong = [
        f"{file.relative_to(ROOT.parent)}: {name}"
        for file, _ in sources()
        for text in prose(file)
        for name in named.findall(text)
        if not name.endswith((".toml", ".service", ".nft", ".py")) and not is_there(name)
    ]
    assert wrong == []


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "import socket, steerd.wire.http\n"
        "from steerd import client\n"
        "from steerd.core.pools import Pool\n"
        "def late():\n    from ..kernel import aliases\n    from . import sibling\n"
    )
    assert set(imports(file, "steerd.wire.example")) == {
        "socket", "steerd.wire.http", "steerd.client", "steerd.core.pools.Pool", "steerd.kernel.aliases",
        "steerd.wire.sibling",
    }  # fmt: skip
