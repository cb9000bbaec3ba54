// The kernels under emulation without torch, for sanitisers and mutated copies: `driver project gram ...` runs the
// named ops on small whole numbers, for which every result is exact whatever the order of the sums, and compares. Every
// buffer is an allocation of its own and exactly as large as it has to be.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/kernels/cuda/ops.h"
#include "cuda_fp16.h"

using namespace carerl;
using namespace carerl::cuda;

namespace {

uint32_t state = 1;
int draw(int limit) {  // in -limit .. limit
  state = state * 1664525u + 1013904223u;
  return static_cast<int>(state >> 8) % (2 * limit + 1) - limit;
}

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error("wrong result: " + what);
}

// Whole numbers of at most 8 in size in any storage type, at any offset of elements.
class Array {
 public:
  Array(DType dtype, int64_t count, int lead, int limit = 4) : dtype_(dtype), values(count) {
    const int64_t size = element_size(dtype);
    memory_.reset(new char[(count + lead) * size + 1]);  // never of no bytes, so that no two share an address
    data = memory_.get() + lead * size;
    for (int64_t i = 0; i < count; ++i) {
      values[i] = draw(limit);
      const uint32_t bits = encode(values[i]);
      std::memcpy(static_cast<char*>(data) + i * size, &bits, size);
    }
  }
  double read(int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, static_cast<const char*>(data) + i * element_size(dtype_), element_size(dtype_));
    if (dtype_ == DType::kF32) return emulator::from_word<float>(bits);
    if (dtype_ == DType::kBF16) return emulator::from_word<float>(bits << 16);
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  }
  void* data;

 private:
  uint32_t encode(int value) const {
    const float x = static_cast<float>(value);
    if (dtype_ == DType::kF32) return __float_as_uint(x);
    if (dtype_ == DType::kBF16) return __float_as_uint(x) >> 16;
    if (dtype_ == DType::kF16) return __half_as_ushort(__float2half_rn(x));
    if (dtype_ == DType::kI8) return static_cast<uint8_t>(static_cast<int8_t>(value));
    if (value == 0) return 0;
    const int exponent = std::ilogb(x);  // e4m3: bias 7, three bits of mantissa
    const int mantissa = static_cast<int>(std::ldexp(std::fabs(x), 3 - exponent)) - 8;
    return (value < 0 ? 0x80u : 0u) | static_cast<uint32_t>((exponent + 7) << 3 | mantissa);
  }
  DType dtype_;
  std::unique_ptr<char[]> memory_;

 public:
  std::vector<int> values;
};

struct Case {
  DType grad, basis;
  int n, batch, rows, lead;
  int64_t tensors;  // 0: a batch; else a list, per tensor
  // Elements from one gradient of a batch to the next: gradients are aligned where rows of the bases are.
  int64_t pitch() const { return n + (n % 8 ? 3 : 8); }
};

// The memory that a call asks for.
struct Workspace {
  std::vector<std::unique_ptr<char[]>> blocks;
  Device device() {
    return {nullptr,
            {[](void* self, int64_t bytes) -> void* {
               auto& blocks = static_cast<Workspace*>(self)->blocks;
               blocks.emplace_back(new char[bytes + 1]);
               std::memset(blocks.back().get(), 0xff, bytes);
               return blocks.back().get();
             },
             this}};
  }
};

