// B batch, N tokens, H heads, D channels of a head, anything at all. In plain loops: a thread makes one element of a
// result, or a warp one number per token and head. Row operands repeat within a warp and states fit the L1 cache.
#include "linear_attention_generic.h"

#include "primitives.cuh"

namespace sana_ext::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int64_t kMaxBlocks = 1 << 20;  // more work is walked through in strides

using Rows = LinearAttentionRows<ConstPtr>;

__device__ inline int64_t row_start(const Rows& x, int64_t b, int64_t n, int64_t h) {
  return b * x.stride_b + n * x.stride_n + h * x.stride_h;
}
__device__ inline float weight_of(ConstPtr weight, int64_t i) { return weight ? load_element(weight, i) : 1.0f; }
__device__ inline float relu(float x) { return x < 0.0f ? 0.0f : x; }  // keeps NaN
// relu(w q): with a norm an infinity is NaN, whose scale is then 0, even where a query's row scale cancels.
__device__ inline float query(ConstPtr weight, int64_t i, float q) {
  return weight ? relu(load_element(weight, i) * q) + (q - q) : relu(q);
}

// partial[i, j] = sum of scale_n relu(w x_n)_i y_nj, and in row D that of scale_n relu(w x_n)_i last_n.
struct OuterProducts {
  LinearAttentionSize size;
  Rows x, y;
  ConstPtr weight;
  const float *scale, *last;   // nullptr: 1
  int64_t stride_b, stride_h;  // of scale and last
  float* partial;              // [B, parts, H, D + 1, D]
};

__global__ void __launch_bounds__(kThreads, 3) outer_products_generic_kernel(OuterProducts a) {
  const LinearAttentionSize& s = a.size;
  const int64_t D = s.D, elements = (D + 1) * D, parts = s.parts(), count = s.B * parts * s.H * elements;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t unit = at / elements, h = unit % s.H, b = unit / s.H / parts;
    const int64_t row = at % elements / D, column = at % D;
    const int64_t first = unit / s.H % parts * s.tokens, end = first + s.tokens < s.N ? first + s.tokens : s.N;
    const bool is_last = row == D;
    const int64_t i = is_last ? column : row;  // row D is indexed by the channel of x
    const float w = weight_of(a.weight, h * D + i);
    const int64_t values = b * a.stride_b + h * a.stride_h;
    float sum = 0.0f;
    for (int64_t n = first; n < end; ++n) {
      const float value = load_element(a.x.p, row_start(a.x, b, n, h) + i);
      float x = a.weight ? relu(w * value) + (value - value) : relu(value);
      if (a.scale != nullptr) x *= load_global(a.scale + values + n);
      if (!is_last)
        sum += x * load_element(a.y.p, row_start(a.y, b, n, h) + column);
      else
        sum += a.last != nullptr ? x * load_global(a.last + values + n) : x;
    }
    store_global(a.partial + at, sum);
  }
}

__device__ inline float denominator_eps(const float* rstd_q, int64_t row, float eps) {
  return rstd_q != nullptr ? eps / load_global(rstd_q + row) : eps;
}

__global__ void __launch_bounds__(kThreads) output_generic_kernel(LinearAttentionOutput a) {
  const LinearAttentionSize& s = a.size;
  const int64_t D = s.D, count = s.B * s.N * s.H * D;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t j = at % D, h = at / D % s.H, row = at / D / s.H, n = row % s.N, b = row / s.N;
    const float* const state = a.state + (b * s.H + h) * (D + 1) * D;
    const int64_t q = row_start(a.q, b, n, h);
    float sum = 0.0f, d = 0.0f;
    for (int64_t i = 0; i < D; ++i) {
      const float u = query(a.weight_q, h * D + i, load_element(a.q.p, q + i));
      sum += u * load_global(state + i * D + j);
      d += u * load_global(state + D * D + i);
    }
    d += denominator_eps(a.rstd_q, row, a.eps);
    store_element(a.out.p, b * a.out.stride_b + n * a.out.stride_n + h * a.out.stride_h + j,
                  d == 0.0f ? 0.0f : sum / d);
  }
}

