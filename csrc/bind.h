// One function per operator adds its entry points to fastsft._C: raw pointers and sizes in, nothing out but through them.
// Python checks types, shapes and lifetimes before the call (fastsft/ops); the GIL is released in every kernel.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastsft {

using Release = pybind11::call_guard<pybind11::gil_scoped_release>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_influence_dot(pybind11::module_& m);
void bind_sketch_matrix(pybind11::module_& m);
void bind_store_topk(pybind11::module_& m);

}  // namespace fastsft
