"""The emulator itself: what the instructions do, stated here from the PTX ISA's tables, and each mistake that it must notice."""

import math
import os
import re

import numpy as np
import pytest
import torch

OPS = torch.ops.proxt2i_selftest
LANES = range(32)


def words(halves):
    """int32 registers from pairs of 16-bit elements, the first in the low half."""
    return halves.contiguous().view(torch.int32)[..., 0]


# ---- ptx.cuh ---------------------------------------------------------------------------------------------------------------

# PTX ISA, "Matrix Fragments for mma.m16n8k16 / mma.m16n8k8 with floating point type": (row, column) of element i of a lane, where
# groupID = lane >> 2 and threadID_in_group = lane % 4.

def a_place(lane, i):
    group, member = lane >> 2, lane % 4
    row = group if i in (0, 1, 4, 5) else group + 8
    return row, member * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(lane, i):
    group, member = lane >> 2, lane % 4
    return member * 2 + (i & 1) + (8 if i >= 2 else 0), group


def c_place(lane, i):
    group, member = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), member * 2 + (i & 1)


def to_lanes(matrix, place, count):
    return torch.stack([torch.stack([matrix[place(lane, i)] for i in range(count)]) for lane in LANES])


@pytest.mark.parametrize("depth", [16, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [True, False])
def test_mma(depth, dtype, exact):
    generator = torch.Generator().manual_seed(depth)
    a, b, c = (torch.randn(shape, generator=generator) for shape in ((16, depth), (depth, 8), (16, 8)))
    if exact:  # small integers: no rounding anywhere
        a, b, c = ((16 * m).round() for m in (a, b, c))
    a, b = a.to(dtype), b.to(dtype)
    registers = to_lanes(c, c_place, 4)
    OPS.mma(words(to_lanes(a, a_place, depth // 2).view(32, -1, 2)), words(to_lanes(b, b_place, depth // 4).view(32, -1, 2)), registers,
            depth, dtype == torch.bfloat16)
    expected = to_lanes(c.double() + a.double() @ b.double(), c_place, 4)
    tolerance = 0 if exact else 1e-5
    torch.testing.assert_close(registers.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind, count, transposed", [(0, 4, False), (1, 4, True), (2, 2, False), (3, 2, True)])
def test_ldmatrix(kind, count, transposed):
    generator = torch.Generator().manual_seed(kind)
    memory = torch.randint(-(2**15), 2**15, (64 * 8,), generator=generator).to(torch.int16)
    rows = torch.randperm(64, generator=generator)[:32]  # any rows, in any order
    got = OPS.ldmatrix(memory.view(torch.int32), (16 * rows).int(), kind)
    for i in range(count):
        matrix = memory.view(64, 8)[rows[8 * i:8 * i + 8]]
        matrix = matrix.T if transposed else matrix
        for lane in LANES:
            assert got[lane, i] == words(matrix[lane >> 2, 2 * (lane % 4):2 * (lane % 4) + 2].clone())
    assert (got[:, count:] == 0).all()


def test_ldmatrix_x2_ignores_the_addresses_of_the_upper_lanes():
    offsets = torch.cat([16 * torch.arange(16), torch.full((16,), 1_000_001)]).int()
    OPS.ldmatrix(torch.arange(64, dtype=torch.int32), offsets, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pack2(dtype):
    every = torch.arange(2**16).int().to(torch.int16).view(dtype).float()  # every 16-bit float, the middle to the next, beyond it
    every = every[every.isfinite()]
    up = torch.from_numpy(np.nextafter(every.numpy(), np.float32(np.inf)))
    middle = (every.double() + (every.to(dtype).view(torch.int16) + 1).view(dtype).double()) / 2
    middle = middle[middle.isfinite()].float()
    extremes = torch.tensor([65519.996, 65520, 65536, 3.3961775e38, 3.4e38, 1e-45, -1e-45, 2**-25, 2**-24, math.inf, -math.inf, 0., -0.])
    low = torch.cat([every, up, middle, extremes])
    high = low.flip(0)
    got = OPS.pack2(low, high, dtype == torch.bfloat16).view(torch.int16).view(-1, 2)
    for ours, exact in zip(got.T, (low, high)):
        assert torch.equal(ours, exact.to(dtype).view(torch.int16))
    nan = OPS.pack2(torch.tensor([float("nan")]), torch.tensor([-float("nan")]), dtype == torch.bfloat16)
    assert nan.view(torch.int16).tolist() == [0x7FFF, 0x7FFF]


def test_cp_async_arrives_with_the_wait_for_its_group():
    source = torch.arange(256, dtype=torch.int32)
    first, second = OPS.cp_async(source, 256, 0, 0)
    assert torch.equal(torch.cat([first, second]), source)
    first, second = OPS.cp_async(source, 256, 1, 0)
    assert torch.equal(first, source[:128]) and (second == -1).all()
    assert (OPS.cp_async(source, 256, 2, 0) == -1).all()  # no wait


def test_cp_async_fills_with_zeros_and_does_not_touch_what_is_invalid():
    source = torch.arange(100, dtype=torch.int32)  # ASan watches its end
    got = OPS.cp_async(source, 100, 0, 0).flatten()
    assert torch.equal(got[:100], source) and (got[100:] == 0).all()


# PTX ISA, "Asynchronous Warpgroup Level Matrix": without swizzling a core is 8 x 16 bytes, one after another, K-major a row (of a; a
# column of b) of 8 elements along the depth, MN-major 8 columns at one depth; warp w has rows 16 w ... 16 w + 15.

def put(memory, at, leading, stride, matrix, mn_major):
    """matrix [rows, 16] into memory, 16-bit elements, at byte offsets."""
    for row in range(len(matrix)):
        for depth in range(16):
            inside = 8 * (depth % 8) + row % 8 if mn_major else 8 * (row % 8) + depth % 8
            memory[(at + depth // 8 * leading + row // 8 * stride) // 2 + inside] = matrix[row, depth]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("registers", [True, False])
def test_wgmma(dtype, add, registers):
    generator = torch.Generator().manual_seed(7)
    a, b, c = ((8 * torch.randn(shape, generator=generator)).round() for shape in ((64, 16), (72, 16), (64, 72)))
    memory = torch.full((8192,), math.nan).to(dtype)
    places = [0, 1040, 128, 2304, 1168 if not registers else 128, 128 if not registers else 272]
    put(memory, *places[3:], b.to(dtype), mn_major=registers)
    rows = [a[16 * warp:16 * warp + 16].to(dtype) for warp in range(4)]
    if registers:
        lanes = torch.cat([words(to_lanes(part, a_place, 8).view(32, -1, 2)) for part in rows])
    else:
        put(memory, *places[:3], a.to(dtype), mn_major=False)
    got = torch.cat([torch.cat([to_lanes(c[16 * w:16 * w + 16, 8 * n:8 * n + 8], c_place, 4) for n in range(9)], 1) for w in range(4)])
    OPS.wgmma(memory.view(torch.int32), lanes if registers else None, places, add, dtype == torch.bfloat16, got)
    true = a @ b.T + (c if add or registers else 0)
    true = [torch.cat([to_lanes(true[16 * w:16 * w + 16, 8 * n:8 * n + 8], c_place, 4) for n in range(9)], 1) for w in range(4)]
    assert torch.equal(got, torch.cat(true))


# ---- warps and blocks ------------------------------------------------------------------------------------------------------

def shuffled(source):
    values = torch.arange(32, dtype=torch.int32) * 3 - 40
    return values[torch.tensor(source)]


@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles(width):
    values = torch.arange(32, dtype=torch.int32) * 3 - 40

    def segment(lane):
        return lane // width * width

    for argument in (0, 1, 3, 7, 31):
        cases = [[segment(i) + argument % width for i in LANES],
                 [i ^ argument if (i ^ argument) < segment(i) + width else i for i in LANES],
                 [i + argument if i + argument < segment(i) + width else i for i in LANES],
                 [i - argument if i - argument >= segment(i) else i for i in LANES]]
        for kind, source in enumerate(cases):
            assert torch.equal(OPS.shuffle(values, kind, argument, width), shuffled(source)), (kind, argument)


def test_votes_and_halves_of_a_warp():
    values = torch.arange(32, dtype=torch.int32) * 3 - 40
    assert (OPS.shuffle(values, 4, 0, 32).long() % 2**32 == sum(1 << i for i in LANES if values[i] > 0)).all()
    assert (OPS.shuffle(values, 5, 52, 32) == 1).all() and (OPS.shuffle(values, 5, 53, 32) == 0).all()
    assert torch.equal(OPS.shuffle(values, 6, 5, 32), shuffled([i ^ 5 for i in LANES]))


@pytest.mark.parametrize("threads, threads_y", [(32, 1), (256, 1), (256, 8), (1024, 4)])
def test_block_reduction(threads, threads_y):
    x = torch.arange(3 * threads).float().view(3, threads) % 11
    assert torch.equal(OPS.sums(x, threads_y, True), x.sum(1, keepdim=True).expand(3, 2))


def test_missing_barriers_show():
    x = torch.ones(2, 256)
    assert not torch.equal(OPS.sums(x, 1, False), torch.full((2, 2), 256.))


# ---- mistakes: exceptions --------------------------------------------------------------------------------------------------

NONE, EXIT_BEFORE_BARRIER, BARRIER_AGAINST_SHUFFLE, TWO_BARRIERS, SHUFFLE_AGAINST_MMA, TWO_SHUFFLES, LANE_MISSING, LANE_EXITED, \
    OWN_LANE_MISSING, SOURCE_NOT_IN_MASK, DIFFERENT_MASKS, SHARED_OVERFLOW, STATIC_SHARED_OVERFLOW, STATIC_TEMPLATE_SHARED_OVERFLOW, \
    GLOBAL_OVERFLOW, GLOBAL_WRITE_OVERFLOW, MISALIGNED_VECTOR, READ_UNWRITTEN_SHARED, MISALIGNED_COPY, \
    LOCAL_OVERFLOW, ALIGNED_STATIC_SHARED_OVERFLOW = range(21)  # selftest.cu's enum Mistake


def mistake(what, grid=(1, 1, 1), block=(64, 1, 1), shared_bytes=256, count=64):
    x = torch.zeros(count, dtype=torch.int32)
    OPS.mistake(x, what, grid, block, shared_bytes)
    return x


def test_no_mistake():
    assert torch.equal(mistake(NONE), torch.arange(64).int())


@pytest.mark.parametrize("what, message", [
    (EXIT_BEFORE_BARRIER, r"thread \(\d+, 0, 0\) waits at __syncthreads \(selftest.cu:\d+\), for ever: thread \(3, 0, 0\) has exited"),
    (BARRIER_AGAINST_SHUFFLE, r"thread \(40, 0, 0\) waits at __syncwarp .*, mask f{8}, for ever: thread \(32, 0, 0\) has exited"),
    (TWO_BARRIERS, r"thread \(0, 0, 0\) waits at __syncthreads .*, for ever: thread \(32, 0, 0\) waits at __syncthreads"),
    (SHUFFLE_AGAINST_MMA, r"thread \(0, 0, 0\) waits at __shfl_sync .*, mask f{8}, for ever: thread \(1, 0, 0\) waits at mma_1688"),
    (TWO_SHUFFLES, r"thread \(0, 0, 0\) waits at __shfl_sync .*, mask f{8}, for ever: thread \(7, 0, 0\) waits at __shfl_sync"),
    (LANE_EXITED, r"thread \(0, 0, 0\) waits at __shfl_xor_sync .*, mask f{8}, for ever: thread \(5, 0, 0\) has exited"),
    (OWN_LANE_MISSING, r"thread \((0|32), 0, 0\): __shfl_sync \(selftest.cu:\d+\) is given a mask without the thread's own lane"),
    (SOURCE_NOT_IN_MASK, r"thread \(\d+, 0, 0\): __shfl_xor_sync \(selftest.cu:\d+\) reads a lane that is not in the mask"),
    (DIFFERENT_MASKS, r"waits at __shfl_xor_sync .*, mask ffffffff, for ever: thread \(\d+, 0, 0\) (has exited|waits at .* mask 0000ffff)"),
])
def test_divergence_is_an_error(what, message):
    with pytest.raises(RuntimeError, match=rf"emulated CUDA: block \(0, 0, 0\), .*({message})"):
        mistake(what)
    assert torch.equal(mistake(NONE), torch.arange(64).int())  # an error leaves nothing behind


def test_an_error_names_its_block(order):
    with pytest.raises(RuntimeError, match=r"block \(2, 1, 3\)" if order == "reverse" else r"block \(0, 0, 0\)"):
        mistake(LANE_EXITED, grid=(3, 2, 4))


def test_a_mask_beyond_the_block_is_an_error():
    with pytest.raises(RuntimeError, match=r"thread \(32, 0, 0\) waits at __shfl_xor_sync .*, for ever: the block has no lane 8 there"):
        mistake(LANE_MISSING, block=(40, 1, 1))


@pytest.mark.parametrize("launch, message", [
    (dict(block=(1025, 1, 1)), "1024 threads"), (dict(block=(64, 32, 1)), "1024 threads"), (dict(block=(1, 1, 65)), "1024 threads"),
    (dict(grid=(1, 65536, 1)), "a grid above"), (dict(grid=(1, 1, 65536)), "a grid above"), (dict(grid=(2**31, 1, 1)), "a grid above"),
    (dict(grid=(0, 1, 1)), "an empty grid"), (dict(block=(1, 0, 1)), "an empty grid or block"),
    (dict(shared_bytes=227 * 1024 + 1), "227 KiB"),
])
def test_launches_beyond_the_limits_are_errors(launch, message):
    with pytest.raises(RuntimeError, match=f"emulated CUDA: launch with .*{message}"):
        mistake(NONE, **launch)


def test_launches_at_the_limits():
    mistake(NONE, block=(16, 16, 4), shared_bytes=227 * 1024)
    mistake(NONE, grid=(1, 4097, 1), block=(1, 1, 1))


def test_misaligned_rows_and_copies_are_errors():
    memory = torch.zeros(256, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="ldmatrix_x4 .* is given a row that is not 16-byte aligned"):
        OPS.ldmatrix(memory, torch.full((32,), 8, dtype=torch.int32), 0)
    with pytest.raises(RuntimeError, match="cp_async_16 .* is given a global address that is not 16-byte aligned"):
        OPS.cp_async(torch.zeros(260, dtype=torch.int32), 256, 0, 1)
    with pytest.raises(RuntimeError, match="cp_async_16 .* is given a shared address that is not 16-byte aligned"):
        mistake(MISALIGNED_COPY)


def test_unwritten_shared_memory_holds_nans():
    assert (mistake(READ_UNWRITTEN_SHARED) == -1).all()


# ---- mistakes: the sanitizers end the process ------------------------------------------------------------------------------

DYING = {
    "shared memory": (lambda: mistake(SHARED_OVERFLOW), "heap-buffer-overflow"),
    "static shared memory": (lambda: mistake(STATIC_SHARED_OVERFLOW), "out of bounds"),
    "static shared memory of a template": (lambda: mistake(STATIC_TEMPLATE_SHARED_OVERFLOW), "out of bounds"),
    "aligned static shared memory": (lambda: mistake(ALIGNED_STATIC_SHARED_OVERFLOW), "global-buffer-overflow"),
    "a local array": (lambda: mistake(LOCAL_OVERFLOW), "stack-buffer-overflow"),
    "global memory": (lambda: mistake(GLOBAL_OVERFLOW), "heap-buffer-overflow"),
    "global memory, written": (lambda: mistake(GLOBAL_WRITE_OVERFLOW), "heap-buffer-overflow"),
    "a vector": (lambda: mistake(MISALIGNED_VECTOR), "misaligned address"),
    "cp_async": (lambda: OPS.cp_async(torch.zeros(250, dtype=torch.int32), 256, 0, 0), "heap-buffer-overflow"),
    "ldmatrix": (lambda: OPS.ldmatrix(torch.zeros(64, dtype=torch.int32), torch.full((32,), 256).int(), 0), "heap-buffer-overflow"),
}


@pytest.mark.parametrize("name", DYING)
def test_out_of_bounds_and_misaligned_accesses_end_the_process(name, tmp_path):
    call, message = DYING[name]
    report = tmp_path / "report"
    child = os.fork()
    if child == 0:
        os.dup2(os.open(report, os.O_WRONLY | os.O_CREAT), 2)
        call()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) != 0, "the process survived"
    assert message in report.read_text()
    assert re.search(r"(selftest\.cu|device\.cuh|ptx\.h):\d+", report.read_text())  # the report says where
