"""Reading a typed configuration: dataclass defaults <= YAML files <= "section.key=value" overrides, for any dataclass of sections.

Plain values come in, one typed field at a time, so that an error knows where the value came from.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def read_config(schema: type[T], files: str | Path | list[str | Path] = (), overrides: list[str] = ()) -> T:
    """A `schema` (a dataclass whose fields are dataclasses, the sections) with its defaults, then `files`, later ones winning, then
    `overrides`. Raises ValueError for an unreadable file, an unknown key or a wrong type."""
    config = OmegaConf.structured(schema)
    for file in [files] if isinstance(files, (str, Path)) else files or ():
        _assign_all(schema, config, _read_yaml(schema, Path(file)), source=str(file))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or "." not in key:
            raise ValueError(f"override {override!r}: expected section.key=value, for example optim.lr=1e-3")
        _assign(schema, config, key, _parse_value(override, text), source=f"override {override!r}")
    return OmegaConf.to_object(config)


def from_tree(schema: type[T], tree: dict, source: str) -> T:
    """The `schema` that dataclasses.asdict made `tree` of. ValueError, naming `source`, if it is none."""
    config = OmegaConf.structured(schema)
    _assign_all(schema, config, tree, source)
    return OmegaConf.to_object(config)


def to_yaml(config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def keys_of(schema: type) -> list[str]:
    """Every dotted key, e.g. "optim.lr"."""
    return [f"{section.name}.{key.name}" for section in dataclasses.fields(schema) for key in dataclasses.fields(section.default_factory)]


def get(config, key: str):
    """The value of a dotted key."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def check_ranges(config, positive=(), not_negative=(), fractions=()) -> None:
    """ValueError naming the first of these dotted keys whose value lies outside its range."""
    for key in positive:
        if not get(config, key) > 0:
            raise ValueError(f"{key} must be positive, got {get(config, key)}")
    for key in not_negative:
        if not get(config, key) >= 0:
            raise ValueError(f"{key} must not be negative, got {get(config, key)}")
    for key in fractions:
        if not 0 <= get(config, key) <= 1:
            raise ValueError(f"{key} must lie in [0, 1], got {get(config, key)}")


def check_choices(config, choices: dict[str, tuple[str, ...]]) -> None:
    """ValueError naming the first of these dotted keys whose value is not one of its choices."""
    for key, names in choices.items():
        if get(config, key) not in names:
            raise ValueError(f"{key} must be one of {', '.join(names)}; got {get(config, key)!r}")


def _read_yaml(schema: type, path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml and OmegaConf raise many kinds
        raise ValueError(f"config file {path} is not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"config file {path} must hold sections ({', '.join(_sections(schema))}), not a {type(loaded).__name__}")
    return loaded


def _assign_all(schema: type, config, tree: dict, source: str) -> None:
    for key, value in _leaves(schema, tree, source):
        _assign(schema, config, key, value, source)


def _leaves(schema: type, tree: dict, source: str):
    """(dotted key, value) pairs of a two-level mapping."""
    for section, values in tree.items():
        if section not in _sections(schema):
            raise ValueError(_unknown(str(section), source, _sections(schema)))
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ValueError(f"{source}: section {section} must hold `key: value` lines, got {values!r}")
        for key, value in values.items():
            yield f"{section}.{key}", value


def _parse_value(override: str, text: str):
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except Exception as error:
        raise ValueError(f"override {override!r}: cannot read the value: {error}") from None


def _assign(schema: type, config, key: str, value, source: str) -> None:
    if key not in keys_of(schema):
        raise ValueError(_unknown(key, source, keys_of(schema)))
    section, name = key.split(".")
    try:
        OmegaConf.update(config, key, value, merge=False)
    except OmegaConfBaseException:
        expected = schema.__dataclass_fields__[section].default_factory.__dataclass_fields__[name].type
        raise ValueError(f"{source}: {key} must be {expected}, got {value!r} ({type(value).__name__})") from None


def _unknown(key: str, source: str, names: list[str]) -> str:
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if not close and "." in key:  # right key, wrong section
        close = [name for name in names if name.split(".")[1] == key.split(".")[1]]
    own = [name for name in names if "." in key and name.startswith(key.split(".")[0] + ".")]
    near = [f"did you mean {close[0]}?"] if close else []
    hint = " ".join(near + ([f"valid: {', '.join(own or names)}"] if own or not close else []))
    return f"{source}: unknown key {key}; {hint}"


def _sections(schema: type) -> list[str]:
    return [section.name for section in dataclasses.fields(schema)]
