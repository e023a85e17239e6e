"""The fused proximal step and its noise: against published vectors, closed forms, and the plain-torch reference."""

import itertools
import math
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from op_cases import DEVICES, OPS, restore_cpu  # noqa: F401  (a fixture)

from proxt2i import _C
from proxt2i.ops import native, philox_normal, prox_step, step_row
from proxt2i.ops.philox import box_muller, philox4x32_10, philox_words_ref

STEP = dict(guidance_scale=2.5, sqrt_lam=0.8, a=1.2, b=0.6)
ROW = step_row(**STEP, draw=1)
FULL = step_row(**STEP, clean_y=1.1, clean_eps=0.7, memory=0.4, draw=1)


def tensors(*shape, dtype=torch.float32, eps_dtype=None, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    y, cond, uncond = (torch.randn(shape, generator=generator, dtype=dtype).to(device) for _ in range(3))
    seeds = torch.randint(-(2**62), 2**62, shape[:1], generator=generator).to(device)
    return y, cond.to(eps_dtype or dtype), uncond.to(eps_dtype or dtype), seeds


# ---- Philox: integers ------------------------------------------------------------------------------------------------------

KNOWN_ANSWERS = [  # Random123's kat_vectors for philox4x32 10: counter, key, result
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert list(_C.philox4x32_10(counter, key)) == expected
    words = philox4x32_10([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(w) for w in words] == expected


def test_philox_reference_words_equal_native():
    seeds, step = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789012345]), 2**40 + 7
    words = torch.stack(philox_words_ref(seeds, step, 33), dim=-1)
    for image, block in itertools.product(range(len(seeds)), (0, 1, 32)):
        seed = int(seeds[image]) % 2**64
        native = _C.philox4x32_10([block, 0, step % 2**32, step >> 32], [seed % 2**32, seed >> 32])
        assert list(native) == words[image, block].tolist()


# ---- normals ---------------------------------------------------------------------------------------------------------------

def ulps(value, exact):
    """Largest distance in units of the last place of float32."""
    exact = exact.double()
    spacing = torch.from_numpy(np.spacing(exact.abs().float().numpy())).double()
    return float(((value.double() - exact).abs() / spacing).max())


def test_box_muller_within_few_ulp_and_finite_at_extremes():
    edges = [0, 1, 2, 3, 2**29 - 1, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 - 2, 2**32 - 1]
    pairs = torch.tensor(list(itertools.product(edges, edges)))
    native = torch.tensor([_C.box_muller(int(a), int(b)) for a, b in pairs])
    exact = box_muller(pairs[:, 0], pairs[:, 1])
    assert torch.isfinite(native).all()
    assert native.abs().max() == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)  # u = 2^-32
    small = exact.abs() < 1e-12  # sin(pi) and its like: exactly zero natively, rounding noise in the float64 reference
    assert native[small].abs().max() == 0
    assert ulps(native[~small], exact[~small]) <= 4


@pytest.mark.parametrize("device", DEVICES)
def test_normals_equal_reference_within_few_ulp(device):
    seeds = torch.tensor([3, -5, 2**50], device=device)
    native = philox_normal(seeds, 9, (50_001,), impl="native").cpu()
    assert ulps(native, philox_normal(seeds.cpu(), 9, (50_001,), impl="ref")) <= 4


def test_normals_are_standard_normal():
    z = philox_normal(torch.arange(16), 3, (1 << 17,)).double().flatten()
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((z**power).mean()) - moment) < 5 * math.sqrt(variance / n), power
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    for level in (3.0, 4.0, 4.5):
        expected = n * 2 * scipy.stats.norm.sf(level)
        assert abs(int((z.abs() > level).sum()) - expected) < 5 * math.sqrt(expected), level


def test_normals_are_independent_between_seeds_steps_and_neighbours():
    n = 1 << 18
    z = torch.cat([philox_normal(torch.tensor([0, 1, 2**32]), step, (n,)) for step in (0, 1, 2**32)]).double()
    correlation = torch.corrcoef(torch.cat([z, z.roll(1, 1)[:3], z.roll(2, 1)[:3], z.square() - 1]))
    off_diagonal = correlation - torch.eye(len(correlation))
    assert off_diagonal.abs().max() < 6 / math.sqrt(n)


@pytest.mark.parametrize("impl", ["native", "ref"])
def test_noise_is_a_function_of_seed_step_and_element_alone(impl):
    seeds = torch.tensor([11, 22, 33, 22])
    whole = philox_normal(seeds, 4, (3, 700), impl=impl)
    assert torch.equal(whole[1], whole[3]) and not torch.equal(whole[0], whole[1])
    assert torch.equal(philox_normal(seeds[2:3], 4, (3, 700), impl=impl)[0], whole[2])
    assert torch.equal(philox_normal(seeds, 4, (1001,), impl=impl), whole.flatten(1)[:, :1001])  # not a multiple of 4
    assert not torch.equal(philox_normal(seeds, 5, (3, 700), impl=impl), whole)


