"""ProxT2I: text-to-image diffusion with learned proximal operators."""

import importlib

__version__ = "0.1.0"

_LAZY = {"ProxT2IPipeline": "proxt2i.pipeline_diffusers", "ProximalScheduler": "proxt2i.diffusion.scheduler"}  # they need diffusers


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
