"""The manual pages, made of the code: steerctl(1) and steerd(8) of the commands and their options, steerd.toml(5) of
the structs that a configuration is read into (steerd.config.schema), of what stands below each of their fields, and of
the parsers (steerd.wire.registry).

    python -m steerd.cli.man      # writes them to steerd/man

They are part of the source, so that packages need not make them; a test says so when they are out of date.
"""

from __future__ import annotations

import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import msgspec
import typer
from msgspec import Meta, Struct
from typer.models import ArgumentInfo, OptionInfo

from steerd import paths
from steerd.cli import common, ctl, main, options
from steerd.config import schema
from steerd.wire.registry import DATAGRAMS, PARSER_NAMES, REGISTRY

DIRECTORY = Path(__file__).resolve().parents[1] / "man"

_SHARED: dict[OptionInfo, str] = {get_args(options.Config)[1]: "--config FILE", get_args(options.Json)[1]: "--json"}
"""Options that are said once for all commands of steerctl."""
_SEE_ALSO = ("steerctl", "1"), ("steerd", "8"), ("steerd.toml", "5")
_DATE = "2026-11-23"
"""Of the commands and keys as they are; pages must not differ from day to day."""
_UNBOUNDED = 1 << 31
"""Limits beyond are nobody's concern."""


def pages() -> dict[str, str]:
    """Every page, by the name of its file."""
    statuses = common.meanings(common.Exit)
    exits = [(str(status.value), statuses[status.name.lower()]) for status in common.Exit]
    environment = ".SH ENVIRONMENT\n" + _tagged("STEERD_CONFIG", "The configuration, unless --config names another.")
    completion = ".SH COMPLETION\n" + _text(
        "`steerctl --install-completion` prepares the shell that runs it (bash, zsh, fish). Names of services, pools"
        " and leases come from the daemon, if it answers."
    )
    files = ".SH FILES\n" + "".join(
        (
            _tagged(str(paths.CONFIG), "The configuration: steerd.toml(5)."),
            _tagged(f"{paths.RUN_DIR}/api.sock", "The API: HTTP and JSON, for root and the group steerd."),
            _tagged(f"{paths.RUN_DIR}/counters", "What workers count, in shared memory."),
            _tagged(f"{paths.STATE_DIR}/registry", "Routes that were added, leases, sessions, drains, ids of targets."),
        )
    )
    json = ".SH JSON\n" + _text(
        "With --json, one thing is one JSON object on a line, and a list is a JSON array on a line. What may be very"
        " long (flows, an export, the intervals of top) is one object a line instead. Names of keys stay as they are."
    )
    return {
        "steerctl.1": _commands("steerctl", "1", "look at a running steerd, and change what it does", ctl.app, exits)
        + json + completion + environment + _see_also("steerctl"),
        "steerd.8": _commands("steerd", "8", "many daemons behind one address and port", main.app, exits)
        + files + _see_also("steerd"),
        "steerd.toml.5": _configuration() + _see_also("steerd.toml"),
    }  # fmt: skip


def write() -> None:
    """Write all pages to where they are shipped from."""
    DIRECTORY.mkdir(exist_ok=True)
    for name, text in pages().items():
        (DIRECTORY / name).write_text(text)


# ---- roff (man(7)) ----


