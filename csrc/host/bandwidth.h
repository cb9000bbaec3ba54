// Streaming bandwidth of the machine, all threads: the ceiling that benchmarks compare kernels with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace carerl::host {

// A buffer far beyond the last-level cache, and timed passes that read it. Not for concurrent use.
class BandwidthProbe {
 public:
  using Reader = uint64_t (*)(const uint64_t* words, size_t count);

  // Touches every page from the thread that will read it, and takes the way of reading that is fastest here. Throws
  // std::bad_alloc.
  BandwidthProbe(size_t bytes, int threads);
  ~BandwidthProbe();

  // Seconds of one pass over the whole buffer.
  double read();

  size_t bytes() const { return words_ * sizeof(uint64_t); }
  int threads() const { return threads_; }

 private:
  template <class Body>
  double timed(const Body& body);
  double read_with(Reader reader);

  struct Free {
    void operator()(void* memory) const;
  };
  std::unique_ptr<uint64_t, Free> memory_;
  size_t words_;
  int threads_;
  Reader reader_ = nullptr;
  volatile uint64_t sink_ = 0;
};

}  // namespace carerl::host
