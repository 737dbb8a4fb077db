"""Reading a `Config`: defaults, then a YAML file, then the command line.

An unknown key is an error that suggests the near one. No torch here: `--help` is instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from sae.config import IDLE_BUT_FOR, Config

CONFIG_FILE = "config.yaml"
RENAMED = {"stream.scale": "stream.normalisation"}
"""Keys that older run folders have under another name."""


def dotted_keys(config_type: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of the configuration with its type: ("coder.k", int), …"""
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from dotted_keys(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hint


def flatten(config: object, prefix: str = "") -> dict[str, Any]:
    """Return {"coder.k": 32, …} of a dataclass tree."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def from_flat(values: Mapping[str, Any], base: Config | None = None) -> Config:
    """Return `base` with the dotted keys of `values` replaced, each checked against its type.

    Errors: ValueError for an unknown key, TypeError for a value of another type.
    """
    known = dict(dotted_keys())
    for key in values:
        if key not in known:
            raise ValueError(unknown_key_message(key, known))
    values = {key: _as_written(value, known[key]) for key, value in values.items()}
    for key, value in values.items():
        _check_type(key, value, known[key])
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".", 1)
        sections.setdefault(section, {})[name] = _as_field(value, known[key])
    base = base or Config()
    replaced = {
        section: dataclasses.replace(getattr(base, section), **fields)
        for section, fields in sections.items()
    }
    return dataclasses.replace(base, **replaced)


def unknown_key_message(key: str, known: Mapping[str, Any]) -> str:
    """Say that `key` is no setting, and which one is near."""
    near = difflib.get_close_matches(key, known, 1, 0.5)
    last = key.rsplit(".", 1)[-1]
    near = [name for name in known if name.rsplit(".", 1)[-1] == last] or near
    hint = f"Did you mean `{near[0]}`?" if near else "`sae train --help` lists them."
    return f"every key must be a setting of the configuration; got `{key}`. {hint}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file into dotted keys.

    Errors: ValueError where the file is missing, is no YAML, or is no tree of sections.
    """
    if not path.is_file():
        raise ValueError(f"the configuration must be a YAML file; {path} is not there.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` must be YAML; {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(
            f"`{path}` must hold sections such as `coder:`; got {type(tree).__name__}."
        )
    return dict(_leaves(tree))


def read_run_config(folder: Path) -> Config:
    """Return the resolved configuration that a run folder holds.

    Errors: ValueError where it holds none.
    """
    if not (folder / CONFIG_FILE).exists():
        raise ValueError(
            f"`{folder}` must be a run folder (with {CONFIG_FILE}); it is not. Give the folder "
            "that `sae train` printed."
        )
    written = read_yaml(folder / CONFIG_FILE)
    return from_flat({RENAMED.get(key, key): value for key, value in written.items()})


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    sections = {field.name for field in dataclasses.fields(Config)}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
        elif name not in sections or value is not None:
            yield name, value


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML, readable by `read_yaml`."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def from_command_line(arguments: Sequence[str], program: str) -> Config:
    """Return the configuration of `[CONFIG.yaml] [--section.key value …]`.

    Errors: ValueError and TypeError as `from_flat`; SystemExit as `with_flags`.
    """
    path = arguments[0] if arguments and not arguments[0].startswith("-") else None
    base = from_flat(read_yaml(Path(path))) if path else Config()
    config = with_flags(base, arguments[1 if path else 0 :], f"{program} CONFIG.yaml")
    warn_of_idle(config)
    if path and config.run.folder is None:
        return from_flat({"run.folder": f"runs/{Path(path).stem}"}, config)
    return config


def warn_of_idle(config: Config) -> None:
    """Warn of settings of the coder that do nothing for its activation."""
    coder, default = config.coder, Config().coder
    for name, activations in IDLE_BUT_FOR.items():
        value = getattr(coder, name)
        is_swept = bool(config.fleet.activation)
        if value == getattr(default, name) or coder.activation in activations or is_swept:
            continue
        instead = " Its L0 is set by `coder.target_l0`." if name == "k" else ""
        warnings.warn(
            f"`coder.{name}` does nothing for `coder.activation: {coder.activation}`; got {value}."
            f"{instead}",
            stacklevel=2,
        )


def with_flags(base: Config, arguments: Sequence[str], program: str) -> Config:
    """Return `base` with `--section.key value …` in place of its own values.

    Errors: ValueError for an unknown key; SystemExit for `--help`, and, its message printed, for a
    value that is refused.
    """
    import tyro

    known = dict(dotted_keys())
    for argument in arguments:
        key = argument.split("=", 1)[0].removeprefix("--").replace("-", "_").replace(".no_", ".")
        if argument.startswith("--") and key not in known and key != "help":
            raise ValueError(unknown_key_message(key, known))
    return tyro.cli(
        Config,
        prog=program,
        description="Settings given here override the YAML file, which overrides the defaults.",
        default=base,
        args=list(_with_lists(list(_as_in_yaml(arguments, known)), known)),
    )


def _as_in_yaml(arguments: Sequence[str], known: Mapping[str, Any]) -> Iterator[str]:
    """Yield the arguments with YAML's words for a switch, true and false, and for nothing, null,
    as tyro has them."""
    words = list(arguments)
    while words:
        argument = words.pop(0)
        flag, _, value = argument.partition("=")
        hint = known.get(flag.removeprefix("--").replace("-", "_"))
        meant = _meant_by(flag, value or (words[0] if words else ""), hint)
        if not argument.startswith("--") or meant is None:
            yield argument
            continue
        yield from meant
        if not value:
            words.pop(0)


def _meant_by(flag: str, value: str, hint: Any) -> list[str] | None:
    """Return how tyro says `flag: value`, where YAML has a word of its own for the value."""
    if bool in _members(hint) and value in ("true", "false"):
        return [flag if value == "true" else flag.replace(".", ".no_", 1)]
    return [flag, "None"] if type(None) in _members(hint) and value == "null" else None


def _with_lists(arguments: Sequence[str], known: Mapping[str, Any]) -> Iterator[str]:
    """Yield the arguments with `16,32` as two where a key takes a list.

    Not where its members are free text (`data.exclude_tokens`), which may hold commas themselves;
    a hookpoint's path holds none.
    """
    divides = False
    for argument in arguments:
        words = [argument]
        if argument.startswith("--"):
            words = argument.split("=", 1)
            key = words[0].removeprefix("--").replace("-", "_")
            divides = key.startswith("fleet.") or _is_list_without_text(known.get(key))
            if not divides:
                words = [argument]
        for word in words:
            yield from _divided(word) if divides else [word]


def _divided(text: str) -> list[str]:
    return [part for part in text.split(",") if part] or [text]


def _is_list_without_text(hint: Any) -> bool:
    lists = [member for member in _members(hint) if typing.get_origin(member) is tuple]
    items = [item for member in lists for item in typing.get_args(member)]
    return bool(lists) and not any(str in _members(item) for item in items)


def _as_written(value: Any, hint: Any) -> Any:
    """Undo two surprises of YAML 1.1: 1e-3 is text to it, and an unquoted no is False."""
    if value is False and "no" in typing.get_args(hint):
        return "no"
    if isinstance(value, str) and float in _members(hint):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _as_field(value: Any, hint: Any) -> Any:
    """Return a YAML value in the field's own type: lists become tuples, ints floats."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in _members(hint):
        return value if int in _members(hint) else float(value)
    return value


def _members(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _check_type(key: str, value: Any, hint: Any) -> None:
    if not any(_fits(value, member) for member in _members(hint)):
        wanted = getattr(hint, "__name__", str(hint)).replace("typing.", "")
        if typing.get_origin(hint) is Literal:
            wanted = f"one of {list(typing.get_args(hint))}"
            near = difflib.get_close_matches(str(value), map(str, typing.get_args(hint)), 1)
            wanted += f" (did you mean {near[0]!r}?)" if near else ""
        raise TypeError(f"`{key}` must be {wanted}; got {value!r} ({type(value).__name__}).")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        members = typing.get_args(hint)
        is_list = isinstance(value, (list, tuple)) and all(
            any(_fits(v, member) for member in _members(members[0])) for v in value
        )
        return is_list and (members[-1] is Ellipsis or len(value) == len(members))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)
