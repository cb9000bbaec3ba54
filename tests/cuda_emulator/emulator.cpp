// Runs kernels on the host: blocks one after another, the threads of a block as fibers that switch only where CUDA
// synchronises, in an order that CARERL_EMULATOR_SEED shuffles (with it, warps also lag behind each other). With
// EMULATOR_THREADS they are threads of the system instead, so that ThreadSanitizer sees every access to shared memory
// that no barrier orders.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#ifdef EMULATOR_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <setjmp.h>
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#else
#define EMULATOR_ASAN 0
#endif

namespace emulator {

thread_local Position position;
cudaError_t pending = cudaSuccess;

namespace {

constexpr size_t kCanary = 64;
constexpr size_t kStack = 256 << 10;
constexpr int kMostThreads = 1024;

struct Warp {
  unsigned mask = 0, arrived = 0;
  int line = 0;
  uint64_t turn = 0;
  Words values[2][32];  // a lane may be one turn ahead of those that have not read yet, never two
};

struct Block {
  unsigned threads = 0, arrived = 0;
  int line = 0;
  uint64_t turn = 0;
  std::vector<Warp> warps;
  unsigned char* memory = nullptr;
  std::string error;
};

Block block;

unsigned linear() { return position.thread.y * position.block_dim.x + position.thread.x; }

// Where a thread waits: on the block (warp null) or on its warp, until the turn is over.
struct Wait {
  const Warp* warp = nullptr;
  uint64_t turn = 0;
  bool waits = false;
  bool over() const { return !waits || (warp ? warp->turn : block.turn) != turn; }
};

}  // namespace

int lane() { return linear() % 32; }
unsigned char* shared() { return block.memory; }

#ifndef EMULATOR_THREADS
// ------------------------------------------------------------------------------------------------------------ fibers
namespace {

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  std::unique_ptr<char[]> stack;
  bool started = false, done = true;
  Wait wait;
  Index thread;
};

std::vector<Fiber> fibers;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
jmp_buf scheduler_jump;
[[maybe_unused]] const void* scheduler_stack;
[[maybe_unused]] size_t scheduler_size;

// Jumps and not swapcontext, which makes a system call, and under AddressSanitizer clears the shadow of a whole stack.
// The sanitiser is told which stack a jump leads to; the first jump out of a fiber tells where that of the scheduler
// is. There are no fake stacks to keep: the tests run without detection of use after return.
void to_scheduler() {
  if (_setjmp(current->jump) == 0) {
#if EMULATOR_ASAN
    __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_size);
#endif
    _longjmp(scheduler_jump, 1);
  }
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void fiber_main() {
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  for (;;) {
    (*body)();
    current->done = true;
    to_scheduler();
  }
}

void to_fiber(Fiber& fiber) {
  current = &fiber;
  position.thread = fiber.thread;
  if (_setjmp(scheduler_jump) != 0) {
#if EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    return;
  }
#if EMULATOR_ASAN
  __sanitizer_start_switch_fiber(nullptr, fiber.stack.get(), kStack);
#endif
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  setcontext(&fiber.context);
}

[[noreturn]] void fail(const std::string& text) {
  if (block.error.empty()) block.error = text;
  current->started = false;  // never to be resumed: the next launch gives this stack a new beginning
  for (;;) to_scheduler();
}

void wait_for(const Warp* warp, uint64_t turn) {
  current->wait = {warp, turn, true};
  to_scheduler();
  current->wait.waits = false;
}

void run_threads() {
  static const char* seed = std::getenv("CARERL_EMULATOR_SEED");
  static std::mt19937 random(seed ? std::atoi(seed) : 0);
  if (fibers.size() < block.threads) fibers.resize(block.threads);
  std::vector<unsigned> order(block.threads);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned i = 0; i < block.threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    if (!fiber.done) fiber.started = false;  // abandoned by a launch that failed
    fiber.done = false;
    fiber.wait = {};
    fiber.thread = {i % position.block_dim.x, i / position.block_dim.x, 0};
  }
  unsigned live = block.threads;
  while (live > 0 && block.error.empty()) {
    bool progress = false;
    uint64_t late = 0;  // warps that this round passes over
    if (seed) {
      std::shuffle(order.begin(), order.end(), random);
      late = random() & ~(uint64_t{1} << random() % block.warps.size());
    }
    for (unsigned i : order) {
      Fiber& fiber = fibers[i];
      if (fiber.done || !fiber.wait.over()) continue;
      if (late >> (i / 32) & 1) {
        progress = true;
        continue;
      }
      progress = true;
      to_fiber(fiber);
      if (!block.error.empty()) break;
      live -= fiber.done;
    }
    if (progress) continue;
    unsigned at_barrier = 0, in_warp = 0;
    for (unsigned i = 0; i < block.threads; ++i) {
      if (fibers[i].done) continue;
      ++(fibers[i].wait.warp ? in_warp : at_barrier);
    }
    block.error = "divergent synchronisation: " + std::to_string(at_barrier) + " threads wait at a barrier, " +
                  std::to_string(in_warp) + " in a warp, " + std::to_string(block.threads - live) + " have ended";
  }
}

}  // namespace

