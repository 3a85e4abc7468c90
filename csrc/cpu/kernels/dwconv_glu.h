// SiLU, depthwise 3x3 convolution with zero padding, bias and gate in one pass over the image; the formulas are
// sana_ext/reference/glumbconv.py's. A work item is one image, one strip of rows and one block of channels: c channels
// of the value half a and the same c channels of the gate half g. It marches down its strip with a ring of three rows
// of silu(u) in cache, so that SiLU is taken once per element (and once more for the two rows above and below a strip).
#pragma once
#include "../../common/dtype.h"
#include "isa.h"

namespace sana_ext::cpu {

// Channels of each half in a block: long enough runs of memory per pixel, and rings that still fit the L2 cache.
constexpr int64_t kDwconvGluChannels = 128;

inline int64_t dwconv_glu_blocks(int64_t F) { return (F + kDwconvGluChannels - 1) / kDwconvGluChannels; }

// Strips per image. A function of the shape alone, so that sums over strips do not depend on the number of threads:
// one, unless there would be fewer than 64 items; no strip of fewer than 8 rows.
inline int64_t dwconv_glu_strips(int64_t B, int64_t H, int64_t F) {
  const int64_t items = B * dwconv_glu_blocks(F);
  const int64_t wanted = items > 0 ? (64 + items - 1) / items : 1, most = (H + 7) / 8;
  return wanted < most ? wanted : most;
}

// h = c_a * silu(c_g) with [c_a | c_g] = DW(silu(u)) + bias. Accumulators are fp64 if u is, else fp32.
struct DwconvGluForward {
  int64_t B, H, W, F, strips;
  ConstPtr u;  // [B, H*W, 2F], last dimension dense
  int64_t u_stride_b, u_stride_n;
  ConstPtr weight;  // [2F, 9] dense
  ConstPtr bias;    // [2F] dense, or absent
  Ptr out;          // [B, H*W, F] dense, dtype of u
};

// Items [begin, end) of the B * strips * dwconv_glu_blocks(F) items, channel blocks innermost.
SANA_EXT_KERNEL(dwconv_glu_forward, DwconvGluForward)

// du, and the sums of dweight and dbias over each strip. Everything between u and dout is computed again.
struct DwconvGluBackward {
  int64_t B, H, W, F, strips;
  ConstPtr dout;  // [B, H*W, F], last dimension dense, dtype of u
  int64_t dout_stride_b, dout_stride_n;
  ConstPtr u;  // [B, H*W, 2F], last dimension dense
  int64_t u_stride_b, u_stride_n;
  ConstPtr weight;  // [2F, 9] dense
  ConstPtr bias;    // [2F] dense, or absent
  Ptr du;           // [B, H*W, 2F] dense, dtype of u
  void* partial;    // [B, strips, 10, 2F] accumulators: nine taps and the bias; nullptr if not wanted
};

// Items as in the forward.
SANA_EXT_KERNEL(dwconv_glu_backward, DwconvGluBackward)

// Sums of `parts` partial sums, in order. Items are blocks of kDwconvGluChannels of the 2F channels.
struct DwconvGluReduce {
  int64_t parts, channels;
  const void* partial;  // [parts, 10, 2F] accumulators
  Ptr dweight;          // [2F, 9] dense
  Ptr dbias;            // [2F] dense, or absent
};
SANA_EXT_KERNEL(dwconv_glu_reduce, DwconvGluReduce)

}  // namespace sana_ext::cpu
