// The emulator's run time: coroutines, blocks, and the matrix instructions' arithmetic. Built without the sanitizers, for speed; the
// kernels and what they inline from emulator.h and ptx.h are built with them.
#include "emulator.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "ptx.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// ---- coroutines ------------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Pushes the registers that a function must preserve, and goes on where `to` did so. swapcontext would make two system calls.
extern "C" void proxt2i_emulator_switch(void** from, void* to);
asm(R"(
.pushsection .text
.type proxt2i_emulator_switch, @function
proxt2i_emulator_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.popsection
)");
#endif

namespace proxt2i::emulator {
namespace {

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
  void start(char* stack, size_t size, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + size) - 2;  // `entry` finds the stack as after a call
    *top = reinterpret_cast<void*>(entry);
    stack_pointer = top - 6;
    std::memset(stack_pointer, 0, 6 * sizeof(void*));
  }
  void go_to(Context& other) { proxt2i_emulator_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    makecontext(&context, entry, 0);
  }
  void go_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

struct Copy {
  void* to;
  unsigned char bytes[16];
  int group;
};

enum class State { fresh, ready, at_barrier, at_collective, exited };

struct Fiber;
struct Thread {
  uint3 index{};
  State state = State::fresh;
  Fiber* fiber = nullptr;
  const char* op = nullptr;  // what it waits for, and where
  Where where;
  uint32_t mask = 0;
  void* operand = nullptr;
  std::vector<Copy> copies;
  int groups = 0;
};

constexpr size_t stack_bytes = 256 * 1024;

void run_threads();

struct Fiber {  // a stack that threads run on, one after another
  Fiber() {
    void* p = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stack = static_cast<char*>(p);
    mprotect(stack, static_cast<size_t>(getpagesize()), PROT_NONE);
    restart();
  }
  ~Fiber() { munmap(stack, stack_bytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  void restart() {
    const auto guard = static_cast<size_t>(getpagesize());
    __asan_unpoison_memory_region(stack + guard, stack_bytes - guard);  // red zones of frames that were abandoned
    context.start(stack, stack_bytes, run_threads);
  }
  char* stack = nullptr;
  Context context;
  void* fake_stack = nullptr;  // ASan's
};

// ---- the state of the one launch that runs ---------------------------------------------------------------------------------

bool reverse_order = false;
std::mutex one_launch;
const std::function<void()>* kernel;
std::vector<Thread> threads;
Thread* current;
std::exception_ptr failure;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
Context scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;

void run_on(Fiber& fiber, Thread& thread) {
  thread.state = State::ready;
  thread.fiber = &fiber;
  current = &thread;
  threadIdx = thread.index;
}

void resume(Thread& thread) {
  Fiber* fiber = thread.fiber;
  if (thread.state == State::fresh) {
    if (idle.empty()) idle.push_back(fibers.emplace_back(std::make_unique<Fiber>()).get());
    fiber = idle.back();
    idle.pop_back();
  }
  run_on(*fiber, thread);
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber->stack, stack_bytes);
  scheduler.go_to(fiber->context);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

// The lane whose turn is after this one's, if it has not begun: without barriers, a warp then takes one coroutine in all.
Thread* fresh_neighbour(const Thread& thread) {
  const auto lane = &thread - threads.data(), next = reverse_order ? lane - 1 : lane + 1;
  if (next < 0 || next / 32 != lane / 32 || next == std::ssize(threads)) return nullptr;
  return threads[static_cast<size_t>(next)].state == State::fresh ? &threads[static_cast<size_t>(next)] : nullptr;
}

void back_to_scheduler(Fiber& fiber) {
  __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
  fiber.context.go_to(scheduler);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void run_threads() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    Fiber& fiber = *current->fiber;
    for (Thread* thread = current; thread != nullptr && !failure; thread = fresh_neighbour(*thread)) {
      run_on(fiber, *thread);
      try {
        (*kernel)();
      } catch (...) {
        failure = std::current_exception();
      }
      thread->state = State::exited;
    }
    idle.push_back(&fiber);
    back_to_scheduler(fiber);
  }
}

void wait(State state, const char* op, const Where& where) {
  current->state = state;
  current->op = op;
  current->where = where;
  back_to_scheduler(*current->fiber);
}

// ---- messages --------------------------------------------------------------------------------------------------------------

std::string text(const uint3& i) { return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")"; }

std::string text(const char* op, const Where& where) {
  const std::string file = where.file_name();
  return std::string(op) + " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line()) + ")";
}

std::string text(const Thread& thread) {
  if (thread.state == State::exited) return "thread " + text(thread.index) + " has exited";
  std::string result = "thread " + text(thread.index) + " waits at " + text(thread.op, thread.where);
  if (thread.state == State::at_collective) {
    char mask[16];
    std::snprintf(mask, sizeof mask, "%08x", thread.mask);
    result += std::string(", mask ") + mask;
  }
  return result;
}

[[noreturn]] void fail_block(const std::string& what) {
  throw std::runtime_error("emulated CUDA: block " + text(blockIdx) + ", " + what);
}

// ---- blocks ----------------------------------------------------------------------------------------------------------------

bool same_place(const Thread& a, const Thread& b) {
  const auto same = [](const char* p, const char* q) { return p == q || std::strcmp(p, q) == 0; };
  return a.state == b.state && a.where.line() == b.where.line() && a.where.column() == b.where.column() && same(a.op, b.op) &&
         same(a.where.file_name(), b.where.file_name());
}

// Nobody can go on: says who waits for whom, a warp's trouble before the block's.
[[noreturn]] void fail_deadlock() {
  for (const Thread& waiting : threads) {
    if (waiting.state != State::at_collective) continue;
    const size_t first = static_cast<size_t>(&waiting - threads.data()) / 32 * 32;
    for (size_t i = 0; i < 32; ++i) {
      if ((waiting.mask >> i & 1) == 0) continue;
      if (first + i >= threads.size()) fail_block(text(waiting) + ", for ever: the block has no lane " + std::to_string(i) + " there");
      const Thread& other = threads[first + i];
      if (!same_place(waiting, other) || waiting.mask != other.mask) fail_block(text(waiting) + ", for ever: " + text(other));
    }
  }
  const Thread& waiting = *std::find_if(threads.begin(), threads.end(), [](const Thread& t) { return t.state == State::at_barrier; });
  const Thread& other = *std::find_if(threads.begin(), threads.end(), [&](const Thread& t) { return !same_place(waiting, t); });
  fail_block(text(waiting) + ", for ever: " + text(other));
}

// Runs each lane until it waits or exits; whether any of them could.
bool advance(size_t warp) {
  const size_t first = 32 * warp, count = std::min<size_t>(32, threads.size() - first);
  bool moved = false;
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = threads[first + (reverse_order ? count - 1 - i : i)];
    if (thread.state != State::fresh && thread.state != State::ready) continue;
    resume(thread);
    if (failure) std::rethrow_exception(failure);
    moved = true;
  }
  return moved;
}

