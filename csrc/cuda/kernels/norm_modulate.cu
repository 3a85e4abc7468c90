// B batch, N tokens, C channels. One block of 256 threads per row (b, n):
//   1. the row goes to shared memory as fp32 while its sum is taken,
//   2. the variance from the copy (two passes: no cancellation),
//   3. normalise, modulate, store.
// Bytes: one read of x, one write of n; shift and scale rows come from L2.
#include "norm_modulate.h"

#include "primitives.cuh"

namespace sana_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

__global__ void __launch_bounds__(kThreads) norm_modulate_forward_kernel(NormModulateForward a) {
  const bool copied = a.C <= kNormModulateMaxChannels;
  SharedMemory memory;
  const Shared<float> sums = memory.take<float>(kWarps), squares = memory.take<float>(kWarps);
  const Shared<float> row_copy = memory.take<float>(copied ? a.C : 0);
  for (int64_t row = blockIdx.x; row < a.B * a.N; row += gridDim.x) {
    const int64_t b = row / a.N;
    const int64_t start = b * a.x_stride_b + row % a.N * a.x_stride_n;
    float sum = 0.0f;
    for (int64_t c = threadIdx.x; c < a.C; c += kThreads) {
      const float x = load_element(a.x, start + c);
      if (copied) row_copy[c] = x;
      sum += x;
    }
    const float mean = block_sum<kWarps>(sum, sums) / static_cast<float>(a.C);
    float square = 0.0f;
    for (int64_t c = threadIdx.x; c < a.C; c += kThreads) {
      const float d = (copied ? row_copy[c] : load_element(a.x, start + c)) - mean;
      square += d * d;
    }
    const float rstd = rsqrtf(block_sum<kWarps>(square, squares) / static_cast<float>(a.C) + a.eps);
    for (int64_t c = threadIdx.x; c < a.C; c += kThreads) {
      const float x = copied ? row_copy[c] : load_element(a.x, start + c);
      const float scale = load_element(a.scale, b * a.scale_stride_b + c),
                  shift = load_element(a.shift, b * a.shift_stride_b + c);
      store_element(a.n, row * a.C + c, (x - mean) * rstd * (1.0f + scale) + shift);
    }
    if (threadIdx.x == 0) {
      store_global(a.mean + row, mean);
      store_global(a.rstd + row, rstd);
    }
    __syncthreads();  // the next row reuses the sums
  }
}

}  // namespace

cudaError_t norm_modulate_forward(const NormModulateForward& args, cudaStream_t stream) {
  const int64_t rows = args.B * args.N;
  if (rows == 0) return cudaSuccess;
  const unsigned blocks = static_cast<unsigned>(rows < 65536 ? rows : 65536);
  const size_t shared =
      2 * shared_size<float>(kWarps) + shared_size<float>(args.C <= kNormModulateMaxChannels ? args.C : 0);
  return SANA_EXT_LAUNCH(norm_modulate_forward_kernel, blocks, kThreads, shared, stream, args);
}

}  // namespace sana_ext::cuda