def _escaped(text: str) -> str:
    """Text as it is, but what stands between backticks in bold."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = re.sub(r"`([^`]*)`", r"\\fB\1\\fP", text)
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


def _text(text: str) -> str:
    """Paragraphs."""
    paragraphs = (" ".join(each.split()) for each in re.split(r"\n\s*\n", inspect.cleandoc(text)))
    return ".PP\n".join(_sentences(each) for each in paragraphs if each)


def _sentences(text: str) -> str:
    """Every sentence on a line of its own."""
    return _escaped(re.sub(r"(?<=[^.][.:;]) (?=[A-Z`])", "\n", text)) + "\n"


def _tagged(tag: str, text: str) -> str:
    return f".TP\n\\fB{_escaped(tag)}\\fP\n{_sentences(text)}" if text else f".TP\n\\fB{_escaped(tag)}\\fP\n\\&\n"


def _title(name: str, section: str, what: str) -> str:
    return f".TH {name.upper()} {section} {_DATE} steerd steerd\n.SH NAME\n{_escaped(name)} \\- {_escaped(what)}\n"


def _see_also(name: str) -> str:
    others = [f".BR {other} ({section})" for other, section in _SEE_ALSO if other != name]
    return ".SH SEE ALSO\n" + " ,\n".join(others) + "\n"


# ---- commands ----


class _Parameter(NamedTuple):
    name: str
    """As it is written in a synopsis."""
    help: str
    is_option: bool
    is_required: bool
    is_many: bool


def _commands(name: str, section: str, what: str, app: typer.Typer, exits: list[tuple[str, str]]) -> str:
    callback = app.registered_callback
    assert callback is not None and callback.callback is not None
    lines = [_title(name, section, what), ".SH SYNOPSIS\n", f'.B {name}\n.I command\n.RI [ option " .\\|.\\|.]"\n']
    lines += [".SH DESCRIPTION\n", _text(inspect.getdoc(callback.callback) or ""), ".SH COMMANDS\n"]
    for words, function in leaves(app):
        parameters = list(_parameters(function))
        lines.append(f".SS {_escaped(' '.join((name, *words)))}{_synopsis(parameters)}\n")
        lines.append(_text(inspect.getdoc(function) or ""))
        lines += [_tagged(parameter.name, parameter.help) for parameter in parameters]
    shared = (
        f".SH OPTIONS OF NEARLY ALL COMMANDS\n{''.join(map(_shared_tag, _SHARED.items()))}" if section == "1" else ""
    )
    return (
        "".join(lines) + shared + ".SH EXIT STATUS\n" + "".join(_tagged(number, meaning) for number, meaning in exits)
    )


def leaves(app: typer.Typer, *path: str) -> Iterator[tuple[tuple[str, ...], Callable[..., Any]]]:
    """Every command that is not hidden, with its words; that of a noun alone first."""
    if path and app.registered_callback is not None and app.registered_callback.callback is not None:
        yield path, app.registered_callback.callback
    for command in app.registered_commands:
        assert command.callback is not None
        if not command.hidden:
            yield (*path, command.name or command.callback.__name__.replace("_", "-")), command.callback
    for group in app.registered_groups:
        assert group.typer_instance is not None
        if group.hidden is not True:
            yield from leaves(group.typer_instance, *path, str(group.name))


def _shared_tag(option: tuple[OptionInfo, str]) -> str:
    info, name = option
    return _tagged(name, info.help or "")


def _synopsis(parameters: list[_Parameter]) -> str:
    """What every use of a command has; options that may be left out are listed below."""
    words = []
    for each in parameters:
        if not each.is_option:
            word = f"{each.name} ..." if each.is_many else each.name
            words.append(word if each.is_required else f"[{word}]")
        elif each.is_required:
            words.append(each.name)
    return "".join(f" {_escaped(word)}" for word in words)


def _parameters(function: Callable[..., Any]) -> Iterator[_Parameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        info = next((each for each in get_args(hint) if isinstance(each, (ArgumentInfo, OptionInfo))), None)
        if info is None or info.hidden or info in _SHARED:  # None: the context
            continue
        inner = get_args(hint)[0]
        default = parameter.default
        is_required = default is inspect.Parameter.empty
        says = [] if is_required or default in (None, False, "") or "Default" in (info.help or "") else [default]
        text = f"{info.help or ''}{''.join(f' Default: {each}.' for each in says)}"
        is_many = "list" in str(inner)
        if isinstance(info, ArgumentInfo):
            yield _Parameter(str(info.metavar or name.upper()), text, False, is_required, is_many)
            continue
        # In Annotated, typer takes the first name of an option for its default value.
        names = (str(each) for each in (info.default, *(info.param_decls or ())) if str(each).startswith("--"))
        option = next(names, f"--{name.replace('_', '-')}")
        yield _Parameter(option + _value_of(info, inner), text, True, is_required, is_many)


def _value_of(info: OptionInfo, kind: Any) -> str:
    """What stands behind an option, with a space before it."""
    (bare,) = [each for each in _alternatives(kind) if each is not type(None)] or [kind]
    if bare is bool:
        return ""
    if info.metavar:
        return f" {info.metavar}"
    if get_origin(bare) is Literal:
        return " " + "|".join(get_args(bare))
    return " NUMBER" if bare in (int, float) else " TEXT"


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


# ---- the configuration ----


def _configuration() -> str:
    lines = [_title("steerd.toml", "5", "the configuration of steerd")]
    lines.append(".SH DESCRIPTION\n")
    lines.append(
        _text(
            f"A file in TOML, `{paths.CONFIG}` unless a command names another. `steerd check FILE` names every mistake"
            " in it. `steerctl reload`, or SIGHUP, puts it in force while the daemon runs; a file with a mistake is not"
            " put in force."
        )
    )
    tables = list(sections(schema.File, ""))
    tables.append(("TARGETS THAT NEED MORE WORDS THAN AN ADDRESS", schema.Target))
    for title, struct in tables:
        lines.append(f".SH {_escaped(title)}\n")
        lines.append(_text(inspect.getdoc(struct) or ""))
        lines += [_key(field, struct) for field in msgspec.structs.fields(struct) if not nested(field.type)]
    lines.append(".SH PARSERS\n")
    lines.append(_text("What `inspect` may name, and the keys that each gives: what stands in `when`."))
    lines += [_parser(name) for name in PARSER_NAMES]
    lines.append(".SH EXAMPLE\n.nf\n.RS\n" + _escaped(_EXAMPLE) + ".RE\n.fi\n")
    return "".join(lines)


def _parser(name: str) -> str:
    """What a parser is for, and its keys."""
    tcp, udp = REGISTRY.get(name), DATAGRAMS.get(name)
    found = [(word, parser) for word, parser in (("TCP", tcp), ("UDP", udp)) if parser is not None]
    keys = dict.fromkeys(key for _, parser in found for key in parser.keys)
    transports = ", ".join(word for word, _ in found)
    said = "; ".join(parser.summary for _, parser in found)
    return _tagged(f"{name} ({transports})", f"{said}. Keys: {', '.join(f'`{key}`' for key in keys)}.")


def sections(struct: type[Struct], path: str) -> Iterator[tuple[str, type[Struct]]]:
    """Every table of the file, with its heading."""
    for field in msgspec.structs.fields(struct):
        found = nested(field.type)
        if found is None:
            continue
        inner, name, is_list = found
        dotted = ".".join(part for part in (path, field.encode_name, name) if part)
        yield f"[[{dotted}]]" if is_list else f"[{dotted}]", inner
        yield from sections(inner, dotted)


def nested(kind: Any) -> tuple[type[Struct], str, bool] | None:
    """The struct of a table, what stands for its name where there may be many, and whether it is a list of tables."""
    for each in _alternatives(kind):
        if isinstance(each, type) and issubclass(each, Struct):
            return each, "", False
        if get_origin(each) is dict and nested(get_args(each)[1]):
            return get_args(each)[1], "NAME", False
        if get_origin(each) is list and nested(get_args(each)[0]):
            return get_args(each)[0], "", True
    return None


def _key(field: msgspec.structs.FieldInfo, struct: type[Struct]) -> str:
    text = meanings(struct).get(field.name, "")
    kind = _kind(field.type)
    if field.required:
        kind += "; required"
    elif "Default:" not in text and field.default is not msgspec.NODEFAULT and field.default is not None:
        shown = _shown(field.default)
        kind += f"; default {shown}" if shown else ""
    return f".TP\n\\fB{_escaped(field.encode_name)}\\fP ({_escaped(kind)})\n{_sentences(text)}"


def meanings(struct: type[Struct]) -> dict[str, str]:
    """What is written below each field of a struct, by its name."""
    return common.texts(struct)


def _kind(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return _kind(inner) + "".join(_range(meta) for meta in more if isinstance(meta, Meta))
    found = [each for each in _alternatives(kind) if each is not type(None)]
    if len(found) > 1:
        return " or ".join(map(_kind, found))
    (bare,) = found
    if get_origin(bare) is Annotated:
        return _kind(bare)
    if get_origin(bare) is Literal:
        return " or ".join(_shown(each) for each in get_args(bare))
    if isinstance(bare, type) and issubclass(bare, enum.Enum):
        return " or ".join(_shown(each.value) for each in bare)
    if get_origin(bare) is list:
        return f"list of {_kind(get_args(bare)[0])}"
    if get_origin(bare) is dict:
        return "table"
    words = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "text, table or list"}
    return words[bare]


def _range(meta: Meta) -> str:
    if meta.ge is None:
        return ""
    if meta.le is None or meta.le >= _UNBOUNDED:
        return f" from {meta.ge}"
    return f", {meta.ge} to {meta.le}"


def _shown(value: object) -> str:
    """A value as in TOML; empty for one that says nothing."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return _shown(value.value)
    if isinstance(value, str):
        return f'"{value}"' if value else ""
    return "" if isinstance(value, (list, dict)) else str(value)


_EXAMPLE = """\
[pools.sites]
prefixes = ["10.64.0.0/24"]

[services.web]
endpoints = ["203.0.113.10:443/tcp", "203.0.113.10:80/tcp"]
inspect = ["tls", "http"]
routes = [
    { when = { tls.sni = "a.example" }, target = "10.64.0.1:443" },
    { when = { http.host = "a.example" }, target = "10.64.0.1:80" },
]
default = "10.64.0.9:same"
"""


if __name__ == "__main__":
    write()
