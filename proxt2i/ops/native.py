"""Finds the native extension proxt2i._C (built from csrc/) and says, once, when the plain-torch reference stands in for it."""

import functools
import os
import warnings

import torch

try:
    from proxt2i import _C
except ImportError as error:
    _C = None
    _reason = str(error)
    if os.environ.get("PROXT2I_REQUIRE_NATIVE") == "1":
        raise ImportError(f"PROXT2I_REQUIRE_NATIVE=1, but proxt2i._C cannot be imported ({_reason}); "
                          "build it with: pip install --no-build-isolation -e .") from error

IMPLS = (None, "native", "ref")
HAS_CUDA = _C is not None and bool(_C.build_info()["cuda"])  # known here: torch.compile does not follow the call


def native_available(device: str = "cpu") -> bool:
    """Whether the native operators are built for a device type ("cpu" or "cuda")."""
    return _C is not None and (device == "cpu" or (device == "cuda" and HAS_CUDA))


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use ("avx512_bf16", "avx512", "avx2" or "baseline"), or None where they are not built."""
    return None if _C is None else _C.build_info()["cpu_isa"]


CPU_IS_FAST = cpu_isa() not in (None, "baseline")  # so that the CPU kernels are worth calling where torch has its own
# Of x in linear layers for which the native kernels are worth calling: their products are faster than torch's on this CPU.
PRODUCTS = frozenset(getattr(torch, name) for name in (_C.build_info()["cpu_products"] if _C is not None else []))


def use_native(impl: str | None, device: torch.device) -> bool:
    """Resolves an op's `impl`: None = native where built, else the reference with one warning; "native" or "ref" insist."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be None, 'native' or 'ref', not {impl!r}")
    if impl == "ref":
        return False
    if native_available(device.type):
        return True
    if impl == "native":
        raise ValueError(f"impl='native': the native operators are not built for {device.type}; "
                         "build them with: pip install --no-build-isolation -e .")
    _warn_reference(device.type)
    return False


@functools.cache
def _warn_reference(device: str) -> None:
    reason = f"proxt2i._C cannot be imported: {_reason}" if _C is None else "proxt2i._C was built without kernels for it"
    warnings.warn(f"proxt2i: using the slower plain-torch reference on {device} ({reason})", RuntimeWarning, stacklevel=4)
