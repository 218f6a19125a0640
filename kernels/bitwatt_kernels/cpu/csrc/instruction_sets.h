// Which of the compiled instruction sets this machine can run.

#pragma once

#include <vector>

#include "calls.h"

namespace bitwatt {

// Their kernels, the fastest first; each is prepared.
const std::vector<const Kernels*>& kernels_that_run();

}  // namespace bitwatt
