#include "checks.h"

#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>

namespace carerl {
namespace {

std::string joined(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::string out;
  for (size_t i = 0; i < values.size(); ++i) out += (i ? ", " : "") + std::to_string(values[i]);
  return out;
}

std::string tuple(torch::headeronly::IntHeaderOnlyArrayRef values) {
  return "(" + joined(values) + (values.size() == 1 ? ",)" : ")");
}

std::string list(torch::headeronly::IntHeaderOnlyArrayRef values) { return "[" + joined(values) + "]"; }

std::string short_of(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return "another type";
  }
}

bool is_grad(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

bool is_scaled(ScalarType dtype) { return dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn; }

bool is_core(ScalarType dtype) { return dtype == ScalarType::Float || dtype == ScalarType::Double; }

struct Device {
  int32_t type, index;
  explicit Device(const Tensor& tensor) {
    CARERL_SHIM(aoti_torch_get_device_type(tensor.get(), &type));
    CARERL_SHIM(aoti_torch_get_device_index(tensor.get(), &index));
  }
  bool operator!=(const Device& other) const { return type != other.type || index != other.index; }
  std::string name() const {
    if (type == aoti_torch_device_type_cpu()) return "cpu";
    if (type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(index);
    return type == aoti_torch_device_type_meta() ? "meta" : "another device";
  }
};

void check_device(const char* op, const std::string& name, const Tensor& tensor, const Tensor& like,
                  const char* like_name = "bases") {
  const Device found(tensor), expected(like);
  if (found != expected) fail(op, name + " on " + expected.name() + " like " + like_name, found.name());
}

void check_dense(const char* op, const char* name, const Tensor& rows) {
  const int64_t last = rows.dim() - 1;
  if (rows.size(last) > 1 && rows.stride(last) != 1) {
    fail(op, std::string(name) + " contiguous in its last dimension", "strides " + tuple(rows.strides()),
         "call .contiguous() first");
  }
}

// Float32, or `other` where that is allowed.
void check_small(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                 std::optional<ScalarType> other, const Tensor& like, const char* like_name = "bases") {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  size_t i = 0;
  for (int64_t size : shape) same = same && sizes[i++] == size;
  const ScalarType dtype = tensor.scalar_type();
  if (!same || !(dtype == ScalarType::Float || (other && dtype == *other))) {
    fail(op,
         std::string(name) + " " + list({shape.begin(), shape.size()}) + " of dtype float32" +
             (other ? std::string(" or ") + name_of(*other) : ""),
         std::string(name_of(dtype)) + " " + list(sizes));
  }
  if (!tensor.is_contiguous()) fail(op, std::string("contiguous ") + name, "strides " + tuple(tensor.strides()));
  check_device(op, name, tensor, like, like_name);
}

}  // namespace

void fail(const char* op, const std::string& expected, const std::string& found, const char* remedy) {
  throw std::runtime_error(std::string("carerl::") + op + ": expected " + expected + ", found " + found +
                           (remedy ? std::string("; ") + remedy : std::string()));
}

BasisShape check_bases(const char* op, const Tensor& bases, const Optional& scales, bool matrix_allowed,
                       bool stack_allowed) {
  const int64_t dim = bases.dim();
  if (!((matrix_allowed && dim == 2) || (stack_allowed && dim == 3))) {
    const char* dims = matrix_allowed ? (stack_allowed ? "2 or 3" : "2") : "3";
    fail(op, std::string("bases with ") + dims + " dimensions", tuple(bases.sizes()));
  }
  const ScalarType dtype = bases.scalar_type();
  if (!is_grad(dtype) && !is_scaled(dtype)) {
    fail(op, "bases of dtype float32, bfloat16, float16, int8, float8_e4m3fn", name_of(dtype));
  }
  check_dense(op, "bases", bases);
  if (!bases.is_contiguous()) {
    fail(op, "contiguous bases", "strides " + tuple(bases.strides()), "call .contiguous() first");
  }
  const auto sizes = bases.sizes();
  BasisShape shape;
  shape.rows = dim == 3 ? sizes[0] * sizes[1] : sizes[0];
  shape.stride = sizes[dim - 1];
  if (!is_scaled(dtype)) {
    if (scales) fail(op, std::string("no scales with torch.") + name_of(dtype) + " bases", "a tensor");
    return shape;
  }
  if (!scales) {
    fail(op, std::string("scales with ") + name_of(dtype) + " bases", "None", "pass both results of quantize_bases");
  }
  bool same = scales->dim() == dim;
  for (int64_t i = 0; same && i + 1 < dim; ++i) same = scales->size(i) == sizes[i];
  if (!same || scales->scalar_type() != ScalarType::Float || !scales->is_contiguous()) {
    fail(op, "contiguous float32 scales [" + joined({sizes.data(), sizes.size() - 1}) + ", ceil(N/block)]",
         std::string("torch.") + name_of(scales->scalar_type()) + " " + tuple(scales->sizes()));
  }
  check_device(op, "scales", *scales, bases);
  shape.blocks = scales->size(dim - 1);
  shape.block_shift = 5;
  auto needed = [&] { return (shape.stride + (int64_t{1} << shape.block_shift) - 1) >> shape.block_shift; };
  while (needed() > (shape.blocks > 1 ? shape.blocks : 1)) ++shape.block_shift;
  if (needed() != shape.blocks) {
    fail(op, "ceil(N/block) scales a row with block a power of two >= 32", std::to_string(shape.blocks));
  }
  return shape;
}

BasisShape check_rotatable(const char* op, const Tensor& bases, bool stack) {
  if (is_scaled(bases.scalar_type())) {
    fail(op, "bases of dtype float32, bfloat16, float16", name_of(bases.scalar_type()),
         "quantised bases are never rotated: stream into a float basis and call quantize_bases when the stage ends");
  }
  return check_bases(op, bases, std::nullopt, !stack, stack);
}

int64_t check_grads(const char* op, const Tensor& grads, const Tensor& bases, bool written) {
  const int64_t dim = grads.dim();
  if (dim != 1 && dim != 2) fail(op, "grads with 1 or 2 dimensions", tuple(grads.sizes()));
  if (!is_grad(grads.scalar_type())) {
    fail(op, "grads of dtype float32, bfloat16, float16", name_of(grads.scalar_type()));
  }
  check_dense(op, "grads", grads);
  const int64_t n = bases.size(bases.dim() - 1);
  if (grads.size(dim - 1) != n) {
    fail(op, "grads with N = " + std::to_string(n) + " like bases", tuple(grads.sizes()));
  }
  check_device(op, "grads", grads, bases);
  if (dim == 1) return 1;
  const int64_t batch = grads.size(0);
  if (written && batch > 1 && grads.stride(0) < n) {
    fail(op, "grads whose rows do not overlap", "strides " + tuple(grads.strides()), "call .contiguous() first");
  }
  return batch;
}

void check_list(const char* op, const List& grads, const Offsets& offsets, const Tensor& bases) {
  if (grads.empty()) fail(op, "at least one tensor in grads", "an empty list");
  if (grads.size() != offsets.size()) {
    fail(op, std::to_string(grads.size()) + " offsets, one per tensor", std::to_string(offsets.size()));
  }
  const ScalarType dtype = grads[0].scalar_type();
  const Device device(bases);
  int64_t end = 0;
  for (size_t t = 0; t < grads.size(); ++t) {
    auto index = [t] { return " at index " + std::to_string(t); };
    const ScalarType own = grads[t].scalar_type();
    if (!is_grad(own) || own != dtype) {
      fail(op, "grads of one dtype out of float32, bfloat16, float16", name_of(own) + index());
    }
    if (!grads[t].is_contiguous()) {
      fail(op, "contiguous grads", "strides " + tuple(grads[t].strides()) + index(), "call .contiguous() first");
    }
    if (Device(grads[t]) != device) check_device(op, "grads[" + std::to_string(t) + "]", grads[t], bases);
    if (offsets[t] % kSegment != 0 || offsets[t] < end) {
      fail(op, "ascending offsets that are multiples of " + std::to_string(kSegment) + " without overlap",
           std::to_string(offsets[t]) + index() + " where the segment before it ends at " + std::to_string(end));
    }
    end = offsets[t] + grads[t].numel();
  }
  const int64_t n = bases.size(bases.dim() - 1);
  if (end > n) fail(op, "segments within N = " + std::to_string(n), "one that ends at " + std::to_string(end));
}

void check_mix(const char* op, const Tensor& mix, const Tensor& scale, int64_t batch, int64_t rows,
               const Tensor& bases) {
  check_small(op, "mix", mix, {batch, rows}, {}, bases);
  check_small(op, "scale", scale, {batch}, {}, bases);
}

void check_q(const char* op, const Tensor& q, const Tensor& bases, int64_t batch, int64_t groups) {
  const int64_t k = bases.size(bases.dim() - 2), dim = q.dim(), lead = groups < 0 ? 0 : 1;
  const bool same =
      dim == lead + 2 && (lead == 0 || q.size(0) == groups) && q.size(dim - 1) == k + batch && q.size(dim - 2) <= k;
  if (!same || q.scalar_type() != ScalarType::Float) {
    fail(op,
         "float32 q [" + (lead ? std::to_string(groups) + ", " : std::string()) + "<= " + std::to_string(k) + ", " +
             std::to_string(k + batch) + "]",
         std::string("torch.") + name_of(q.scalar_type()) + " " + list(q.sizes()));
  }
  if (!q.is_contiguous()) fail(op, "contiguous q", "strides " + tuple(q.strides()));
  check_device(op, "q", q, bases);
}

void check_domain(const char* op, int64_t domain, const Tensor& bases) {
  const int64_t domains = bases.size(0);
  if (domain < 0 || domain >= domains) {
    fail(op, "domain in 0.." + std::to_string(domains - 1), std::to_string(domain));
  }
}

void check_out_dtype(const char* op, ScalarType dtype) {
  if (!is_core(dtype)) fail(op, "out_dtype float32 or float64", std::string("torch.") + name_of(dtype));
}

void check_weight(const char* op, const char* name, double value, bool negative_allowed) {
  if (!std::isfinite(value)) fail(op, std::string("finite ") + name, short_of(value));
  if (value < 0 && !negative_allowed) fail(op, std::string(name) + " of at least 0", short_of(value));
}

void check_weight(const char* op, const char* name, const Tensor& value, int64_t rows, const Tensor& like,
                  const char* like_name) {
  check_small(op, name, value, {rows}, {}, like, like_name);
}

void check_root(const Optional& root, int64_t rows, int64_t groups, const Tensor& bases) {
  if (!root) return;
  if (groups < 0) {
    check_small("dacsp_", "root", *root, {rows, rows}, ScalarType::Double, bases);
  } else {
    check_small("dacsp_", "root", *root, {groups, rows, rows}, ScalarType::Double, bases);
  }
}

void check_quantize(const Tensor& bases, int64_t block, ScalarType dtype) {
  const char* op = "quantize_bases";
  if (bases.dim() != 3) fail(op, "bases with 3 dimensions", tuple(bases.sizes()));
  if (!is_grad(bases.scalar_type())) {
    fail(op, "bases of dtype float32, bfloat16, float16", name_of(bases.scalar_type()));
  }
  check_dense(op, "bases", bases);
  if (!bases.is_contiguous()) fail(op, "contiguous bases", "strides " + tuple(bases.strides()));
  if (block < 32 || (block & (block - 1)) != 0) {
    fail(op, "block a power of two of at least 32", std::to_string(block));
  }
  if (!is_scaled(dtype)) fail(op, "dtype int8 or float8_e4m3fn", name_of(dtype));
}

namespace {

// A list of dense matrices of one shape and dtype, on the device of `like`.
void check_alike(const char* op, const List& matrices, const Tensor& like, const char* like_name) {
  if (matrices.empty()) fail(op, "at least one tensor in matrices", "an empty list");
  if (matrices[0].dim() != 2) fail(op, "matrices with 2 dimensions", tuple(matrices[0].sizes()));
  const int64_t count = static_cast<int64_t>(matrices.size()), m = matrices[0].size(0), n = matrices[0].size(1);
  for (size_t t = 0; t < matrices.size(); ++t) {
    auto index = [t] { return " at index " + std::to_string(t); };
    const Tensor& matrix = matrices[t];
    const ScalarType dtype = matrix.scalar_type();
    if (!is_grad(dtype) || dtype != matrices[0].scalar_type()) {
      fail(op, "matrices of one dtype out of float32, bfloat16, float16", name_of(dtype) + index());
    }
    if (matrix.dim() != 2 || matrix.size(0) != m || matrix.size(1) != n) {
      fail(op, "matrices [" + std::to_string(m) + ", " + std::to_string(n) + "] like the first",
           list(matrix.sizes()) + index());
    }
    if (!matrix.is_contiguous()) {
      fail(op, "contiguous matrices", "strides " + tuple(matrix.strides()) + index(), "call .contiguous() first");
    }
    check_device(op, "matrices[" + std::to_string(t) + "]", matrix, like, like_name);
  }
}

}  // namespace

void check_matrices(const char* op, const List& matrices, const Tensor& left, const Tensor& right) {
  check_alike(op, matrices, left, "left");
  const int64_t count = static_cast<int64_t>(matrices.size()), m = matrices[0].size(0), n = matrices[0].size(1);
  const int64_t q = left.dim() == 3 ? left.size(2) : 0;
  check_small(op, "left", left, {count, m, q}, {}, left, "left");
  check_small(op, "right", right, {count, n, q}, {}, left, "left");
}

void check_block_domains(int64_t domains, const Tensor& left) {
  const int64_t q = left.size(2);
  if (domains < 1 || q % domains != 0) {
    fail("block_project", "domains that divide the " + std::to_string(q) + " columns of left", std::to_string(domains));
  }
}

void check_block_mix(const Tensor& mix, const Tensor& left) {
  const int64_t domains = mix.dim() == 4 ? mix.size(1) : 1, q = left.size(2), r = domains > 0 ? q / domains : 0;
  if (domains < 1 || q % domains != 0) {
    fail("block_edit_", "mix [G, D, r, r] with D r = " + std::to_string(q) + " like left", list(mix.sizes()));
  }
  check_small("block_edit_", "mix", mix, {left.size(0), domains, r, r}, {}, left, "left");
}

void check_input(const char* op, const List& matrices, const Tensor& directions, bool left) {
  check_alike(op, matrices, directions, "directions");
  const int64_t rows = directions.dim() == 3 ? directions.size(1) : 0, count = static_cast<int64_t>(matrices.size());
  const int64_t inputs = matrices[0].size(left ? 0 : 1);
  check_small(op, "directions", directions, {count, rows, inputs}, ScalarType::BFloat16, directions, "directions");
}

void check_bound(const char* op, const char* name, const Tensor& bound, const List& matrices, const Tensor& directions,
                 bool left) {
  check_small(op, name, bound, {directions.size(0), matrices[0].size(left ? 1 : 0), directions.size(1)}, {}, directions,
              "directions");
}

void check_packed(const Tensor& packed, const Tensor& x) {
  const char* op = "packed_times";
  const int64_t dim = x.dim(), matrices = dim == 3 ? x.size(1) : 0, size = dim == 3 ? x.size(2) : 0;
  if (dim != 3 || x.scalar_type() != ScalarType::Double || !x.is_contiguous()) {
    fail(op, "contiguous float64 x [B, G, A]", std::string(name_of(x.scalar_type())) + " " + list(x.sizes()));
  }
  check_small(op, "packed", packed, {matrices, size * (size + 1) / 2}, {}, x, "x");
}

void check_numbers(const List& tensors) {
  if (tensors.empty()) fail("all_finite", "at least one tensor", "an empty list");
  for (size_t t = 0; t < tensors.size(); ++t) {
    const ScalarType dtype = tensors[t].scalar_type();
    if (!is_grad(dtype) && dtype != ScalarType::Double) {
      fail("all_finite", "tensors of dtype float32, bfloat16, float16, float64",
           name_of(dtype) + (" at index " + std::to_string(t)));
    }
    if (!tensors[t].is_contiguous()) {
      fail("all_finite", "contiguous tensors",
           "strides " + tuple(tensors[t].strides()) + " at index " + std::to_string(t), "call .contiguous() first");
    }
    check_device("all_finite", "tensors[" + std::to_string(t) + "]", tensors[t], tensors[0], "the first");
  }
}

void check_logits(const char* op, const Tensor& logits, const Tensor& ids, double temperature) {
  if (logits.dim() != 2) fail(op, "logits with 2 dimensions", tuple(logits.sizes()));
  if (!is_grad(logits.scalar_type())) {
    fail(op, "logits of dtype float32, bfloat16, float16", name_of(logits.scalar_type()));
  }
  check_dense(op, "logits", logits);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  if (ids.scalar_type() != ScalarType::Long || ids.dim() != 1 || ids.size(0) != rows) {
    fail(op, "ids [" + std::to_string(rows) + "] of dtype int64",
         std::string(name_of(ids.scalar_type())) + " " + list(ids.sizes()));
  }
  if (!ids.is_contiguous()) fail(op, "contiguous ids", "strides " + tuple(ids.strides()));
  check_device(op, "ids", ids, logits, "logits");
  if (!(temperature > 0) || !std::isfinite(temperature)) fail(op, "a positive temperature", short_of(temperature));
  if (!ids.is_cpu()) return;  // looking would need a synchronisation: the kernels answer with NaN
  const int64_t* tokens = static_cast<const int64_t*>(ids.data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    if (tokens[row] < 0 || tokens[row] >= vocabulary) {
      fail(op, "ids in 0.." + std::to_string(vocabulary - 1),
           std::to_string(tokens[row]) + " at row " + std::to_string(row),
           "give padding any valid id and mask it later");
    }
  }
}

void check_vector(const char* op, const char* name, const Tensor& tensor, const Tensor& logits) {
  check_small(op, name, tensor, {logits.size(0)}, {}, logits, "logits");
}

}  // namespace carerl
