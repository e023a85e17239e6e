"""Analytic counts against torch's own counter, and against the figures of the literature."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from proxt2i.models.flops import forward_flops, peak_tflops, tokens_per_image, training_flops
from proxt2i.models.uvit import PRESETS, UViT2DModel, build_uvit

SMALL = dict(sample_size=8, in_channels=4, patch_size=2, embed_dim=32, depth=5, num_heads=4, text_dims=[6, 10], text_lengths=[3, 2])


@pytest.mark.parametrize("overrides", [{}, {"depth": 1}, {"final_conv": True}, {"mlp_ratio": 3.0, "qk_norm": True, "patch_size": 4}, {"embed_dim": 640}])
@pytest.mark.parametrize("height, width", [(8, 8), (4, 16)])
def test_counts_are_those_of_torch(overrides, height, width):
    model = UViT2DModel(**{**SMALL, **overrides})
    text = [torch.randn(1, n, d) for n, d in zip(SMALL["text_lengths"], SMALL["text_dims"])]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        eps = model(torch.randn(1, 4, height, width), torch.rand(1), torch.rand(1), text)
    assert counter.get_total_flops() == forward_flops(model.config, height, width)
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        eps.sum().backward()
    whole = counter.get_total_flops() + backward.get_total_flops()  # no gradient flows to the input: a little under three
    assert 0.97 * training_flops(model.config, height, width) < whole <= training_flops(model.config, height, width)


def test_uvit_h_at_256_and_512():
    """With 154 text tokens: 0.43 and 1.36 TFLOP."""
    with torch.device("meta"):
        config = build_uvit("H", text_lengths=[77, 77]).config
    assert tokens_per_image(config) == 2 + 154 + 256
    assert forward_flops(config) == pytest.approx(0.43e12, rel=0.01)
    assert forward_flops(config, 64, 64) == pytest.approx(1.36e12, rel=0.01)


def test_equal_area_costs_the_same_and_native_is_the_default():
    config = UViT2DModel(**{**SMALL, **PRESETS["portraits"]}).config
    assert forward_flops(config) == forward_flops(config, 8, 8) == forward_flops(config, 4, 16) < forward_flops(config, 8, 16)


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
    ("NVIDIA B200", 2250), ("NVIDIA A10G", None), ("Tesla T4", None), ("", None),
])
def test_peaks_are_known_or_none(name, peak):
    assert peak_tflops(name) == peak
