#include "isa.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace carerl::cpu {
namespace {

#if defined(__x86_64__)
struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Leaf cpuid(unsigned leaf, unsigned subleaf = 0) {
  Leaf out;
  __get_cpuid_count(leaf, subleaf, &out.a, &out.b, &out.c, &out.d);
  return out;
}

// Register state that the operating system saves at a context switch: without it the instructions exist but fault.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool all(uint64_t word, std::initializer_list<int> bits) {
  for (int bit : bits) {
    if (!(word >> bit & 1)) return false;
  }
  return true;
}

// Linux saves the contents of tiles for those processes that have asked for it. False where it does not, or where a
// thread's stack for signals is too small for them.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::string joined(const std::vector<std::string>& names) {
  std::string out;
  for (const std::string& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> out = {"generic"};
#if defined(__x86_64__)
  const Leaf one = cpuid(1), seven = cpuid(7);
  if (!all(one.c, {27})) return out;  // OSXSAVE
  const uint64_t state = saved_state();
  const bool avx2 = all(state, {1, 2}) && all(one.c, {12, 28, 29}) && all(seven.b, {5});  // FMA, AVX, F16C; AVX2
  if (avx2) out.push_back("avx2");
  const bool avx512 = avx2 && all(state, {5, 6, 7}) && all(seven.b, {16, 17, 30, 31});  // F, DQ, BW, VL
  if (avx512) out.push_back("avx512");
  const bool avx512_bf16 = avx512 && seven.a >= 1 && all(cpuid(7, 1).a, {5});
  if (avx512_bf16) out.push_back("avx512_bf16");
  const bool amx = avx512_bf16 && all(state, {17, 18}) && all(seven.d, {22, 24});  // AMX-BF16, AMX-TILE
  if (amx && tiles_granted()) out.push_back("amx_bf16");
#endif
  return out;
}

std::string select_isa() {
  const std::vector<std::string> supported = supported_isas();
  const char* wanted = std::getenv("CARERL_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return supported.back();
  for (const std::string& name : supported) {
    if (name == wanted) return name;
  }
  throw std::runtime_error("CARERL_CPU_ISA: expected one of " + joined(supported) + " on this CPU, found " + wanted +
                           "; unset it to use " + supported.back());
}

}  // namespace carerl::cpu