// Of every token and head, with u = relu(w x) and the matrix M above the row m: m . u and u^T M y; from these either
// the inverse denominator, -s = -u^T M y / denominator and b = d(loss) / d(denominator), or their sum.
struct RowForms {
  LinearAttentionSize size;
  Rows x, y;
  ConstPtr weight;
  const float* matrix;  // [B, H, D + 1, D]
  const float* rstd;    // [B, N] or nullptr
  float eps;
  float *inverse, *minus_s, *b;  // [B, H, N]; each may be nullptr
  float* sum;                    // [B, H, N] or nullptr
};

__global__ void __launch_bounds__(kThreads, 3) rows_generic_kernel(RowForms a) {
  const LinearAttentionSize& s = a.size;
  const int64_t D = s.D;
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; unit < s.B * s.H * s.N;
       unit += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t n = unit % s.N, h = unit / s.N % s.H, b = unit / s.N / s.H;
    const float* const matrix = a.matrix + (b * s.H + h) * (D + 1) * D;
    const int64_t x = row_start(a.x, b, n, h), y = row_start(a.y, b, n, h);
    float dot = 0.0f, form = 0.0f;
    for (int64_t j = lane; j < D; j += kWarpSize) {
      const float u_j = query(a.weight, h * D + j, load_element(a.x.p, x + j));
      dot += u_j * load_global(matrix + D * D + j);
      float sum = 0.0f;
      for (int64_t i = 0; i < D; ++i)
        sum += relu(weight_of(a.weight, h * D + i) * load_element(a.x.p, x + i)) * load_global(matrix + i * D + j);
      form += sum * load_element(a.y.p, y + j);
    }
    dot = warp_sum(dot), form = warp_sum(form);
    if (lane != 0) continue;
    if (a.sum != nullptr) {
      store_global(a.sum + unit, dot + form);
      continue;
    }
    const float d = dot + denominator_eps(a.rstd, b * s.N + n, a.eps), inverse = d == 0.0f ? 0.0f : 1.0f / d;
    if (a.inverse != nullptr) store_global(a.inverse + unit, inverse);
    if (a.minus_s != nullptr) store_global(a.minus_s + unit, -form * inverse);
    if (a.b != nullptr) store_global(a.b + unit, -form * inverse * inverse);
  }
}

__global__ void __launch_bounds__(kThreads) backward_q_generic_kernel(LinearAttentionBackwardQ a) {
  const LinearAttentionSize& s = a.size;
  const int64_t D = s.D, count = s.B * s.N * s.H * D;
  const float *const inverses = a.work, *const minus_s = a.work + s.B * s.H * s.N;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t i = at % D, h = at / D % s.H, row = at / D / s.H, n = row % s.N, b = row / s.N;
    const float* const state = a.state + (b * s.H + h) * (D + 1) * D;
    const int64_t unit = (b * s.H + h) * s.N + n, dout = row_start(a.dout, b, n, h);
    const float w = weight_of(a.weight_q, h * D + i), q = load_element(a.q.p, row_start(a.q, b, n, h) + i);
    float t = 0.0f;
    for (int64_t j = 0; j < D; ++j) t += load_global(state + i * D + j) * load_element(a.dout.p, dout + j);
    const float inverse = load_global(inverses + unit), beta = load_global(minus_s + unit) * inverse;
    float dq = w * q <= 0.0f ? 0.0f : w * (t * inverse + beta * load_global(state + D * D + i));
    if (a.weight_q && inverse != inverse) dq = inverse;  // through the norm
    if (a.rstd_q != nullptr)
      dq += q * (a.eps * load_global(a.rstd_q + row) / static_cast<float>(s.H * D) * load_global(a.row_sums + row));
    store_element(a.dq.p, b * a.dq.stride_b + n * a.dq.stride_n + h * a.dq.stride_h + i, dq);
  }
}