void run_block() {
  for (Thread& thread : threads) {
    thread.state = State::fresh;
    thread.copies.clear();
    thread.groups = 0;
  }
  const size_t warps = (threads.size() + 31) / 32;
  for (;;) {
    for (size_t i = 0; i < warps; ++i) {  // each warp as far as it can, so that the others see as little of its work as possible
      while (advance(reverse_order ? warps - 1 - i : i)) {}
    }
    const Thread& first = threads.front();
    if (first.state == State::exited) {
      if (std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.state == State::exited; })) return;
      fail_deadlock();
    }
    const bool met = first.state == State::at_barrier &&
                     std::all_of(threads.begin(), threads.end(), [&](const Thread& t) { return same_place(first, t); });
    if (!met) fail_deadlock();
    for (Thread& thread : threads) thread.state = State::ready;
  }
}

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto check = [](bool good, const char* what) {
    if (!good) throw std::runtime_error(std::string("emulated CUDA: launch with ") + what);
  };
  check(grid.x > 0 && grid.y > 0 && grid.z > 0 && block.x > 0 && block.y > 0 && block.z > 0, "an empty grid or block");
  check(grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535, "a grid above (2147483647, 65535, 65535)");
  check(block.x <= 1024 && block.y <= 1024 && block.z <= 64 && uint64_t{block.x} * block.y * block.z <= 1024,
        "a block of more than 1024 threads, or above (1024, 1024, 64)");
  check(shared_bytes <= 227 * 1024, "more than 227 KiB of dynamic shared memory");
}

}  // namespace

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  check_launch(grid, block, shared_bytes);
  const std::lock_guard lock(one_launch);
  struct Cleanup {
    ~Cleanup() {
      std::free(shared);
      shared = nullptr;
      failure = nullptr;
      if (idle.size() == fibers.size()) return;
      idle.clear();  // an error left threads waiting: their stacks start anew
      for (const auto& fiber : fibers) {
        fiber->restart();
        idle.push_back(fiber.get());
      }
    }
  } cleanup;
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, shared_bytes) != 0) throw std::bad_alloc();  // of the exact size: ASan watches its ends
  shared = static_cast<char*>(memory);
  kernel = &thread;
  gridDim = grid;
  blockDim = block;
  threads.assign(size_t{block.x} * block.y * block.z, Thread{});
  for (unsigned i = 0; i < threads.size(); ++i) threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        const auto at = [](unsigned i, unsigned n) { return reverse_order ? n - 1 - i : i; };
        blockIdx = {at(x, grid.x), at(y, grid.y), at(z, grid.z)};
        std::memset(shared, 0xff, shared_bytes);  // NaNs: nothing may be read before it is written
        run_block();
      }
    }
  }
}