def test_noise_does_not_depend_on_threads_or_instruction_set(restore_cpu):  # noqa: F811
    seeds = torch.arange(40)
    y, cond, uncond, _ = tensors(40, 1003)
    results = []
    for isa, torch_threads in itertools.product(_C.build_info()["cpu_isas"], (1, 3)):
        _C.use_cpu_isa(isa)
        torch.set_num_threads(torch_threads)
        results.append(prox_step(y, cond, uncond, FULL, clean=cond, seeds=seeds, want_clean=True, impl="native"))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


# ---- the step --------------------------------------------------------------------------------------------------------------

def native_plain_exact(shape, eps_dtype, device):
    """(x, y_next, D) of the kernel, of float32 torch given the exact noise rounded to float32, and of float64 throughout."""
    y, cond, uncond, seeds = tensors(*shape, eps_dtype=eps_dtype, device=device)
    words = philox_words_ref(seeds, 1, (math.prod(shape[1:]) + 3) // 4)
    z = torch.cat([box_muller(*words[:2]), box_muller(*words[2:])], dim=-1).flatten(1)
    z = z[:, :math.prod(shape[1:])].reshape(shape)
    clean = 0.3 * y.flip(0)
    return (prox_step(y, cond, uncond, FULL, clean=clean, seeds=seeds, want_clean=True, impl="native"),
            prox_step(y, cond, uncond, FULL, clean=clean, noise=z.float(), want_clean=True, impl="ref"),
            prox_step(y.double(), cond, uncond, FULL, clean=clean.double(), noise=z, want_clean=True, impl="ref"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("eps_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 16, 32, 32), (3, 2051)])
def test_error_at_most_twice_that_of_plain_torch(shape, eps_dtype, device):
    for ours, plain, exact in zip(*native_plain_exact(shape, eps_dtype, device)):
        assert ours.dtype == torch.float32 and ours.shape == shape
        error, allowed = (ours - exact).abs(), (plain - exact).abs()
        assert error.max() <= 2 * allowed.max() and error.mean() <= 2 * allowed.mean()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1), (5,), (1, 2, 3), (2, 511), (2, 513)])
def test_odd_sizes(shape, device):
    for ours, _, exact in zip(*native_plain_exact(shape, torch.bfloat16, device)):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_closed_forms(device):
    y, cond, uncond, seeds = tensors(3, 4, 5, device=device, dtype=torch.float64)
    x, y_next, _ = prox_step(y, cond, None, step_row(**STEP, draw=6), seeds=seeds)
    torch.testing.assert_close(x, y - 0.8 * cond)
    torch.testing.assert_close(y_next, 1.2 * x + 0.6 * philox_normal(seeds, 6, (4, 5)).double())
    noise, before = torch.randn_like(y), torch.randn_like(y)
    torch.testing.assert_close(prox_step(y, cond, None, ROW, noise=noise)[1], 1.2 * x + 0.6 * noise)
    _, remembering, clean = prox_step(y, cond, None, FULL, clean=before, noise=noise, want_clean=True)
    torch.testing.assert_close(clean, 1.1 * y - 0.7 * cond)
    torch.testing.assert_close(remembering, 1.2 * x + 0.6 * noise + 0.4 * (clean - before))
    x, y_next, _ = prox_step(y, cond, uncond, step_row(0.5, guidance_scale=0, a=1.5), noise=noise)  # b = 0: noise unused
    torch.testing.assert_close(x, y - 0.5 * uncond)
    torch.testing.assert_close(y_next, 1.5 * x)
    torch.testing.assert_close(prox_step(y, cond, uncond, step_row(0.5), want_next=False)[0], y - 0.5 * cond)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["native", "ref"])
def test_every_image_may_have_a_row_of_its_own(impl, device):
    """A batch of images at different steps: the same bits as each image alone, its row taken out of a table."""
    y, cond, uncond, seeds = tensors(3, 2, 77, device=device)
    clean = torch.randn_like(y)
    table = torch.tensor([FULL, step_row(0.3, guidance_scale=1.5, a=0.9, b=0.1, clean_eps=1, draw=5), step_row(2.0, a=0.5)],
                         dtype=torch.float64, device=device)
    together = prox_step(y, cond, uncond, table, clean=clean, seeds=seeds, want_clean=True, impl=impl)
    for i in range(3):
        one = slice(i, i + 1)
        alone = prox_step(y[one], cond[one], uncond[one], table[i], clean=clean[one], seeds=seeds[one], want_clean=True, impl=impl)
        for ours, theirs in zip(alone, together):
            assert torch.equal(ours, theirs[one])


