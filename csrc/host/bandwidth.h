// Streaming bandwidth of the machine, all threads: the ceiling that benchmarks compare kernels with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace carerl::host {

// A buffer far beyond the last-level cache, and timed passes over it. Not for concurrent use.
class BandwidthProbe {
 public:
  // Touches every page from the thread that will read it. Throws std::bad_alloc.
  BandwidthProbe(size_t bytes, int threads);
  ~BandwidthProbe();

  // Seconds of one pass.
  double read();   // reads the whole buffer; counts its bytes once
  double copy();   // second half <- first half; counts its bytes once (half read, half written)
  double triad();  // third third <- first + 3 * second; counts its bytes once

  size_t bytes() const { return words_ * sizeof(uint64_t); }
  int threads() const { return threads_; }

 private:
  template <class Body>
  double timed(const Body& body);

  struct Free {
    void operator()(void* memory) const;
  };
  std::unique_ptr<uint64_t, Free> memory_;
  size_t words_;
  int threads_;
  volatile uint64_t sink_ = 0;
};

}  // namespace carerl::host