void set_reverse_order(bool reverse) { reverse_order = reverse; }

void fail(const char* op, const Where& where, const char* what) {
  fail_block("thread " + text(threadIdx) + ": " + text(op, where) + " " + what);
}

int lane() { return static_cast<int>((current - threads.data()) % 32); }

void wait_block(const char* op, const Where& where) { wait(State::at_barrier, op, where); }

void wait_warp(const char* op, const Where& where, uint32_t mask, void* operand, void (*combine)(Operands)) {
  if ((mask >> lane() & 1) == 0) fail(op, where, "is given a mask without the thread's own lane");
  current->state = State::at_collective;
  current->op = op;
  current->where = where;
  current->mask = mask;
  current->operand = operand;
  const size_t first = static_cast<size_t>(current - threads.data()) / 32 * 32;
  const auto all = [&](const auto& good) {
    for (size_t i = 0; i < 32; ++i) {
      if ((mask >> i & 1) != 0 && !(first + i < threads.size() && good(threads[first + i]))) return false;
    }
    return true;
  };
  if (all([](const Thread& t) { return t.state == State::at_collective; }) &&
      all([&](const Thread& t) { return t.mask == mask && same_place(*current, t); })) {
    void* operands[32] = {};
    for (size_t i = 0; i < 32; ++i) {
      if ((mask >> i & 1) == 0) continue;
      operands[i] = threads[first + i].operand;
      threads[first + i].state = State::ready;
    }
    combine(operands);
  }
  back_to_scheduler(*current->fiber);
}

void begin_copy(void* to, const unsigned char (&bytes)[16]) {
  Copy& copy = current->copies.emplace_back();
  copy.to = to;
  copy.group = current->groups;
  std::memcpy(copy.bytes, bytes, sizeof bytes);
}

void commit_copies() { ++current->groups; }

void finish_copies(int pending) {
  std::erase_if(current->copies, [&](const Copy& copy) {
    const bool arrives = copy.group < current->groups - pending;
    if (arrives) std::memcpy(copy.to, copy.bytes, sizeof copy.bytes);
    return arrives;
  });
}

// ---- matrix instructions ---------------------------------------------------------------------------------------------------

template <int count, bool transposed>
void load_matrices(Operands lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < count; ++i) {
      const auto element = [&](int row, int column) -> uint32_t {
        return static_cast<const MatrixRow*>(lanes[8 * i + (transposed ? column : row)])->row[transposed ? row : column];
      };
      const int row = lane / 4, column = 2 * (lane % 4);
      static_cast<MatrixRow*>(lanes[lane])->r[i] = element(row, column) | element(row, column + 1) << 16;
    }
  }
}
template void load_matrices<2, false>(Operands);
template void load_matrices<4, false>(Operands);
template void load_matrices<2, true>(Operands);
template void load_matrices<4, true>(Operands);

// Products of two 16-bit floats are exact in fp32; they are added one after another.
template <typename T, int depth>
void multiply(Operands lanes) {
  float a[16][depth], b[depth][8], c[16][8];
  const auto half = [](uint32_t word, int i) { return widen(T{static_cast<uint16_t>(word >> 16 * i)}); };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const MmaOperands*>(lanes[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      for (int r = 0; r < depth / 4; ++r) a[group + 8 * (r % 2)][pair + i + 8 * (r / 2)] = half(own.a[r], i);
      for (int r = 0; r < depth / 8; ++r) b[pair + i + 8 * r][group] = half(own.b[r], i);
      for (int r = 0; r < 2; ++r) c[group + 8 * r][pair + i] = own.c[2 * r + i];
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const MmaOperands*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) own.c[i] = c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}
template void multiply<bfloat16, 16>(Operands);
template void multiply<float16, 16>(Operands);
template void multiply<bfloat16, 8>(Operands);
template void multiply<float16, 8>(Operands);

}  // namespace proxt2i::emulator
