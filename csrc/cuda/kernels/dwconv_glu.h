// SiLU, depthwise 3x3 convolution with zero padding, bias and gate on the GPU, in one pass over the image; the formulas
// are sana_ext/reference/glumbconv.py's. Accumulators and partial sums are fp32.
#pragma once
#include "../../common/dtype.h"
#include "runtime.h"

namespace sana_ext::cuda {

// Register budget, checked by `make kernels`: dwconv_glu_forward_kernel 168, dwconv_glu_backward_kernel 255
// Register budget, checked by `make kernels`: dwconv_glu_backward_kernel<__*, true, true> 168, dwconv_glu_sum_kernel 40
// Machine code, checked by `make kernels`: dwconv_glu_forward_kernel<*, true>: LDGSTS.128
// Machine code, checked by `make kernels`: dwconv_glu_backward_kernel<*, true, *>: LDGSTS.128 LDS.128 STS.128
// Machine code, checked by `make kernels`: dwconv_glu_*_kernel<__nv_bfloat16, *>: MUFU.TANH

// How an image is cut into blocks of threads: groups of channels (the same ones of both halves), tiles of columns and
// strips of rows. A function of the shape alone, and so are the results.
struct DwconvGluCut {
  int64_t groups, tiles, strips;
  int64_t rows;  // of a strip; the last may have fewer
  int warps;     // of a block; each owns kDwconvGluRun columns of the tile
  int64_t blocks(int64_t B) const { return B * strips * tiles * groups; }
};

constexpr int kDwconvGluRun = 8, kDwconvGluWarps = 4;

// `channels` of each half per block; strips of at most most_rows rows.
constexpr DwconvGluCut dwconv_glu_cut(int64_t B, int64_t H, int64_t W, int64_t F, int64_t channels, int64_t most_rows) {
  constexpr int64_t kColumns = kDwconvGluRun * kDwconvGluWarps;
  constexpr int64_t kAtOnce = 396;  // blocks that a large GPU holds, three to a multiprocessor
  constexpr int64_t kLeastRows = 4;
  DwconvGluCut cut{};
  cut.groups = (F + channels - 1) / channels;
  cut.tiles = (W + kColumns - 1) / kColumns;
  cut.warps = static_cast<int>(((W + cut.tiles - 1) / cut.tiles + kDwconvGluRun - 1) / kDwconvGluRun);
  const int64_t blocks = B * cut.tiles * cut.groups;
  int64_t strips = blocks > 0 && blocks < kAtOnce ? kAtOnce / blocks : 1;
  if (strips > (H + kLeastRows - 1) / kLeastRows) strips = (H + kLeastRows - 1) / kLeastRows;
  if (strips < (H + most_rows - 1) / most_rows) strips = (H + most_rows - 1) / most_rows;
  cut.rows = (H + strips - 1) / strips;
  cut.strips = (H + cut.rows - 1) / cut.rows;
  return cut;
}

// h = c_a * silu(c_g) with [c_a | c_g] = DW(silu(u)) + bias. H, W, F >= 1; H, W and the blocks are fewer than 2^31.
struct DwconvGluForward {
  int64_t B, H, W, F;
  ConstPtr u;  // [B, H*W, 2F], last dimension dense
  int64_t u_stride_b, u_stride_n;
  ConstPtr weight;  // [2F, 9] dense
  ConstPtr bias;    // [2F] dense, or absent
  Ptr out;          // [B, H*W, F] dense, dtype of u
};
cudaError_t dwconv_glu_forward(const DwconvGluForward& args, cudaStream_t stream);

// How the backward cuts its images: 32 channels to a block, strips short enough for plain fp32 sums.
constexpr DwconvGluCut dwconv_glu_backward_cut(int64_t B, int64_t H, int64_t W, int64_t F) {
  return dwconv_glu_cut(B, H, W, F, 32, 64);
}

// du, and the sums of dweight and dbias over each part of an image. Everything between u and dout is computed again.
struct DwconvGluBackward {
  int64_t B, H, W, F;
  ConstPtr dout;  // [B, H*W, F], last dimension dense, dtype of u
  int64_t dout_stride_b, dout_stride_n;
  ConstPtr u;  // [B, H*W, 2F], last dimension dense
  int64_t u_stride_b, u_stride_n;
  ConstPtr weight;  // [2F, 9] dense
  ConstPtr bias;    // [2F] dense, or absent
  Ptr du;           // [B, H*W, 2F] dense, dtype of u
  float* partial;   // [parts, 10, 2F], parts = B * strips * tiles: nine taps and the bias; nullptr if not wanted
};
cudaError_t dwconv_glu_backward(const DwconvGluBackward& args, cudaStream_t stream);

// Sums of the partial sums, in a fixed order.
struct DwconvGluSums {
  int64_t parts, channels;  // channels = 2F
  const float* partial;     // [parts, 10, 2F]
  Ptr dweight;              // [2F, 9] dense
  Ptr dbias;                // [2F] dense, or absent
};
cudaError_t dwconv_glu_sums(const DwconvGluSums& args, cudaStream_t stream);

}  // namespace sana_ext::cuda