@pytest.mark.parametrize("impl", ["native", "ref"])
def test_outputs_that_are_not_wanted_change_nothing_else(impl):
    y, cond, uncond, seeds = tensors(2, 3, 9)
    everything = prox_step(y, cond, uncond, FULL, clean=cond, seeds=seeds, want_clean=True, impl=impl)
    for wanted in itertools.product([True, False], repeat=3):
        flags = dict(zip(("want_x", "want_next", "want_clean"), wanted))
        got = prox_step(y, cond, uncond, FULL, clean=cond, seeds=seeds, impl=impl, **flags)
        assert all(value is None if not want else torch.equal(value, whole) for value, want, whole in zip(got, wanted, everything))


def test_half_precision_inputs_are_widened_exactly():
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        eps = bits.view(dtype)
        x = prox_step(torch.zeros(1, 2**16), eps[None], None, step_row(-1), want_next=False, impl="native")[0][0]
        torch.testing.assert_close(x, eps.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (3, 0), (2, 0, 5)])
@pytest.mark.parametrize("impl", ["native", "ref"])
def test_empty_shapes(shape, impl):
    y, cond, uncond, seeds = tensors(*shape)
    x, y_next, clean = prox_step(y, cond, uncond, FULL, seeds=seeds, want_clean=True, impl=impl)
    assert x.shape == y_next.shape == clean.shape == shape
    assert prox_step(y, cond, uncond, torch.tensor([FULL] * shape[0]).double().reshape(-1, 8), seeds=seeds, impl=impl)[0].shape == shape
    assert philox_normal(seeds, 0, shape[1:], impl=impl).shape == shape


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_and_misaligned_inputs(device):
    y, cond, uncond, seeds = tensors(4, 6, 8, 10, device=device)
    expected = prox_step(y, cond, uncond, FULL, clean=y, seeds=seeds, want_clean=True, impl="native")
    misaligned = torch.empty(y.numel() + 1, device=device)[1:].view(y.shape).copy_(cond)
    strided_seeds = seeds.repeat_interleave(2)[::2]
    got = prox_step(y.to(memory_format=torch.channels_last), misaligned, uncond.transpose(1, 3).contiguous().transpose(1, 3),
                    torch.tensor(FULL, device=device).double().repeat_interleave(2)[::2], clean=y.to(memory_format=torch.channels_last),
                    seeds=strided_seeds, want_clean=True, impl="native")
    for ours, theirs in zip(got, expected):
        assert ours.is_contiguous() and torch.equal(ours, theirs)


def test_inputs_are_left_alone():
    inputs = tensors(2, 3, 9)
    before = [t.clone() for t in inputs]
    prox_step(*inputs[:3], FULL, clean=inputs[0], seeds=inputs[3], want_clean=True, impl="native")
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


def test_wrong_inputs_are_refused_before_work():
    y, cond, uncond, seeds = tensors(2, 3, 4)
    cases = [
        (dict(y=y.half()), "y must be float32"),
        (dict(y=torch.tensor(1.0)), "shape"),
        (dict(eps_cond=cond[:1]), "eps_cond must have y's shape"),
        (dict(eps_uncond=uncond[..., :2]), "eps_uncond must have y's shape"),
        (dict(eps_cond=cond.long()), "eps_cond must be float32"),
        (dict(eps_cond=cond.to("meta")), "eps_cond is on meta"),
        (dict(seeds=None), "b != 0 needs noise or seeds"),
        (dict(seeds=seeds[:1]), "one entry for each"),
        (dict(seeds=seeds.int()), "seeds must be int64"),
        (dict(seeds=None, noise=y[0]), "noise must have y's shape"),
        (dict(clean=y[:, :2]), "clean must have y's shape"),
        (dict(row=ROW[:-1]), r"coefficients must have shape \[8\] or \[2, 8\], not \[7\]"),
        (dict(row=[ROW] * 3), "coefficients must have shape"),
        (dict(row=torch.tensor(ROW)), "coefficients must be float64"),
        (dict(impl="fast"), "impl must be"),
    ]
    for change, message in cases:
        call = dict(y=y, eps_cond=cond, eps_uncond=uncond, row=ROW, seeds=seeds) | change
        with pytest.raises(ValueError, match=message):
            prox_step(**call)
    with pytest.raises(ValueError, match="draw must be >= 0"):
        step_row(1, draw=-1)
    row = torch.tensor(ROW, dtype=torch.float64)
    raw = [(y, cond.double(), None, None, None, seeds, row), (y, cond[:1], None, None, None, seeds, row),
           (y, cond, None, None, None, seeds[:1], row), (y, cond, None, None, y.double(), None, row),
           (y, cond, uncond.half(), None, None, seeds, row), (y, cond, None, y[0], None, seeds, row),
           (y, cond, None, None, None, seeds, row[:7]), (y, cond, None, None, None, seeds, row.float())]
    for arguments in raw:  # the op itself, called past the Python face
        with pytest.raises(RuntimeError, match="proxt2i: "):
            OPS.prox_step(*arguments, True, True, True)


