"""tests/device_checks.py for pytest: on the CPU, where it tests itself (a kernel against itself), and on a GPU."""

import pytest
import torch

from proxt2i.ops import native_available

if not native_available():
    pytest.skip("proxt2i._C is not built", allow_module_level=True)
from device_checks import CHECKS, CPU, NotHere, Target  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not (torch.cuda.is_available() and native_available("cuda")), reason="needs a GPU and an extension with CUDA kernels"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CHECKS)
def test_check(name, device):
    try:
        CHECKS[name](Target(CPU, device, small=device == "cpu"))
    except NotHere as reason:
        pytest.skip(str(reason))


class Wrong:
    """The CPU kernels, of which one gives its results a last bit too much."""

    def __init__(self, wrong):
        self.wrong = wrong

    def __getattr__(self, name):
        def call(*arguments):
            results = getattr(CPU, name)(*arguments)
            if name != self.wrong:
                return results
            results = (results,) if isinstance(results, torch.Tensor) else results
            return tuple(torch.nextafter(r, torch.full_like(r, 100)) for r in results)
        return call


@pytest.mark.parametrize("check, op", [("prox_step", "prox_step"), ("philox_normal", "philox_normal"), ("guided_eps", "guided_eps"),
                                       ("transition_log_ratio", "transition_log_ratio_backward"), ("matching", "matching_errors"),
                                       ("matching", "noised_pair")])
def test_a_single_wrong_bit_is_found(check, op):
    with pytest.raises(AssertionError, match="differ from the CPU's"):
        CHECKS[check](Target(Wrong(op), "cpu", small=True))
