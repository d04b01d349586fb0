// What every params struct shares. No torch here: an engine can take the kernels folder alone.
#pragma once

#include <cstdint>

namespace pyspec {

enum class Element : int32_t { kFloat32, kFloat16, kBFloat16 };

// Runs body(context, item) for item in [0, items), in any order and on any threads. The caller brings the
// threads.
using ParallelBody = void (*)(void* context, int64_t item);
using ParallelFor = void (*)(int64_t items, ParallelBody body, void* context);

namespace {

template <class Body>
void parallel(ParallelFor run, int64_t items, Body& body) {
  run(items, [](void* context, int64_t item) { (*static_cast<Body*>(context))(item); }, &body);
}

}  // namespace
}  // namespace pyspec
