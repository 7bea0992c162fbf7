"""Defaults of options: ``farflung.toml`` and ``FARFLUNG_*``.

What is nearer to the call wins: the command line, ``FARFLUNG_<COMMAND>_<OPTION>``, ``FARFLUNG_<OPTION>``, ``farflung.toml`` of
the current folder, ``farflung.toml`` of the user's configuration folder, the built-in default. In a file, a table named like a
command (``[node]``, ``[bench.stage]``) speaks to that command, ``[all]`` to every command that has the option.
``FARFLUNG_DEFAULTS=off`` leaves files and variables out.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from farflung.core.errors import ConfigError

FILE_NAME = "farflung.toml"
ALL = "all"
PREFIX = "FARFLUNG_"
SECRETS = frozenset({"swarm_key"})
"""Options whose value is never printed: it may be the secret itself."""

DEFAULTS, OFF = "FARFLUNG_DEFAULTS", "off"

CommandPath = tuple[str, ...]
Schema = Mapping[CommandPath, frozenset[str]]
"""The options of each command, by their names with underscores."""


@dataclass(frozen=True)
class Setting:
    """A default and where it stands: a file and key, or a variable."""

    value: object
    origin: str

    def shown(self, option: str) -> object:
        """The value as it may be printed: of a secret only that it is set."""
        return "(set)" if option in SECRETS else self.value


Settings = dict[CommandPath, dict[str, Setting]]


@dataclass(frozen=True)
class Defaults:
    """What is set, and what could be."""

    settings: Settings
    schema: Schema


def config_files(here: Path, user_folder: Path) -> list[Path]:
    """The files that exist, the weakest first."""
    return [file for file in (user_folder / FILE_NAME, here / FILE_NAME) if file.is_file()]


def gather(files: Iterable[Path], environ: Mapping[str, str], schema: Schema) -> Settings:
    """Every default that files (the weakest first) and variables set. Raises ConfigError naming the file and the key."""
    settings: Settings = {path: {} for path in schema}
    for file in files:
        _apply_file(settings, file, schema)
    for general in (True, False):
        for path, options in schema.items():
            for option in options:
                name = variable("" if general else "_".join(path), option)
                if name in environ:
                    settings[path][option] = Setting(environ[name], name)
    return settings


def variable(command: str, option: str) -> str:
    """The variable that sets ``option`` of ``command`` (of all commands where it is empty)."""
    return PREFIX + "_".join(part for part in (command, option) if part).upper().replace("-", "_")


def unused_variables(environ: Mapping[str, str], schema: Schema) -> list[str]:
    """``FARFLUNG_*`` variables that set nothing: misspelt, or another program's."""
    known = {variable(name, option) for path, options in schema.items() for option in options for name in ("", "_".join(path))}
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known | {DEFAULTS})


def as_default_map(settings: Settings, repeatable: Schema | None = None) -> dict[str, object]:
    """The settings in the nested form that the command parser takes; it wants a list for an option that is ``repeatable``."""
    root: dict[str, object] = {}
    for path, options in settings.items():
        node = root
        for part in path:
            inner = node.setdefault(part, {})
            if not isinstance(inner, dict):  # a command and an option of its parent share a name: the schema forbids it
                raise ConfigError(f"{'.'.join(path)} is an option and a command")
            node = inner
        lists = (repeatable or {}).get(path, frozenset())
        node.update({name: [setting.value] if name in lists else setting.value for name, setting in options.items()})
    return root


def _apply_file(settings: Settings, file: Path, schema: Schema) -> None:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}", hint="see https://toml.io for the format") from error
    everything = frozenset[str]().union(*schema.values())
    shared = tables.pop(ALL, {})
    if not isinstance(shared, dict):
        raise ConfigError(f"{file}: {ALL!r} must be a table", hint=f"write [{ALL}] and the options below it")
    for key, value in shared.items():
        option = _known(file, f"{ALL}.{key}", key, everything)
        for path, options in schema.items():
            if option in options:
                settings[path][option] = Setting(_scalar(file, f"{ALL}.{key}", value), f"{file} [{ALL}] {key}")
    _apply_tables(settings, file, schema, (), tables)


def _apply_tables(settings: Settings, file: Path, schema: Schema, path: CommandPath, table: Mapping[str, object]) -> None:
    options = schema.get(path, frozenset())
    below = {command[len(path)] for command in schema if command[: len(path)] == path and len(command) > len(path)}
    for key, value in table.items():
        full = ".".join((*path, key))
        name = _known(file, full, key, options | below | (frozenset() if path else frozenset({ALL})))
        if name not in below:
            settings[path][name] = Setting(_scalar(file, full, value), f"{file} [{'.'.join(path)}] {key}")
        elif isinstance(value, dict):
            _apply_tables(settings, file, schema, (*path, name), value)
        else:
            raise ConfigError(
                f"{file}: {full!r} is a command, not an option",
                hint=f"write [{full}] and its options below, or [{ALL}] for an option named {key!r}",
            )


def _known(file: Path, full: str, key: str, names: Iterable[str]) -> str:
    names = sorted(names)
    name = key.replace("-", "_")
    if name in names:
        return name
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(names)}"
    raise ConfigError(f"{file}: unknown key {full!r}", hint=hint)


def _scalar(file: Path, full: str, value: object) -> object:
    if isinstance(value, str | int | float | bool):
        return value
    raise ConfigError(f"{file}: {full!r} must be a string, a number, true or false, not {type(value).__name__}")