struct Inputs {
  explicit Inputs(const Case& c)
      : count(c.tensors ? c.tensors : c.batch),
        stride(c.tensors ? (c.n + 127) / 128 * 128 * c.tensors : c.n),
        bases(c.basis, c.rows * stride, c.lead),
        scales(c.rows * ((stride + 127) / 128)) {
    for (float& scale : scales) scale = draw(1) ? 1.0f : 2.0f;
    call = {
        {bases.data, c.basis >= DType::kI8 ? scales.data() : nullptr, c.rows, stride, (stride + 127) / 128, 7, c.basis},
        {},
        c.tensors ? 1 : c.batch,
        c.tensors ? 0 : c.pitch(),
        c.grad,
        c.tensors != 0,
        workspace.device()};
    if (c.tensors) {
      for (int64_t t = 0; t < c.tensors; ++t) {
        const int64_t length = t == 1 ? 0 : c.n - t;  // one empty, all different
        grads.emplace_back(new Array(c.grad, length, c.lead));
        call.spans.push_back({grads.back()->data, t * (stride / c.tensors), length, 0});
      }
    } else {
      grads.emplace_back(new Array(c.grad, (c.batch - 1) * c.pitch() + c.n, c.lead));
      call.spans.push_back({grads[0]->data, 0, c.n, 0});
    }
  }
  // Element x of gradient b (or of tensor b), of what it was or of what it is; and where that is in a row of the bases.
  int64_t length(int64_t b) const { return call.spans[call.per_tensor ? b : 0].length; }
  int64_t column(int64_t b) const { return call.per_tensor ? call.spans[b].column : 0; }
  int64_t at(int64_t b, int64_t x) const { return call.per_tensor ? x : b * call.stride + x; }
  const Array& array(int64_t b) const { return *grads[call.per_tensor ? b : 0]; }
  double g(int64_t b, int64_t x) const { return array(b).values[at(b, x)]; }
  double edited(int64_t b, int64_t x) const { return array(b).read(at(b, x)); }
  double u(int64_t row, int64_t column) const {
    const float scale = call.basis.scales ? scales[row * call.basis.blocks + column / 128] : 1.0f;
    return bases.values[row * stride + column] * static_cast<double>(scale);
  }

  int64_t count, stride;  // gradients or tensors, N
  Array bases;
  std::vector<float> scales;
  std::vector<std::unique_ptr<Array>> grads;
  Workspace workspace;
  Call call;
};

std::vector<double> coefficients(const Inputs& in) {
  const int64_t k = in.call.basis.rows;
  std::vector<double> c(in.count * k, 0.0);
  for (int64_t b = 0; b < in.count; ++b) {
    for (int64_t r = 0; r < k; ++r) {
      for (int64_t x = 0; x < in.length(b); ++x) c[b * k + r] += in.g(b, x) * in.u(r, in.column(b) + x);
    }
  }
  return c;
}

void project(const Case& c) {
  Inputs in(c);
  std::vector<double> out(in.count * c.rows, NAN);
  carerl::cuda::project("project", in.call, out.data());
  require(out == coefficients(in), "project");
}

void gram(const Case& c) {
  Inputs in(c);
  const int64_t groups = in.call.groups(), size = c.rows + in.call.batch;
  std::vector<double> out(groups * size * size, NAN);
  carerl::cuda::gram("gram", in.call, out.data());
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < size; ++j) {
        double sum = 0;
        const auto value = [&](int64_t r, int64_t x) {
          return r < c.rows ? in.u(r, in.column(group) + x) : in.g(in.call.per_tensor ? group : r - c.rows, x);
        };
        for (int64_t x = 0; x < in.length(group); ++x) sum += value(i, x) * value(j, x);
        require(out[(group * size + i) * size + j] == sum, "gram");
      }
    }
  }
}

// Factors of -1, 0 and 1: sums stay exact in every storage type. The last gradient has a NaN and stays.
struct Factors {
  explicit Factors(const Inputs& in) : mix(in.count * in.call.basis.rows), scale(in.count, 0.5f) {
    for (float& x : mix) x = static_cast<float>(draw(1));
    if (in.count > 1) mix.back() = NAN;
  }
  std::vector<float> mix, scale;
};

void check_edit(const Inputs& in, const Factors& f) {
  const int64_t k = in.call.basis.rows;
  for (int64_t b = 0; b < in.count; ++b) {
    const bool stays = b + 1 == in.count && b > 0;
    for (int64_t x = 0; x < in.length(b); ++x) {
      double value = in.g(b, x);
      for (int64_t r = 0; r < k && !stays; ++r) value += f.mix[b * k + r] * in.u(r, in.column(b) + x);
      require(in.edited(b, x) == (stays ? value : 0.5 * value), "edit");
    }
  }
}

void edit(const Case& c) {
  Inputs in(c);
  const Factors f(in);
  carerl::cuda::edit("edit_", in.call, {f.mix.data(), f.scale.data()});
  check_edit(in, f);
}

