// fastsft._C: raw pointers and sizes in, nothing out but through them. Python checks types, shapes and lifetimes before the
// call (fastsft/ops); the GIL is released in every kernel. No torch header: the module outlives any torch upgrade.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/influence_dot.h"

namespace py = pybind11;

namespace {

constexpr int ABI_VERSION = 1;  // raise with every change of a signature here; fastsft/_native.py compares

struct Isa {
  const char* name;
  fastsft::UnitKernel influence_unit;
};

// Those this machine can run, slowest first.
std::vector<Isa> find_isas() {
  std::vector<Isa> isas = {{"base", fastsft::influence_unit_base}};
#ifdef FASTSFT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    isas.push_back({"avx2", fastsft::influence_unit_avx2});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    isas.push_back({"avx512", fastsft::influence_unit_avx512});
#endif
  return isas;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = find_isas();
  return found;
}

const Isa* chosen = nullptr;

const Isa& current_isa() { return chosen ? *chosen : isas().back(); }

std::vector<const char*> isa_names() {
  std::vector<const char*> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

void set_isa(const std::string& name) {
  std::string known;
  for (const Isa& isa : isas()) {
    if (name == isa.name) {
      chosen = &isa;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("`name` must be an instruction set this machine runs (" + known + "): got " + name + ".");
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void influence_dot(uintptr_t x, int64_t x_stride, bool x_bf16, uintptr_t dy, int64_t dy_stride, bool dy_bf16, int64_t I,
                   int64_t O, uintptr_t offsets, int64_t D, uintptr_t targets, int64_t A, uintptr_t precondition,
                   uintptr_t groups, uintptr_t sums, uintptr_t sketch, int64_t K, uint32_t seed, uintptr_t scores,
                   int num_threads) {
  const fastsft::InfluenceJob job = {{pointer<const void>(x), x_stride, I, x_bf16},
                                     {pointer<const void>(dy), dy_stride, O, dy_bf16},
                                     pointer<const int64_t>(offsets),
                                     D,
                                     pointer<const float>(targets),
                                     A,
                                     pointer<const float>(precondition),
                                     pointer<const int64_t>(groups),
                                     pointer<float>(sums),
                                     pointer<float>(sketch),
                                     K,
                                     seed};
  fastsft::influence_dot(job, pointer<float>(scores), current_isa().influence_unit, num_threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("abi_version", [] { return ABI_VERSION; });
  m.def("isa", [] { return current_isa().name; }, "The instruction set in use.");
  m.def("isa_names", &isa_names, "The instruction sets this machine can run, slowest first.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another instruction set; for tests and benchmarks.");
  m.def("influence_dot", &influence_dot, release());
}
