// Arrays of NumPy and vectors.
#pragma once

#include <pybind11/numpy.h>

#include <vector>

namespace pyspec {

template <typename T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

template <typename T>
Array<T> array_of(const std::vector<T>& values) {
  return Array<T>(static_cast<pybind11::ssize_t>(values.size()), values.data());
}

}  // namespace pyspec