void rotated(const Case& c, bool with_edit) {
  if (c.basis >= DType::kI8) return;
  Inputs in(c);
  const int64_t k = c.rows, depth = k + in.call.batch, kept = k > 1 ? k - 1 : 1, groups = in.call.groups();
  std::vector<float> q(groups * kept * depth);
  for (float& x : q) x = static_cast<float>(draw(1));
  const Factors f(in);
  if (!with_edit) {  // a q that is not finite leaves the rows alone
    std::vector<float> spoilt = q;
    for (int64_t group = 0; group < groups; ++group) spoilt[(group * kept + kept) * depth - 1] = NAN;
    carerl::cuda::rotate("rotate_", in.call, spoilt.data(), kept, 0);
    for (int64_t i = 0; i < k * in.stride; ++i) require(in.bases.read(i) == in.bases.values[i], "rotate by NaN");
  }
  if (with_edit)
    carerl::cuda::edit_rotate("edit_rotate_", in.call, in.call.basis, {f.mix.data(), f.scale.data()}, q.data(), kept,
                              7);
  else
    carerl::cuda::rotate("rotate_", in.call, q.data(), kept, 7);
  if (with_edit) check_edit(in, f);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t x = 0; x < in.length(group); ++x) {
      for (int64_t r = 0; r < k; ++r) {
        double sum = 0;
        for (int64_t m = 0; r < kept && m < depth; ++m) {
          const double value = m < k ? in.u(m, in.column(group) + x) : in.g(in.call.per_tensor ? group : m - k, x);
          sum += q[(group * kept + r) * depth + m] * value;
        }
        require(in.bases.read(r * in.stride + in.column(group) + x) == sum, "rotate");
      }
    }
  }
}
void rotate(const Case& c) { rotated(c, false); }
void edit_rotate(const Case& c) { rotated(c, true); }

void dacsp(const Case& c) {
  if (c.grad != DType::kF32) return;  // x grows with n
  Inputs in(c);
  const int64_t k = c.rows;
  std::vector<float> found(in.count * k, NAN), root(in.call.groups() * k * k, 0.0f);
  std::vector<int8_t> classes(in.count * k, 9);
  for (int64_t i = 0; i < in.call.groups() * k; ++i) root[i * k + (i + 1) % k] = 1.0f;  // a permutation of the rows
  carerl::cuda::dacsp("dacsp_", in.call,
                      Rule{{2.0, nullptr}, {0.0, nullptr}, {0.0, nullptr}, root.data(), false, c.tensors != 0},
                      found.data(), classes.data());
  const std::vector<double> expected = coefficients(in);
  for (int64_t b = 0; b < in.count; ++b) {
    const double* own = expected.data() + b * k;
    std::vector<double> mix(k);
    for (int64_t r = 0; r < k; ++r) {  // x = R diag(gain) R c with (R c)_r = c_{r + 1}
      const int64_t next = (r + 1) % k, after = (r + 2) % k;
      mix[r] = (own[next] > 0 ? 1.0 : own[next] < 0 ? -1.0 : 0.0) * own[after];
      require(found[b * k + r] == own[r] && classes[b * k + r] == (own[r] > 0) - (own[r] < 0), "dacsp coefficients");
    }
    for (int64_t x = 0; x < in.length(b); ++x) {
      double value = in.g(b, x);
      for (int64_t r = 0; r < k; ++r) value += mix[r] * in.u(r, in.column(b) + x);
      require(in.edited(b, x) == value, "dacsp edit");
    }
  }
}