#else
// ----------------------------------------------------------------------------------------------------------- threads
namespace {

std::mutex mutex;
std::condition_variable turned;
const std::function<void()>* body = nullptr;

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "%s\n", text.c_str());
  std::abort();
}

void wait_for(std::unique_lock<std::mutex>& lock, const Warp* warp, uint64_t turn) {
  const Wait wait{warp, turn, true};
  turned.wait(lock, [&] { return wait.over(); });
}

void run_threads() {
  const Position start = position;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < block.threads; ++i) {
    threads.emplace_back([=] {
      position = start;
      position.thread = {i % start.block_dim.x, i / start.block_dim.x, 0};
      (*body)();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
#endif

void barrier(int line) {
#ifdef EMULATOR_THREADS
  std::unique_lock<std::mutex> lock(mutex);
#endif
  if (block.arrived == 0) block.line = line;
  if (block.line != line) {
    fail("divergent barrier: threads of a block wait at lines " + std::to_string(block.line) + " and " +
         std::to_string(line));
  }
  const uint64_t turn = block.turn;
  if (++block.arrived == block.threads) {
    block.arrived = 0;
    ++block.turn;
#ifdef EMULATOR_THREADS
    turned.notify_all();
    return;
  }
  wait_for(lock, nullptr, turn);
#else
    return;
  }
  wait_for(nullptr, turn);
#endif
}

const Words* exchange(unsigned mask, int line, const Words& own_words) {
#ifdef EMULATOR_THREADS
  std::unique_lock<std::mutex> lock(mutex);
#endif
  Warp& warp = block.warps[linear() / 32];
  const unsigned own = 1u << lane();
  if ((mask & own) == 0) fail("line " + std::to_string(line) + ": a lane is not in the mask that it gives");
  const unsigned first = linear() / 32 * 32,
                 exists = block.threads - first >= 32 ? ~0u : (1u << (block.threads - first)) - 1;
  if ((mask & ~exists) != 0) fail("line " + std::to_string(line) + ": the mask names lanes that do not exist");
  if (warp.arrived == 0) warp.mask = mask, warp.line = line;
  if (warp.mask != mask || warp.line != line) {
    fail("lanes of a warp disagree: masks " + std::to_string(warp.mask) + " and " + std::to_string(mask) + ", lines " +
         std::to_string(warp.line) + " and " + std::to_string(line));
  }
  const uint64_t turn = warp.turn;
  warp.values[turn & 1][lane()] = own_words;
  warp.arrived |= own;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.turn;
#ifdef EMULATOR_THREADS
    turned.notify_all();
  } else {
    wait_for(lock, &warp, turn);
  }
#else
  } else {
    wait_for(&warp, turn);
  }
#endif
  return warp.values[turn & 1];
}

unsigned ballot(unsigned mask, bool vote, int line) {
  const Words* votes = exchange(mask, line, to_words(uint64_t{vote}));
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) out |= static_cast<unsigned>(votes[i].word[0]) << i;
  }
  return out;
}

void launch(dim3 grid, dim3 dimensions, size_t shared_bytes, const std::function<void()>& kernel) {
  const unsigned threads = dimensions.x * dimensions.y * dimensions.z;
  if (grid.x == 0 || grid.y == 0 || grid.z != 1 || threads == 0 || threads > kMostThreads || dimensions.z != 1) {
    throw std::runtime_error("emulator: invalid launch configuration");
  }
  if (shared_bytes > (227u << 10)) throw std::runtime_error("emulator: more shared memory than any GPU has");
  body = &kernel;
  const size_t canary = EMULATOR_ASAN ? 0 : kCanary;  // a redzone does it there
  std::unique_ptr<unsigned char, decltype(&std::free)> memory(
      static_cast<unsigned char*>(std::malloc(shared_bytes + canary + (shared_bytes + canary == 0))), &std::free);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      std::memset(memory.get(), 0xff, shared_bytes);  // NaN, in fp32 and fp64
      std::memset(memory.get() + shared_bytes, 0xa5, canary);
      block = Block{};
      block.threads = threads;
      block.warps.resize((threads + 31) / 32);
      block.memory = memory.get();
      position = {{}, {x, y, 0}, {dimensions.x, dimensions.y, 1}, {grid.x, grid.y, 1}};
      run_threads();
      for (size_t i = 0; i < canary; ++i) {
        if (memory.get()[shared_bytes + i] != 0xa5 && block.error.empty()) block.error = "write behind shared memory";
      }
      if (!block.error.empty()) throw std::runtime_error("emulator: " + block.error);
    }
  }
}

}  // namespace emulator

#ifdef EMULATOR_CHECKS_ALIGNMENT
// What -fsanitize=alignment calls, instead of the sanitiser's library: an error of the launch, not of the process.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, uintptr_t address) {
  emulator::fail("misaligned access at an address " + std::to_string(address % 16) + " beyond a multiple of 16");
}
#endif

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::pending;
  emulator::pending = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "as the test asked for"; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
// CARERL_EMULATED_FP64: what part of the rate of fp32 that of fp64 is, for kernels that are chosen by it.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* ratio = std::getenv("CARERL_EMULATED_FP64");
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? 7
           : attribute == cudaDevAttrComputeCapabilityMinor ? 5
           : ratio                                          ? std::atoi(ratio)
                                                            : 2;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = 12040, cudaSuccess; }
