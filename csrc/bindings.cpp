// fastsft._C: the instruction set in use, and the operators (bind_<op>.cpp). No torch header: the module outlives any torch
// upgrade.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bind.h"
#include "isa.h"

namespace fastsft {
namespace {

constexpr int ABI_VERSION = 3;  // raise with every change of a signature in bind_*.cpp; fastsft/_native.py compares

const char* const NAMES[] = {"base", "avx2", "avx512", "avx512vnni"};

Isa find_best() {
#ifdef FASTSFT_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::base;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16") ||
      !__builtin_cpu_supports("avx512vpopcntdq"))
    return Isa::avx512;
  return Isa::avx512vnni;
#else
  return Isa::base;
#endif
}

Isa best() {
  static const Isa found = find_best();
  return found;
}

bool is_chosen = false;
Isa chosen = Isa::base;

std::vector<const char*> isa_names() { return {NAMES, NAMES + static_cast<int>(best()) + 1}; }

void set_isa(const std::string& name) {
  std::string known;
  for (int isa = 0; isa <= static_cast<int>(best()); ++isa) {
    if (name == NAMES[isa]) {
      chosen = static_cast<Isa>(isa);
      is_chosen = true;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + NAMES[isa];
  }
  throw std::invalid_argument("`name` must be an instruction set this machine runs (" + known + "): got " + name + ".");
}

}  // namespace

Isa current_isa() { return is_chosen ? chosen : best(); }

}  // namespace fastsft

PYBIND11_MODULE(_C, m) {
  using namespace fastsft;
  m.def("abi_version", [] { return ABI_VERSION; });
  m.def("isa", [] { return NAMES[static_cast<int>(current_isa())]; }, "The instruction set in use.");
  m.def("isa_names", &isa_names, "The instruction sets this machine can run, slowest first.");
  m.def("set_isa", &set_isa, pybind11::arg("name"), "Use another instruction set; for tests and benchmarks.");
  bind_influence_dot(m);
  bind_sketch_matrix(m);
  bind_store_topk(m);
}