__global__ void __launch_bounds__(kThreads) backward_k_generic_kernel(LinearAttentionBackwardK a) {
  const LinearAttentionSize& s = a.size;
  const int64_t D = s.D, count = s.B * s.N * s.H * D;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < count;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t i = at % D, h = at / D % s.H, row = at / D / s.H, n = row % s.N, b = row / s.N;
    const float* const dS = a.dstate + (b * s.H + h) * (D + 1) * D;
    const int64_t k_start = row_start(a.k, b, n, h), v_start = row_start(a.v, b, n, h);
    const float w = weight_of(a.weight_k, h * D + i), k = load_element(a.k.p, k_start + i);
    const float rstd = a.rstd_k != nullptr ? load_global(a.rstd_k + row) : 1.0f;
    float dkhat = load_global(dS + D * D + i), dv = 0.0f;
    for (int64_t j = 0; j < D; ++j) {
      dkhat += load_global(dS + i * D + j) * load_element(a.v.p, v_start + j);
      dv += relu(weight_of(a.weight_k, h * D + j) * load_element(a.k.p, k_start + j)) * load_global(dS + j * D + i);
    }
    float dk = w * k <= 0.0f ? 0.0f : rstd * w * dkhat;
    if (a.rstd_k != nullptr)
      dk -= k * (rstd * rstd * rstd / static_cast<float>(s.H * D) * load_global(a.row_sums + row));
    store_element(a.dk.p, b * a.dk.stride_b + n * a.dk.stride_n + h * a.dk.stride_h + i, dk);
    store_element(a.dv.p, b * a.dv.stride_b + n * a.dv.stride_n + h * a.dv.stride_h + i, rstd * dv);
  }
}

unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

cudaError_t launch(const OuterProducts& a, cudaStream_t stream) {
  const LinearAttentionSize& s = a.size;
  const unsigned blocks = blocks_for(s.B * s.parts() * s.H * (s.D + 1) * s.D, kThreads);
  return SANA_EXT_LAUNCH(outer_products_generic_kernel, blocks, kThreads, 0, stream, a);
}

cudaError_t launch(const RowForms& a, cudaStream_t stream) {
  const unsigned blocks = blocks_for(a.size.B * a.size.H * a.size.N, kWarps);
  return SANA_EXT_LAUNCH(rows_generic_kernel, blocks, kThreads, 0, stream, a);
}

RowForms query_rows(const LinearAttentionBackwardQ& a) {
  RowForms r{};
  r.size = a.size, r.x = a.q, r.y = a.dout, r.weight = a.weight_q, r.matrix = a.state;
  r.rstd = a.rstd_q, r.eps = a.eps;
  return r;
}

unsigned blocks_per_element(const LinearAttentionSize& s) { return blocks_for(s.B * s.N * s.H * s.D, kThreads); }

}  // namespace

cudaError_t linear_attention_state_generic(const LinearAttentionState& a, cudaStream_t stream) {
  return launch(OuterProducts{a.size, a.k, a.v, a.weight_k, a.rstd_k, nullptr, a.size.N, 0, a.partial}, stream);
}

cudaError_t linear_attention_output_generic(const LinearAttentionOutput& a, cudaStream_t stream) {
  return SANA_EXT_LAUNCH(output_generic_kernel, blocks_per_element(a.size), kThreads, 0, stream, a);
}

cudaError_t linear_attention_backward_q_rows_generic(const LinearAttentionBackwardQ& a, float* b, cudaStream_t stream) {
  RowForms r = query_rows(a);
  r.b = b;
  return launch(r, stream);
}

cudaError_t linear_attention_backward_q_generic(const LinearAttentionBackwardQ& a, cudaStream_t stream) {
  const LinearAttentionSize& s = a.size;
  RowForms r = query_rows(a);
  r.inverse = a.work, r.minus_s = a.work + s.B * s.H * s.N;
  if (const cudaError_t error = launch(r, stream); error != cudaSuccess) return error;
  const cudaError_t error = SANA_EXT_LAUNCH(backward_q_generic_kernel, blocks_per_element(s), kThreads, 0, stream, a);
  if (error != cudaSuccess) return error;
  return launch(OuterProducts{s, a.q, a.dout, a.weight_q, r.inverse, r.minus_s, s.H * s.N, s.N, a.partial}, stream);
}

cudaError_t linear_attention_backward_k_rows_generic(const LinearAttentionBackwardK& a, float* c, cudaStream_t stream) {
  RowForms r{};
  r.size = a.size, r.x = a.k, r.y = a.v, r.weight = a.weight_k, r.matrix = a.dstate, r.sum = c;
  return launch(r, stream);
}

cudaError_t linear_attention_backward_k_generic(const LinearAttentionBackwardK& a, cudaStream_t stream) {
  return SANA_EXT_LAUNCH(backward_k_generic_kernel, blocks_per_element(a.size), kThreads, 0, stream, a);
}

}  // namespace sana_ext::cuda
