// Binding of the tables that model-free drafters keep: STAND, ADED, N-Grammys, suffix lookup.
#pragma once

#include <pybind11/pybind11.h>

namespace pyspec {

void add_tables(pybind11::module_& module);

}  // namespace pyspec
