"""Attention on packed qkv: against its definition, and which implementation a shape gets. The native kernels: tests/emulated/test_attention.py,
and on a GPU below."""

import importlib
import itertools
import math

import pytest
import torch
from op_cases import OPS, restore_cpu  # noqa: F401

from proxt2i import _C
from proxt2i.ops import attention, native_available
from proxt2i.ops.attention import HEAD_DIMS, _table, attention_ref, preferred, why_not_native

module = importlib.import_module("proxt2i.ops.attention")  # the package has the function under that name
needs_gpu = pytest.mark.skipif(not (torch.cuda.is_available() and native_available("cuda")),
                               reason="needs a GPU and an extension with CUDA kernels")


def packed(batch=2, tokens=9, heads=3, dim=8, dtype=torch.float32, device="cpu"):
    qkv = torch.randn(batch, tokens, 3, heads, dim, generator=torch.Generator().manual_seed(tokens))
    return qkv.to(device, dtype)


@pytest.mark.parametrize("impl", [None, "sdpa", "ref"])
@pytest.mark.parametrize("num_queries", [None, 4, 0])
def test_it_is_softmax_attention(impl, num_queries):
    qkv = packed()
    q, k, v = (part.squeeze(2) for part in qkv.split(1, dim=2))
    q = q[:, 9 - (9 if num_queries is None else num_queries) :]
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(attention(qkv, num_queries=num_queries, impl=impl), torch.einsum("bhqk,bkhd->bqhd", weights, v))


@pytest.mark.parametrize("impl", [None, "sdpa", "ref"])
def test_tokens_beyond_the_length_are_not_attended_to(impl):
    qkv, lengths = packed(batch=3), torch.tensor([9, 4, 0])
    out = attention(qkv, key_lengths=lengths, impl=impl)
    torch.testing.assert_close(out[0], attention(qkv[:1])[0])
    cut = qkv[1:2].clone()
    cut[:, 4:, 1:] = 1e3 * torch.randn(1, 5, 2, 3, 8)
    torch.testing.assert_close(attention(cut, key_lengths=lengths[1:2], impl=impl)[0], out[1])
    short = torch.cat([qkv[1:2, :4], qkv[1:2, 8:]], dim=1)[:, :4]
    torch.testing.assert_close(attention(short)[0], out[1, :4])
    assert not out[2].any()


