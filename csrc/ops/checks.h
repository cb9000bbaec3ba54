// Argument checks of the native bindings: the same conditions and the same words as python/carerl_kernels/_ops.py,
// where they are explained. The dispatcher calls native kernels directly, so they cannot rely on the checks over there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace carerl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using List = std::vector<Tensor>;
using Offsets = std::vector<int64_t>;

// A call of the C shim. Torch's own macros for it change names and the symbols that they need from one release to the
// next: this one works with the headers of any and asks nothing of the torch it is loaded into.
inline void require_success(AOTITorchError code, const char* call) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error(std::string("torch refused ") + call);
}
#define CARERL_SHIM(call) ::carerl::require_success(call, #call)

constexpr int64_t kSegment = 128;  // granularity of list offsets

// "carerl::op: expected ..., found ...; remedy" as a RuntimeError.
[[noreturn]] void fail(const char* op, const std::string& expected, const std::string& found,
                       const char* remedy = nullptr);

// Shape of a checked basis stack. `stride` is N.
struct BasisShape {
  int64_t rows, stride;
  int64_t blocks = 0;
  int block_shift = 0;
};

BasisShape check_bases(const char* op, const Tensor& bases, const Optional& scales, bool matrix_allowed,
                       bool stack_allowed = true);
// Refuses quantised bases first.
BasisShape check_rotatable(const char* op, const Tensor& bases, bool stack);
// Returns B. `written`: rows of the batch must not overlap.
int64_t check_grads(const char* op, const Tensor& grads, const Tensor& bases, bool written);
void check_list(const char* op, const List& grads, const Offsets& offsets, const Tensor& bases);
void check_mix(const char* op, const Tensor& mix, const Tensor& scale, int64_t batch, int64_t rows,
               const Tensor& bases);
// `groups` < 0: one q without a leading dimension.
void check_q(const char* op, const Tensor& q, const Tensor& bases, int64_t batch, int64_t groups);
void check_domain(const char* op, int64_t domain, const Tensor& bases);
void check_out_dtype(const char* op, ScalarType dtype);
void check_weight(const char* op, const char* name, double value, bool negative_allowed);
void check_weight(const char* op, const char* name, const Tensor& value, int64_t rows, const Tensor& like,
                  const char* like_name = "bases");
void check_root(const Optional& root, int64_t rows, int64_t groups, const Tensor& bases);
void check_quantize(const Tensor& bases, int64_t block, ScalarType dtype);
// Weight matrices of one shape with left [G, m, q] and right [G, n, q].
void check_matrices(const char* op, const List& matrices, const Tensor& left, const Tensor& right);
void check_block_domains(int64_t domains, const Tensor& left);
void check_block_mix(const Tensor& mix, const Tensor& left);
// Weight matrices of one shape with directions [G, K, n] (left: [G, K, m]).
void check_input(const char* op, const List& matrices, const Tensor& directions, bool left);
// Float32 [G, outputs, K].
void check_bound(const char* op, const char* name, const Tensor& bound, const List& matrices, const Tensor& directions,
                 bool left);
void check_packed(const Tensor& packed, const Tensor& x);
void check_numbers(const List& tensors);
// Shapes, dtypes and, on the CPU, the range of the ids.
void check_logits(const char* op, const Tensor& logits, const Tensor& ids, double temperature);
void check_vector(const char* op, const char* name, const Tensor& tensor, const Tensor& logits);

}  // namespace carerl
