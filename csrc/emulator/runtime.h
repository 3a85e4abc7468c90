// The part of CUDA's runtime interface that launchers and glue use. Included instead of <cuda_runtime_api.h>.
#pragma once

namespace sana_ext::cuda {

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
// A launch under the emulator either succeeds or throws emulator::Fault.
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

}  // namespace sana_ext::cuda