@pytest.mark.parametrize("impl", ["sdpa", "ref"])
def test_qk_norm(impl):
    qkv, weights = packed(), torch.rand(2, 8) + 0.5
    expected = qkv.clone()
    for i, weight in enumerate(weights):
        expected[:, :, i] = weight * qkv[:, :, i] / (qkv[:, :, i].square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(attention(qkv, q_weight=weights[0], k_weight=weights[1], impl=impl), attention(expected))


@pytest.mark.parametrize("impl", ["sdpa", "ref"])
def test_gradcheck(impl):
    qkv = packed(tokens=4, heads=2, dim=3, dtype=torch.float64).requires_grad_()
    weights = [(torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_() for _ in range(2)]
    lengths = torch.tensor([4, 2])

    def run(qkv, q_weight, k_weight):
        return attention(qkv, key_lengths=lengths, num_queries=3, q_weight=q_weight, k_weight=k_weight, impl=impl)

    assert torch.autograd.gradcheck(run, (qkv, *weights))


def test_wrong_inputs_are_refused():
    qkv = packed()
    cases = [
        (dict(qkv=qkv[:, :, :2]), "qkv must have shape"), (dict(qkv=qkv[0]), "qkv must have shape"), (dict(num_queries=10), "num_queries=10"),
        (dict(num_queries=-1), "num_queries=-1"), (dict(key_lengths=torch.tensor([3])), "key_lengths must be int64"),
        (dict(key_lengths=torch.tensor([3.0, 2.0])), "key_lengths must be int64"), (dict(q_weight=torch.ones(8)), "both"),
        (dict(q_weight=torch.ones(7), k_weight=torch.ones(7)), "both"), (dict(impl="fast"), "impl must be"),
        (dict(impl="native"), "impl='native': on a CPU the native kernels take"),
    ]
    for change, message in cases:
        options = dict(qkv=qkv) | change
        with pytest.raises(ValueError, match=message):
            attention(options.pop("qkv"), **options)


def test_the_table_decides_where_the_kernels_would_do(monkeypatch):
    """On a card that the table does not name torch's kernels run; on one that it does, the nearest number of tokens decides."""
    qkv = torch.empty(1, 450, 3, 1, 72, dtype=torch.bfloat16)
    assert preferred(qkv) == "sdpa"
    monkeypatch.setattr(module, "why_not_native", lambda qkv: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(module, "_table", lambda: {"Card": {"72": {"256": "sdpa", "463": "native"}}})
    fake = type("", (), {"device": torch.device("cuda"), "shape": qkv.shape, "dtype": qkv.dtype})()
    assert preferred(fake) == "native"
    fake.shape = (1, 100, 3, 1, 72)
    assert preferred(fake) == "sdpa"
    monkeypatch.setattr(module, "_table", lambda: {"Another": {"72": {"463": "native"}}})
    assert preferred(fake) == "sdpa"


def test_the_committed_table_names_only_what_there_is():
    for rows in _table().values():
        assert set(rows) <= {str(dim) for dim in HEAD_DIMS}
        assert {choice for row in rows.values() for choice in row.values()} <= {"native", "sdpa"}


# -- the native CPU operator ------------------------------------------------------------------------------------------

# (images, tokens, heads, width), queries, key lengths: a portraits block and its last one, odd sizes, no keys, no queries
CPU_CASES = [((3, 42, 4, 32), 42, None), ((2, 42, 4, 32), 16, None), ((2, 9, 3, 16), 5, [9, 4]), ((2, 100, 2, 64), 100, [0, 77]), ((1, 7, 1, 48), 0, None)]


def cpu_case(shape, queries, lengths, normalised, dtype, of=None):
    """A function of `impl`: the output in `dtype` and its gradients, of numbers that are rounded to the dtype `of` (None: `dtype`) first."""
    qkv = packed(*shape, dtype=of or dtype).to(dtype).requires_grad_()
    kind = torch.promote_types(dtype, torch.float32)
    weights = [(torch.rand(shape[-1], generator=torch.Generator().manual_seed(i)) + 0.5).to(kind).requires_grad_() for i in range(2 * normalised)]
    grad = torch.randn(shape[0], queries, *shape[2:], generator=torch.Generator().manual_seed(2)).to(of or dtype).to(dtype)
    options = dict(num_queries=queries, key_lengths=None if lengths is None else torch.tensor(lengths))

    def run(impl):
        out = attention(qkv, impl=impl, **options, **dict(zip(("q_weight", "k_weight"), weights)))
        return [out, *torch.autograd.grad(out, [qkv, *weights], grad)]

    return run


@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape, queries, lengths", CPU_CASES)
def test_cpu_operator_is_as_exact_as_plain_torch(restore_cpu, shape, queries, lengths, normalised, dtype):  # noqa: F811
    """float64: the reference's numbers. Others: at most twice the error of the reference in the same dtype, gradients too, with any instruction
    set."""
    exact = cpu_case(shape, queries, lengths, normalised, torch.float64, of=dtype)
    torch.testing.assert_close(exact("native"), exact("ref"), rtol=1e-12, atol=1e-13)
    run = cpu_case(shape, queries, lengths, normalised, dtype)
    for isa in _C.build_info()["cpu_isas"]:
        _C.use_cpu_isa(isa)
        for native, plain, wanted in zip(run("native"), run("ref"), exact("ref"), strict=True):
            assert native.dtype == plain.dtype
            if wanted.numel():
                error, allowed = (native - wanted).abs(), (plain - wanted).abs()
                floor = {torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 2) * wanted.abs().max()
                assert error.max() <= 2 * allowed.max() + floor and error.mean() <= 2 * allowed.mean() + floor / 20, isa


def test_cpu_operator_is_chosen_for_short_sequences(monkeypatch):
    monkeypatch.setattr(module, "CPU_IS_FAST", True)
    assert preferred(packed(dim=32)) == preferred(packed(dim=32, dtype=torch.bfloat16)) == "native"
    for other in (packed(dim=24), packed(1, 257, 1, 16), packed(dim=32, dtype=torch.float64)):
        assert preferred(other) == "sdpa"
    monkeypatch.setattr(module, "CPU_IS_FAST", False)
    assert preferred(packed(dim=32)) == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_operator_gives_the_same_bits_on_any_threads_and_instruction_set(restore_cpu, dtype):  # noqa: F811
    """But for bfloat16 with avx512_bf16, whose products are of rounded numbers."""
    run, first = cpu_case((12, 42, 4, 32), 42, None, True, dtype), {}  # 48 heads, at least 16 for each thread
    for isa, threads in itertools.product(_C.build_info()["cpu_isas"], (1, 3)):
        _C.use_cpu_isa(isa)
        torch.set_num_threads(threads)
        result = run("native")
        wanted = first.setdefault(isa == "avx512_bf16" and dtype == torch.bfloat16, result)
        assert all(torch.equal(a, b) for a, b in zip(result, wanted)), (isa, threads)
    if len(first) == 2:
        assert not torch.equal(first[True][0], first[False][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_operator_passes_on_what_is_not_a_number_and_nothing_else(restore_cpu, dtype):  # noqa: F811
    qkv = packed(dim=16, dtype=dtype)
    qkv[0, 3, 0, 1, 5] = math.nan  # a query
    qkv[1, 7:, 1:] = math.nan      # beyond the length
    lengths, weights = torch.tensor([9, 7]), [torch.ones(16, requires_grad=True) for _ in range(2)]
    for isa in _C.build_info()["cpu_isas"]:
        _C.use_cpu_isa(isa)
        for norm in ({}, dict(zip(("q_weight", "k_weight"), weights), norm_eps=0.0)):
            leaf = qkv.clone().requires_grad_()
            out = attention(leaf, key_lengths=lengths, impl="native", **norm)
            assert out[0, 3, 1].isnan().all() and out.isnan().sum() == 16, isa
            grad = torch.autograd.grad(out, leaf, torch.ones_like(out))[0].isnan()
            assert grad[0, :, 1, 1].any() and not grad[0, :, :, [0, 2]].any() and not grad[1, :7].any(), isa


def test_cpu_operator_passes_opcheck_and_gradcheck():
    qkv = packed(1, 4, 2, 16, torch.float64).requires_grad_()
    weights = [(torch.rand(16, dtype=torch.float64) + 0.5).requires_grad_() for _ in range(2)]
    torch.library.opcheck(OPS.attention_forward.default, (qkv, torch.tensor([3]), *weights, 3, 0.25, 1e-6))
    out, lse = (t.detach() for t in OPS.attention_forward(qkv, None, *weights, 3, 0.25, 1e-6))
    plain = [t.detach() for t in (qkv, *weights)]
    torch.library.opcheck(OPS.attention_backward.default, (out, plain[0], out, lse, None, *plain[1:], 0.25, 1e-6))
    assert torch.autograd.gradcheck(lambda *a: attention(a[0], key_lengths=torch.tensor([3]), num_queries=3, q_weight=a[1], k_weight=a[2], impl="native"),
                                    (qkv, *weights), fast_mode=True)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("tokens, dim, queries, lengths", [(463, 72, 463, None), (333, 64, 100, [333, 17]), (200, 128, 200, [1, 200]), (1, 72, 1, None)])
def test_native_error_at_most_twice_that_of_plain_torch(tokens, dim, queries, lengths, normalised, dtype):
    qkv, lengths = packed(2, tokens, 2, dim, dtype, "cuda"), None if lengths is None else torch.tensor(lengths, device="cuda")
    weights = [torch.rand(dim, device="cuda") + 0.5 for _ in range(2)] if normalised else []
    grad = torch.randn(2, queries, 2, dim, device="cuda").to(dtype)
    assert why_not_native(qkv) is None

    def gradients(run, dtype, of_weights=None):
        leaves = [t.detach().to(kind, copy=True).requires_grad_() for t, kind in zip([qkv, *weights], [dtype] + [of_weights or dtype] * 2)]
        out = run(*leaves)
        out.backward(grad.to(dtype))
        return out.detach(), *(leaf.grad for leaf in leaves)

    def native(qkv, q_weight=None, k_weight=None):
        return attention(qkv, key_lengths=lengths, num_queries=queries, q_weight=q_weight, k_weight=k_weight, impl="native")

    def plain(*leaves):
        return attention_ref(leaves[0], lengths, queries, *leaves[1:])

    for ours, theirs, true in zip(gradients(native, dtype, torch.float32), gradients(plain, dtype), gradients(plain, torch.float64), strict=True):
        error, allowed, floor = (ours - true).abs(), (theirs - true).abs(), torch.finfo(dtype).eps * max(float(true.abs().max()), 1e-2)
        assert error.max() <= max(2 * allowed.max(), floor) and error.mean() <= max(2 * allowed.mean(), floor / 10)
    assert all(torch.equal(a, b) for a, b in zip(gradients(native, dtype, torch.float32), gradients(native, dtype, torch.float32)))
