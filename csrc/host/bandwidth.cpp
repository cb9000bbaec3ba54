#include "bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <new>
#include <thread>
#include <vector>

#include "../kernels/cpu/isa.h"

namespace carerl::host {
namespace {

// The pattern of the kernels, since the ceiling depends on it: rows far apart, some of them read side by side for 8
// KiB, then the next ones. One sequential stream is up to 30 % slower, and which number of streams is best depends on
// the machine.
constexpr size_t kRows = 24;
constexpr size_t kStretch = 8192;  // words
constexpr size_t kAhead = 512;     // bytes that every stream asks for ahead of what it reads

// XOR of all words, to make sure that they are read.
template <class Vector, size_t kStreams>
inline __attribute__((always_inline)) uint64_t read_with(const uint64_t* words, size_t count) {
  constexpr size_t kLoads = 64 / sizeof(Vector);  // of a cache line
  const size_t row = count / kRows / kStretch * kStretch;
  Vector sums[kStreams] = {};
  for (size_t begin = 0; begin < row; begin += kStretch) {
    for (size_t first = 0; first < kRows; first += kStreams) {
      for (size_t i = begin; i < begin + kStretch; i += 8) {
#pragma GCC unroll 8
        for (size_t stream = 0; stream < kStreams; ++stream) {
          const Vector* line = reinterpret_cast<const Vector*>(words + (first + stream) * row + i);
          __builtin_prefetch(reinterpret_cast<const char*>(line) + kAhead);
#pragma GCC unroll 4
          for (size_t load = 0; load < kLoads; ++load) sums[stream] ^= line[load];
        }
      }
    }
  }
  Vector total = {};
  for (const Vector& sum : sums) total ^= sum;
  uint64_t rest = 0;
  for (size_t lane = 0; lane < sizeof(Vector) / 8; ++lane) rest ^= total[lane];
  for (size_t i = row * kRows; i < count; ++i) rest ^= words[i];
  return rest;
}

typedef uint64_t Narrow __attribute__((vector_size(16), may_alias));
typedef uint64_t Wide __attribute__((vector_size(32), may_alias));

uint64_t read_narrow4(const uint64_t* words, size_t count) { return read_with<Narrow, 4>(words, count); }
uint64_t read_narrow8(const uint64_t* words, size_t count) { return read_with<Narrow, 8>(words, count); }

#if defined(__x86_64__)
// Where clocks are low, 16-byte loads are too many to keep the memory busy.
__attribute__((target("avx2"))) uint64_t read_wide4(const uint64_t* words, size_t count) {
  return read_with<Wide, 4>(words, count);
}
__attribute__((target("avx2"))) uint64_t read_wide8(const uint64_t* words, size_t count) {
  return read_with<Wide, 8>(words, count);
}
#endif

std::vector<BandwidthProbe::Reader> readers() {
#if defined(__x86_64__)
  if (cpu::supported_isas().size() > 1) return {&read_wide4, &read_wide8};
#endif
  return {&read_narrow4, &read_narrow8};
}

}  // namespace

void BandwidthProbe::Free::operator()(void* memory) const { std::free(memory); }

// Runs body(thread) on all threads at once; seconds from the moment all are ready until the last is done.
template <class Body>
double BandwidthProbe::timed(const Body& body) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> waiting{threads_};
  std::vector<Clock::time_point> ends(threads_);
  Clock::time_point start;
  auto work = [&](int thread) {
    if (waiting.fetch_sub(1) == 1) {
      start = Clock::now();
      waiting.store(-1, std::memory_order_release);
    } else {
      while (waiting.load(std::memory_order_acquire) != -1) std::this_thread::yield();
    }
    body(thread);
    ends[thread] = Clock::now();
  };
  std::vector<std::thread> helpers;
  for (int thread = 1; thread < threads_; ++thread) helpers.emplace_back(work, thread);
  work(0);
  for (std::thread& helper : helpers) helper.join();
  return std::chrono::duration<double>(*std::max_element(ends.begin(), ends.end()) - start).count();
}

BandwidthProbe::BandwidthProbe(size_t bytes, int threads) : words_(bytes / 64 * 8), threads_(threads) {
  memory_.reset(static_cast<uint64_t*>(std::aligned_alloc(64, std::max<size_t>(words_ * 8, 64))));
  if (!memory_) throw std::bad_alloc();
  timed([&](int thread) {
    const size_t begin = words_ * thread / threads_, end = words_ * (thread + 1) / threads_;
    std::fill(memory_.get() + begin, memory_.get() + end, 0x3ff0000000000000u);  // 1.0
  });
  double least = std::numeric_limits<double>::infinity();
  for (int round = 0; round < 3; ++round) {
    for (const Reader reader : readers()) {
      const double seconds = read_with(reader);
      if (seconds < least) least = seconds, reader_ = reader;
    }
  }
}

BandwidthProbe::~BandwidthProbe() = default;

double BandwidthProbe::read() { return read_with(reader_); }

double BandwidthProbe::read_with(Reader reader) {
  std::atomic<uint64_t> all{0};
  const double seconds = timed([&](int thread) {
    const size_t begin = words_ / 8 * thread / threads_ * 8, end = words_ / 8 * (thread + 1) / threads_ * 8;
    all ^= reader(memory_.get() + begin, end - begin);
  });
  sink_ = all;
  return seconds;
}

}  // namespace carerl::host
