// What every params struct shares. No torch here: an engine can take the kernels folder alone.
#pragma once

#include <cstdint>

// A kernel's entry point: PYSPEC_ENTRY(pyspec_topk) is pyspec_topk_avx2 in the object file for AVX2.
#define PYSPEC_ENTRY_(name, isa) name##_##isa
#define PYSPEC_ENTRY_OF(name, isa) PYSPEC_ENTRY_(name, isa)
#define PYSPEC_ENTRY(name) PYSPEC_ENTRY_OF(name, PYSPEC_ISA)

// For what kernels call on either side.
#ifdef __CUDACC__
#define PYSPEC_HOST_DEVICE __host__ __device__
#else
#define PYSPEC_HOST_DEVICE
#endif

namespace pyspec {

enum class Element : int32_t { kFloat32, kFloat16, kBFloat16 };

// Runs body(context, item) once for every item in [0, items), in any order and on any threads, and returns
// when all are done. The caller brings the threads. Everything that a kernel writes, it writes in such a
// body: then a whole program of kernels can be run by all threads at once, each of which takes items where it
// finds them.
using ParallelBody = void (*)(void* context, int64_t item);
using ParallelFor = void (*)(int64_t items, ParallelBody body, void* context);

namespace {

template <class Body>
void parallel(ParallelFor run, int64_t items, Body& body) {
  run(items, [](void* context, int64_t item) { (*static_cast<Body*>(context))(item); }, &body);
}

}  // namespace
}  // namespace pyspec
