"""What a cluster wants of every job, in one small YAML file a cluster (configs/site_example.yaml has every key, explained)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Site:
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)  # any other sbatch option
    srun: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str | int] = field(default_factory=dict)
    container: str | None = None
    container_python: str | None = None
    python: str | None = None
    scratch: str | None = None
    shared: list[str] = field(default_factory=list)
    network_interface: str | None = None


KINDS = {"str": str, "int": int, "dict": dict, "list": list}


def load_site(path: Path | None) -> Site:
    """Raises ValueError that names the file and the key."""
    if path is None:
        return Site()
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--site {path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--site {path}: must hold `key: value` lines; configs/site_example.yaml has them all")
    known = {item.name: item.type for item in fields(Site)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(f"--site {path}: unknown key {key}; " + (f"did you mean {near[0]}?" if near else f"valid: {', '.join(known)}"))
        kind = known[key].split("[")[0].split(" ")[0]
        if value is not None and (not isinstance(value, KINDS[kind]) or isinstance(value, bool)):
            raise ValueError(f"--site {path}: {key} must be a {kind}, got {value!r}" + ("; put quotes around it" if kind == "str" else ""))
    for key in ("modules", "setup", "shared", "srun"):
        for entry in values.get(key) or []:
            if not isinstance(entry, str) or "\n" in entry:
                raise ValueError(f"--site {path}: {key} must be a list of single lines of text, got {entry!r}")
    for name in values.get("environment") or {}:
        if not str(name).isidentifier():
            raise ValueError(f"--site {path}: environment: {name!r} is no name of a variable")
    return Site(**{key: value for key, value in values.items() if value is not None})
