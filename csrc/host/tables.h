// Bindings of the tables that model-free drafters keep (STAND, ADED, N-Grammys, suffix lookup), and of
// trained heads.
#pragma once

#include <pybind11/pybind11.h>

namespace pyspec {

void add_tables(pybind11::module_& module);
void add_heads(pybind11::module_& module);

}  // namespace pyspec