void quantize(const Case& c) {
  if (c.tensors || c.basis >= DType::kI8) return;
  for (const int64_t block : {32, 128, 1024}) {
    Array rows(c.basis, static_cast<int64_t>(c.rows) * c.n, c.lead);
    const int64_t blocks = (c.n + block - 1) / block;
    std::unique_ptr<uint8_t[]> codes(new uint8_t[c.rows * c.n + c.lead + 1]);
    std::vector<float> scales(c.rows * blocks, NAN);
    Workspace workspace;
    carerl::cuda::quantize("quantize_bases", {rows.data, nullptr, c.rows, c.n, 0, 0, c.basis}, block, DType::kI8,
                           codes.get() + c.lead, scales.data(), workspace.device());
    for (int64_t row = 0; row < c.rows; ++row) {
      for (int64_t x = 0; x < c.n; ++x) {
        const float scale = scales[row * blocks + x / block];
        const double value = rows.values[row * c.n + x];
        const double found = static_cast<int8_t>(codes[c.lead + row * c.n + x]) * static_cast<double>(scale);
        require(scale >= std::fabs(value) / 127.001 && std::fabs(found - value) <= 0.501 * scale, "quantize");
      }
    }
  }
}

void logprobs(const Case& c) {
  if (c.tensors || c.basis >= DType::kI8) return;
  Array logits(c.basis, static_cast<int64_t>(c.rows) * c.n, c.lead);
  std::vector<int64_t> ids(c.rows, c.n - 1);
  std::vector<float> logp(c.rows, NAN), entropy(c.rows, NAN), along(c.rows, 1.0f), spread(c.rows, 2.0f);
  Array gradient(c.basis, static_cast<int64_t>(c.rows) * c.n, c.lead);
  Workspace workspace;
  const Logits rows{logits.data, c.rows, c.n, c.n, ids.data(), 1.0f, c.basis};
  token_logprobs("token_logprobs", rows, {logp.data(), entropy.data()}, workspace.device());
  token_logprobs_backward("token_logprobs_backward", rows, {logp.data(), entropy.data()},
                          {along.data(), spread.data(), gradient.data}, workspace.device());
  for (int64_t row = 0; row < c.rows; ++row) {
    const int* z = logits.values.data() + row * c.n;
    double sum = 0, mean = 0;
    for (int x = 0; x < c.n; ++x) sum += std::exp(z[x]), mean += std::exp(z[x]) * z[x];
    const double total = std::log(sum), h = total - mean / sum;
    require(std::fabs(logp[row] - (z[c.n - 1] - total)) < 1e-5 && std::fabs(entropy[row] - h) < 1e-5, "logprobs");
    for (int x = 0; x < c.n; ++x) {
      const double log_p = z[x] - total, p = std::exp(log_p);
      const double expected = (x == c.n - 1) - p - 2 * p * (log_p + h);
      require(std::fabs(gradient.read(row * c.n + x) - expected) <= 1e-5 + std::fabs(expected) / 256,
              "logprobs gradient");
    }
  }
}

// Matrices of 65 outputs, either side, confined to a box that x of -1, 0 and 1 lead back to; every fifth output stays,
// one with a NaN for an anchor too.
void inputs_of(const Case& c, bool left) {
  const int64_t outputs = 65, inputs = c.n % 70, k = c.tensors == 7 ? 150 : c.rows, count = c.tensors ? 5 : 1;
  const DType direction_dtype = c.basis == DType::kBF16 ? DType::kBF16 : DType::kF32;
  Array directions(direction_dtype, count * k * inputs, c.lead, 1);
  std::vector<std::unique_ptr<Array>> matrices;
  Workspace workspace;
  InputCall call{{}, {}, workspace.device()};
  for (int64_t i = 0; i < count; ++i) {
    matrices.emplace_back(new Array(c.grad, outputs * inputs, c.lead));
    call.list.push_back(matrices.back()->data);
  }
  call.all.directions = directions.data;
  call.all.outputs = outputs, call.all.inputs = inputs, call.all.count = k;
  call.all.left = left, call.all.dtype = c.grad, call.all.direction_dtype = direction_dtype;
  const auto at = [&](int64_t output, int64_t input) {
    return left ? input * outputs + output : output * inputs + input;
  };
  const auto v = [&](int64_t matrix, int64_t row, int64_t input) {
    return directions.values[(matrix * k + row) * inputs + input];
  };
  std::vector<float> found(count * outputs * k, NAN), anchor(found.size()), upper(found.size()), x(found.size());
  std::vector<double> energies(count, NAN), expected(count, 0.0);
  input_project("input_project", call, found.data());
  for (int64_t i = 0; i < static_cast<int64_t>(found.size()); ++i) {
    const int64_t matrix = i / k / outputs, output = i / k % outputs;
    double sum = 0;
    for (int64_t j = 0; j < inputs; ++j) sum += matrices[matrix]->values[at(output, j)] * v(matrix, i % k, j);
    require(found[i] == sum, "input_project");
    const bool spoilt = output == 7;
    const float wanted = output % 5 == 0 ? 0.0f : static_cast<float>(draw(1));
    upper[i] = static_cast<float>(2 + draw(2));
    anchor[i] = spoilt && i % k == k - 1 ? NAN : found[i] + (wanted > 0 ? upper[i] + 1 : wanted);
    x[i] = spoilt ? 0.0f : wanted;
    expected[matrix] += x[i] * x[i];
  }
  input_edit("input_confine_", call, {anchor.data(), nullptr, upper.data(), {}, {}, {}}, energies.data());
  require(energies == expected, "input_edit energies");
  for (int64_t matrix = 0; matrix < count; ++matrix) {
    for (int64_t output = 0; output < outputs; ++output) {
      for (int64_t j = 0; j < inputs; ++j) {
        double sum = matrices[matrix]->values[at(output, j)];
        for (int64_t row = 0; row < k; ++row) sum += x[(matrix * outputs + output) * k + row] * v(matrix, row, j);
        require(matrices[matrix]->read(at(output, j)) == sum, "input_edit");
      }
    }
  }
}
void inputs(const Case& c) {
  inputs_of(c, false);
  inputs_of(c, true);
}

