"""Defaults of options: variables of the environment, then one TOML file, then what the commands have built in.

Values are read as if they were typed behind their option, so that a wrong one is refused in the same words.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cacheroute import files
from cacheroute.errors import UsageError, did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMON = "common"
_FOR_ALL = ("model", "budget", "threads", "io", "workers", "flash-mbps")
"""What [common] and a variable without a command's name may set for every command: the same in all of them."""
_FOR_ANSWERS = (
    *("routing", "prompt-routing", "eviction", "prefetch", "ctx-size", "seed"),
    *("temp", "top-k", "top-p", "min-p", "repeat-penalty"),
)
"""What they may set for the commands that answer. Others compare routings, and their lists are not a person's taste."""
_ANSWERS = ("generate", "chat", "serve")
_NEVER = ("force", "replace")
"""An option that replaces what a person has is given where it happens."""
_LISTS = ("budget", "routing", "prompt-routing", "eviction", "io", "prefetch", "control-repack", "files")
"""What commands that compare take several of, with commas between them; those that answer take one."""
_PREFIX = "CACHEROUTE_"
_OTHER_VARIABLES = ("CACHEROUTE_CACHE", "CACHEROUTE_CONFIG", "CACHEROUTE_LIBRARY")
META = "cacheroute.defaults"
"""Where a context keeps what of() has found."""
_SECRETS = ("key", "token", "password")


@dataclass(frozen=True)
class Setting:
    """The value of one option of one command, and where it is from: a variable, or a file with its section and key."""

    option: str
    value: Any
    origin: str


@dataclass(frozen=True)
class SettingsFile:
    """`sections`: by command ("eval perplexity"), or COMMON; keys are options without their dashes in front."""

    path: Path | None = None
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def default_path() -> Path | None:
    """The user's file; $CACHEROUTE_CONFIG replaces it. None where a user has no home. It need not exist."""
    chosen = os.environ.get("CACHEROUTE_CONFIG")
    if chosen:
        return files.expanded(chosen, "CACHEROUTE_CONFIG").absolute()
    try:
        import platformdirs

        found = platformdirs.user_config_path("cacheroute")
    except (ImportError, RuntimeError):  # versions differ in what they make of a user without a home
        return None
    return found / "config.toml" if found.is_absolute() else None


