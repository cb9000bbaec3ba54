// carerl_kernels._host: what the build and the machine are. No tensors pass through it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>

#include "../kernels/cpu/isa.h"
#include "bandwidth.h"

namespace py = pybind11;
using carerl::host::BandwidthProbe;

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"version", CARERL_VERSION}, {"compiler", CARERL_COMPILER},      {"build_type", CARERL_BUILD_TYPE},
      {"flags", CARERL_FLAGS},     {"torch", CARERL_BUILT_WITH_TORCH}, {"architecture", CARERL_ARCHITECTURE},
  };
}

std::unique_ptr<BandwidthProbe> make_probe(size_t bytes, int threads) {
  if (threads < 0)
    throw std::invalid_argument("BandwidthProbe: expected threads >= 0, found " + std::to_string(threads));
  const int all = static_cast<int>(std::thread::hardware_concurrency());
  return std::make_unique<BandwidthProbe>(bytes, threads > 0 ? threads : all > 0 ? all : 1);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information, CPU features and a memory-bandwidth probe.";
  m.def("build_info", build_info,
        "Version, compiler, flags and the torch that the native libraries were compiled against.");
  m.def("supported_isas", carerl::cpu::supported_isas, "Instruction sets the CPU kernels can use here, lowest first.");
  m.def("select_isa", carerl::cpu::select_isa,
        "The one in use: the last of supported_isas(), or CARERL_CPU_ISA. RuntimeError where that is not supported.");
  py::class_<BandwidthProbe>(
      m, "BandwidthProbe",
      "Times passes that read a buffer with all threads at once, in the fastest of some patterns.\n\n"
      "Args:\n    bytes: size of the buffer; take far more than the last-level cache.\n"
      "    threads: 0 for all CPUs.\n\n"
      "read returns bytes per second of one pass.")
      .def(py::init(&make_probe), py::arg("bytes") = size_t{512} << 20, py::arg("threads") = 0)
      .def_property_readonly("bytes", &BandwidthProbe::bytes)
      .def_property_readonly("threads", &BandwidthProbe::threads)
      .def("read", [](BandwidthProbe& p) { return p.bytes() / p.read(); }, py::call_guard<py::gil_scoped_release>());
}