// What a launch that the runtime refused is reported as.
void errors(const Case& c) {
  const std::map<cudaError_t, std::string> texts = {
      {cudaErrorNoKernelImageForDevice, "expected a GPU of the architectures sm_80 or later, found sm_75"},
      {cudaErrorUnsupportedPtxVersion, "rebuild with CARERL_CUDA_ARCHITECTURES=75"},
      {cudaErrorInsufficientDriver,
       "expected an NVIDIA driver for CUDA 13.0 or later, found one for CUDA 12.4; update"}};
  for (const auto& [error, text] : texts) {
    Inputs in(c);
    std::vector<double> out(in.count * c.rows);
    emulator::pending = error;
    std::string found = "nothing";
    try {
      carerl::cuda::project("project", in.call, out.data());
    } catch (const std::runtime_error& thrown) {
      found = thrown.what();
    }
    require(found.find("carerl::project: ") == 0 && found.find(text) != std::string::npos, found);
  }
}

}  // namespace

int main(int count, char** names) {
  const std::map<std::string, void (*)(const Case&)> ops = {{"project", project},
                                                            {"gram", gram},
                                                            {"edit", edit},
                                                            {"rotate", rotate},
                                                            {"dacsp", dacsp},
                                                            {"quantize_bases", quantize},
                                                            {"token_logprobs", logprobs},
                                                            {"edit_rotate", edit_rotate},
                                                            {"input", inputs},
                                                            {"errors", errors}};
  const bool small = std::getenv("DRIVER_SMALL") != nullptr;
  std::vector<Case> cases = {{DType::kF32, DType::kF32, 2600, 1, 9, 0, 0}, {DType::kF32, DType::kI8, 1040, 3, 5, 0, 0}};
  if (!small) {
    cases.insert(cases.end(), {{DType::kF32, DType::kF32, 1, 1, 1, 0, 0},
                               {DType::kBF16, DType::kBF16, 8192, 1, 40, 0, 0},
                               {DType::kF16, DType::kF16, 1504, 6, 9, 0, 0},
                               {DType::kBF16, DType::kF8, 1024, 17, 3, 0, 0},
                               {DType::kF32, DType::kBF16, 2603, 5, 5, 1, 0},
                               {DType::kBF16, DType::kF32, 515, 2, 4, 3, 0},
                               {DType::kF32, DType::kF32, 700, 1, 5, 0, 6},
                               {DType::kF16, DType::kBF16, 900, 1, 6, 1, 7}});
  }
  try {
    for (int i = 1; i < count; ++i) {
      for (const Case& c : cases) ops.at(names[i])(c);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::puts("all exact");
}
