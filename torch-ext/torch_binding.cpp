// The ops of the kernel-builder variant (build.toml): schemas only, those of pyspec/ops. The bindings in
// csrc/ register their kernels for them, under the name that the builder gives each build
// (-Dpyspec=TORCH_EXTENSION_NAME).
#include <torch/csrc/stable/library.h>

#include "registration.h"  // made by the builder

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, m) {
#include "schemas.inc"
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
