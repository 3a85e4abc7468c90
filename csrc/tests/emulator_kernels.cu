// The emulator's test kernels as nvcc sees them: `make kernels` compiles them, so the PTX of every primitive is valid.
#include "emulator_kernels.cuh"

namespace sana_ext::cuda {

template __global__ void sum_kernel<Plant::kNothing>(SumArgs);
template __global__ void transpose_kernel<Plant::kNothing>(TransposeArgs);
template __global__ void gemm_kernel<BFloat16, Plant::kNothing>(GemmArgs<BFloat16>);
template __global__ void gemm_kernel<Half, Plant::kNothing>(GemmArgs<Half>);
template __global__ void warp_kernel<Plant::kNothing>(WarpArgs);

}  // namespace sana_ext::cuda
