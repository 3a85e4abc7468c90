// CUDA's runtime types for headers of kernels, or the emulator's.
#pragma once
#ifdef SANA_EXT_EMULATOR
#include "../../emulator/runtime.h"
#else
#include <cuda_runtime_api.h>
#endif
