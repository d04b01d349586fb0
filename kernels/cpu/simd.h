// Sixteen numbers at a time, on every instruction set. Everything is in an unnamed namespace: these headers
// are compiled once per instruction set, and a shared inline function would be merged by the linker into one
// copy.
#pragma once

#include "cpu/simd_floats.h"
#include "cpu/simd_storage.h"
#include "cpu/simd_words.h"