# ---- torch integration -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("guided, source", [(True, "seeds"), (True, "noise"), (False, None)])
def test_opcheck(guided, source, device):
    y, cond, uncond, seeds = tensors(3, 2, 5, device=device)
    y, cond, uncond = (t.requires_grad_() for t in (y, cond, uncond))
    noise, clean = (torch.randn_like(y).requires_grad_() if source == "noise" else None for _ in range(2))
    uncond = uncond if guided else None
    row = torch.tensor(FULL if source else step_row(0.8, a=1.2), dtype=torch.float64, device=device)
    for wanted in ((True, True, source == "noise"), (True, False, False), (False, True, True)):
        torch.library.opcheck(OPS.prox_step.default, (y, cond, uncond, clean, noise, seeds if source == "seeds" else None, row, *wanted))
    torch.library.opcheck(OPS.philox_normal.default, (seeds, 1, 10))


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("impl", ["native", "ref"])
def test_gradcheck(guided, impl):
    y, cond, uncond, seeds = tensors(2, 3, 2, dtype=torch.float64)
    noise, clean = torch.randn_like(y).requires_grad_(), torch.randn_like(y).requires_grad_()
    leaves = [t.requires_grad_() for t in ([y, cond, uncond] if guided else [y, cond])]
    rows = torch.tensor([FULL, step_row(0.3, guidance_scale=0.5, a=2, b=0, clean_y=1, clean_eps=3, memory=-1)]).double()

    def drawn(y, cond, uncond=None):
        return prox_step(y, cond, uncond, ROW, seeds=seeds, impl=impl)[:2]

    def given(noise, clean, y, cond, uncond=None):
        return prox_step(y, cond, uncond, rows, clean=clean, noise=noise, want_clean=True, impl=impl)

    def last(y, cond, uncond=None):
        return prox_step(y, cond, uncond, ROW, want_next=False, impl=impl)[0]

    assert torch.autograd.gradcheck(drawn, leaves) and torch.autograd.gradgradcheck(drawn, leaves)
    assert torch.autograd.gradcheck(given, [noise, clean, *leaves])
    assert torch.autograd.gradcheck(last, leaves)


def test_gradients_flow_into_half_precision_outputs():
    y, cond, uncond, seeds = tensors(2, 3, 8, eps_dtype=torch.bfloat16)
    grads = {}
    for impl in ("native", "ref"):
        leaves = [t.clone().requires_grad_() for t in (y, cond, uncond)]
        x, y_next, _ = prox_step(*leaves, ROW, seeds=seeds, impl=impl)
        (x.square().sum() + y_next.sin().sum()).backward()
        grads[impl] = [leaf.grad for leaf in leaves]
    for ours, theirs in zip(grads["native"], grads["ref"]):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_compiles_into_one_graph():
    y, cond, uncond, seeds = tensors(2, 3, 8)

    def step(y, cond, uncond, seeds):
        return prox_step(y * 2, cond, uncond, ROW, seeds=seeds)[1] + 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(y, cond, uncond, seeds), step(y, cond, uncond, seeds))


def test_works_without_the_extension_and_says_so_once():
    code = """if True:
        import sys; sys.modules["proxt2i._C"] = None
        import torch
        from proxt2i import ops
        for _ in range(3):
            z = ops.philox_normal(torch.tensor([7]), 0, (5,))
        print(ops.native_available(), z.tolist())"""
    result = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PROXT2I_REQUIRE_NATIVE": "0"}, capture_output=True,
                            text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("plain-torch reference") == 1
    assert result.stdout == f"False {philox_normal(torch.tensor([7]), 0, (5,), impl='ref').tolist()}\n"


def test_required_extension_is_an_error_when_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "proxt2i._C", None)
    monkeypatch.delattr("proxt2i._C")
    monkeypatch.setenv("PROXT2I_REQUIRE_NATIVE", "1")
    with pytest.raises(ImportError, match="PROXT2I_REQUIRE_NATIVE=1, but proxt2i._C cannot be imported"):
        runpy.run_path(native.__file__)