def read(options: Mapping[str, Mapping[str, Any]]) -> SettingsFile:
    """The user's file. `options` of each command by key, as options_of_all() finds them.

    Raises UsageError for a file that cannot be read, and for a section or key that does not exist. $CACHEROUTE_CONFIG must be
    there; an empty one, such as /dev/null, is no file.
    """
    path = default_path()
    if path is None or str(path) == os.devnull or not (path.exists() or os.environ.get("CACHEROUTE_CONFIG")):
        return SettingsFile()
    files.check_regular(path, "a file of settings", missing="CACHEROUTE_CONFIG names it: make it, or unset that.")
    try:
        tables = tomllib.loads(path.read_bytes().decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UsageError(f"{path} is not TOML ({e}).") from None
    except OSError as e:
        raise files.unreadable(path, e) from None
    sections: dict[str, dict[str, Any]] = {}
    for name, section in _sections(tables, options):
        own = sections.setdefault(name, {})
        for typed, value in section.items():
            key = typed.replace("_", "-")
            _check(path, name, key, options)
            before = next((k for k in own if k == key or _same_option(options.get(name, {}), k, key)), None)
            if before is not None:
                raise UsageError(f"{path}, {_place(name, typed)}: the section sets {before} already; leave out one.")
            own[key] = value
    return SettingsFile(path, sections)


def _same_option(options: Mapping[str, Any], one: str, other: str) -> bool:
    """Whether two keys are names of one option."""
    return one in options and other in options and options[one].name == options[other].name


def _sections(tables: Mapping[str, Any], options: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each table with its own keys, and those of the tables in it."""
    own = {key: value for key, value in tables.items() if not isinstance(value, dict)}
    if own or above in options or above == COMMON:
        yield above, own
    elif above and not any(name.startswith(above + " ") for name in options):
        yield above, {"": None}  # nothing in it, and no command: to be refused all the same
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from _sections(value, options, f"{above} {key}".strip())


def _check(path: Path, name: str, key: str, options: Mapping[str, Mapping[str, Any]]) -> None:
    where = f"{path}, {_place(name, key)}"
    if not name:
        raise UsageError(f"{where} is in no section: put it into [{COMMON}], or into that of a command.")
    if name == COMMON:
        known = {*_FOR_ALL, *_FOR_ANSWERS}
        if key not in known:
            raise UsageError(f"{where}: [{COMMON}] has {', '.join(sorted(known))}{_meant(key, known)}.")
    elif name not in options:
        raise UsageError(f"{where}: there is no command {name!r}{_meant(name, {*options, COMMON})}.")
    elif key not in options[name]:
        raise UsageError(f"{where}: `cacheroute {name}` has no such option to set{_meant(key, options[name])}.")


def _meant(word: str, known: Mapping[str, Any] | set[str]) -> str:
    question = did_you_mean(word, known)
    return f"; {question}" if question else ""


def _place(name: str, key: str) -> str:
    return f"[{name.replace(' ', '.')}] {key}".strip() if name else key


def options_of(command: Any) -> dict[str, Any]:
    """The options of a command that can be set, by each of their long names, without the dashes."""
    own = [p for p in command.params if p.param_type_name == "option" and p.expose_value]
    found = {name[2:]: p for p in own for name in p.opts if name.startswith("--")}
    return {key: option for key, option in found.items() if key not in _NEVER}


def options_of_all(group: Any, above: str = "") -> dict[str, dict[str, Any]]:
    """options_of() every command in a group and in the groups in it, by what is typed: "eval perplexity"."""
    found: dict[str, dict[str, Any]] = {}
    for name, command in group.commands.items():
        if getattr(command, "hidden", False):
            continue
        if hasattr(command, "commands"):
            found |= options_of_all(command, f"{above}{name} ")
        else:
            found[above + name] = options_of(command)
    return found


def variable(command: str, key: str) -> str:
    """The variable of an option: of one command, or with "" of all that have it."""
    return f"cacheroute {command} {key}".replace("  ", " ").replace(" ", "_").replace("-", "_").upper()


def is_common(command: str, key: str) -> bool:
    """Whether [common] and variable("", key) mean this option of this command."""
    return key in _FOR_ALL or (key in _FOR_ANSWERS and command in _ANSWERS)


def chosen(file: SettingsFile, command: str, options: Mapping[str, Any]) -> dict[str, Setting]:
    """What is set for a command, by the names of its function's arguments. Raises UsageError for what is no text."""
    found: dict[str, Setting] = {}
    # a variable goes before the file also where each has another name of the option
    for look in (partial(_from_environment, command), partial(_from_file, file, command)):
        for key, option in options.items():
            setting = look(key)
            if setting and str(option.name) not in found:  # the first of its names
                _check_lists(setting, key, option, several=command not in _ANSWERS)
                found[str(option.name)] = Setting(setting.option, _typed(setting.value, option), setting.origin)
    return found


def _check_lists(setting: Setting, key: str, option: Any, *, several: bool) -> None:
    """Raises UsageError for a list where one value is meant, and for lists in lists. `several`: of a command that compares."""
    if not isinstance(setting.value, list):
        return
    if not getattr(option, "multiple", False) and not (several and key in _LISTS):
        raise UsageError(f"{setting.origin} is wrong: it is one value; write it without brackets.")
    if any(isinstance(part, list | dict) for part in setting.value):
        raise UsageError(f"{setting.origin} is wrong: it is a list of values, without lists or tables in it.")


def _from_environment(command: str, key: str) -> Setting | None:
    for name in (variable(command, key), *([variable("", key)] if is_common(command, key) else [])):
        value = os.environ.get(name)
        if value and not files.is_text(value):
            raise UsageError(f"The variable {name} is not UTF-8 text.")
        if value:
            return Setting(f"--{key}", value, name)
    return None


def _from_file(file: SettingsFile, command: str, key: str) -> Setting | None:
    for section in (command, *([COMMON] if is_common(command, key) else [])):
        value = file.sections.get(section, {}).get(key)
        if value is not None:
            return Setting(f"--{key}", value, f"{file.path}, {_place(section, key)}")
    return None


def _typed(value: Any, option: Any) -> Any:
    """A value of TOML as it is typed: lists with commas, or as often as they are given where the option is repeated."""
    if isinstance(value, bool) and getattr(option, "is_flag", False):
        return value
    if getattr(option, "multiple", False):
        return [_text(part) for part in (value if isinstance(value, list) else [value])]
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_text(part) for part in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def of(parent: Any, name: str, command: Any) -> dict[str, Setting]:
    """What is set for `command`, called `name`, by the names of its function's arguments; `parent` is the context above it.

    Raises UsageError as read() and chosen() do.
    """
    root = parent.find_root() if parent else None
    above = [] if parent is None or parent is root else [str(parent.info_name)]
    file = read(options_of_all(root.command)) if root else SettingsFile()
    return chosen(file, " ".join([*above, name]), options_of(command))


def refused(error: Any, settings: Mapping[str, Setting]) -> str | None:
    """What to say instead of a BadParameter whose value is one of `settings`; None where it was typed."""
    name = str(getattr(error.param, "name", ""))
    if name not in settings or is_typed(error.ctx, name):
        return None
    message = " ".join(str(error.message).split())
    return f"{settings[name].origin} is wrong: {message[:1].lower()}{message[1:]}"


def blamed(sentence: str, ctx: Any) -> str:
    """A command's sentence on a value, with where that is from if nobody typed it. `ctx`: the command's, with its settings."""
    for name, setting in ctx.meta.get(META, {}).items():
        value = str(setting.value)
        told = re.search(rf"(?<![\w.]){re.escape(value)}(?![\w%])", sentence) if value else None
        if told and (not value.isalnum() or _speaks_of(sentence, name, setting)) and not is_typed(ctx, name):
            return f"{sentence.rstrip('.')} ({setting.option} is from {setting.origin})."
    return sentence


def _speaks_of(sentence: str, name: str, setting: Setting) -> bool:
    """Whether a sentence names an option: its value alone, as 0 or text, may stand there for something else."""
    words = {word for text in (name, setting.option) for word in re.split(r"[-_]", text) if len(word) > 1}
    words |= {"context"} if "ctx" in words else set()
    return any(re.search(rf"\b{re.escape(word)}", sentence, re.IGNORECASE) for word in words)


def lossy(ctx: Any) -> list[str]:
    """Sentences on routings that nobody typed and that change the answers of a command, to be said at its start."""
    if ctx.info_name not in _ANSWERS:
        return []  # what compares routings names each beside its figures
    return [
        f"{setting.option} {setting.value} is from {setting.origin}."
        for name, setting in ctx.meta.get(META, {}).items()
        if name in ("routing", "prompt_routing") and setting.value != "original" and not is_typed(ctx, name)
    ]


def is_typed(ctx: Any, name: str) -> bool:
    """Whether an option, by the name of its parameter, stands on the command line of that context."""
    source = ctx.get_parameter_source(name) if ctx else None
    return source is not None and source.name == "COMMANDLINE"


def in_effect(file: SettingsFile, options: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Everything that is set, for a person, and what overrides it."""
    said = []
    for section, values in file.sections.items():
        commands = [c for c in options if section in (c, COMMON)]
        for key, value in values.items():
            names = dict.fromkeys(
                name
                for c in commands
                for name in (variable(c, key), *([variable("", key)] if is_common(c, key) else []))
                if os.environ.get(name) and key in options[c]
            )
            by = f" (overridden by {', '.join(names)})" if names else ""
            said.append(f"{_place(section, key)} = {_shown(key, value)}{by}")
    return [*said, *(f"{name}={_shown(name, os.environ[name])}" for name in sorted(_variables(options) & {*os.environ}))]


def _shown(key: str, value: Any) -> str:
    return "(not shown)" if any(word in key.lower() for word in _SECRETS) else repr(_text(value))


def _variables(options: Mapping[str, Mapping[str, Any]]) -> set[str]:
    own = {variable(command, key) for command, keys in options.items() for key in keys}
    return own | {variable("", key) for key in (*_FOR_ALL, *_FOR_ANSWERS)}


def strange(group: Any) -> list[str]:
    """A sentence on each variable that looks like a setting of the group's commands and sets nothing."""
    if not any(name.startswith(_PREFIX) and name not in _OTHER_VARIABLES for name in os.environ):
        return []
    options = options_of_all(group)
    names = _variables(options) | {*_OTHER_VARIABLES}
    return [f"{name} sets nothing; {did_you_mean(name, names, 'unset it')}" for name in strange_variables(options)]


def strange_variables(options: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Variables that look like settings and set nothing."""
    known = _variables(options) | {*_OTHER_VARIABLES}
    return sorted(name for name in os.environ if name.startswith(_PREFIX) and name not in known)
