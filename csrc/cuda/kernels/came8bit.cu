// The passes over the tiles; see came8bit.h.
#include "came8bit_tile.cuh"
#include "code8.cuh"

namespace sana_ext::cuda {
namespace {

constexpr int kWarps = kCame8bitWarps, kValues = kLaneValues;
constexpr size_t kColumnBytes = shared_size<float>(kWarps * kCame8bitStrip);

// The sums of squares of this thread's columns, and of all; the rows' are stored. A template, since rows that cannot
// end early take half of the registers.
template <bool kFactored>
__device__ inline float squares(const Came8bitTensor& any, const Tile& tile, float factor, float (&column)[kValues]) {
  constexpr int kBatch = 4;
  Came8bitTensor t = any;
  t.factored = kFactored;
  float all = 0.0f;
  for (int64_t row = tile.begin; row < tile.end; row += kBatch * kWarps) {
    Raw raw[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const Piece piece = piece_of(t, tile, row + k * kWarps);
      raw[k] = load_values(t.g, t.g_bf16, piece.offset, piece.count, piece.whole);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      float g[kValues], sum = 0.0f;
      unpack_values(raw[k], t.g_bf16, g);
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        const float x = g[j] * factor, square = x * x;
        sum += square, column[j] += square;
      }
      all += sum;
      if (!kFactored) continue;
      const float total = warp_sum(sum);
      if (threadIdx.x % kWarpSize == 0 && row + k * kWarps < tile.end)
        store_global(t.row_part + (tile.strip * t.B + tile.b) * t.R + row + k * kWarps, total);
    }
  }
  return all;
}

__global__ void __launch_bounds__(kCame8bitThreads, 3) came8bit_squares_kernel(Came8bitLaunch a) {
  SharedMemory memory;
  const Shared<float> slots = memory.take<float>(kWarps * kCame8bitStrip);
  const int owner = load_global(a.tile_owner + blockIdx.x);
  const Came8bitTensor t = tensor_of(a, owner);
  const Tile tile = tile_of(t);
  const float factor = hyper(a, owner, 8);
  float column[kValues] = {};
  if (t.factored) {
    squares<true>(t, tile, factor, column);
    return store_columns(t, tile, column, slots);
  }
  const float total = block_sum<kWarps>(squares<false>(t, tile, factor, column), slots);
  if (threadIdx.x == 0) store_global(a.tile_sums + blockIdx.x, total);
}

__global__ void __launch_bounds__(kCame8bitThreads, 3) came8bit_norm_kernel(Came8bitLaunch a) {
  constexpr int kBatch = 4;
  SharedMemory memory;
  const Shared<float> slots = memory.take<float>(kWarps);
  if (load_global(a.found_inf) != 0.0f) return;
  const int owner = load_global(a.tile_owner + blockIdx.x);
  const Came8bitTensor t = tensor_of(a, owner);
  const Tile tile = tile_of(t);
  const float factor = hyper(a, owner, 8);
  float all = 0.0f;
  if (t.factored) {
    float c[kValues];
    load_columns(t.w_col, t, tile, c);
    for (int64_t row = tile.begin; row < tile.end; row += kBatch * kWarps) {
      Raw raw[kBatch];
      float scale[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const Piece piece = piece_of(t, tile, row + k * kWarps);
        raw[k] = load_values(t.g, t.g_bf16, piece.offset, piece.count, piece.whole);
        scale[k] = row + k * kWarps < tile.end ? factor * load_global(t.w_row + piece.row) : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        float g[kValues];
        unpack_values(raw[k], t.g_bf16, g);
#pragma unroll
        for (int j = 0; j < kValues; ++j) {
          const float u = g[j] * scale[k] * c[j];
          all += u * u;
        }
      }
    }
  } else {
    const float beta2 = hyper(a, owner, 3), rest2 = static_cast<float>(1 - hyper64(a, owner, 3));
    const float eps1 = hyper(a, owner, 5), correct2 = hyper(a, owner, 10);
    for (int64_t row = tile.begin; row < tile.end; row += kWarps) {
      const Piece piece = piece_of(t, tile, row);
      const Raw raw_g = load_values(t.g, t.g_bf16, piece.offset, piece.count, piece.whole);
      const Raw raw_v = load_values(t.second, false, piece.offset, piece.count, piece.whole);
      float g[kValues], v[kValues];
      unpack_values(raw_g, t.g_bf16, g);
      unpack_values(raw_v, false, v);
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        const float x = g[j] * factor;
        v[j] = v[j] * beta2 + (x * x + eps1) * rest2;
        const float u = x / sqrtf(v[j] * correct2);
        all += j < piece.count ? u * u : 0.0f;
      }
      store_floats(t.second, piece.offset, piece.count, piece.whole, v);
    }
  }
  const float total = block_sum<kWarps>(all, slots);
  if (threadIdx.x == 0) store_global(a.tile_sums + blockIdx.x, total);
}

// What phases 2 and 3 make of a row: the update u and the new moment m.
struct Moments {
  const Came8bitTensor& t;
  const Tile& tile;
  const SharedCode& code;
  float scale, beta1, rest1, correct2;
  float c[kValues];  // 1 / sqrt(col)

  struct Row {
    Piece piece;
    Raw g;
    uint64_t codes;
    float row, scale[2];
  };

  __device__ inline int64_t block_of(int64_t row) const {
    const int64_t unit = t.unit_rows == 1 ? row : row / t.unit_rows;
    return (tile.b * t.units + unit) * t.blocks + tile.strip / t.block_strips;
  }
  __device__ inline Row load(int64_t row) const {
    Row r{};
    r.piece = piece_of(t, tile, row);
    const Piece& p = r.piece;
    r.g = load_values(t.g, t.g_bf16, p.offset, p.count, p.whole);
    if (t.codes) r.codes = load_codes(t.codes, p.offset, p.count, p.whole);
    if (row >= tile.end) return r;
    if (t.factored) r.row = load_global(t.w_row + p.row);
    if (t.codes) {
      const float* scales = t.scales + (t.linear ? 2 : 1) * block_of(row);
      r.scale[0] = load_global(scales);
      if (t.linear) r.scale[1] = load_global(scales + 1);
    }
    return r;
  }
  // Both are 0 beyond the piece. What few parameters have, fp32 moments and no factors, is loaded here: registers.
  __device__ inline void compute(const Row& r, float (&u)[kValues], float (&m)[kValues]) const {
    unpack_values(r.g, t.g_bf16, u);
    if (!t.codes) {
      unpack_values(load_values(t.m, false, r.piece.offset, r.piece.count, r.piece.whole), false, m);
    } else {
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        const auto byte = static_cast<uint8_t>(r.codes >> 8 * j);
        if (t.linear) {
          m[j] = decode_linear(byte, r.scale[0], r.scale[1]);
        } else {
          const int k = static_cast<int>(byte) - kCodeZero;
          const float magnitude = code.magnitude[k < 0 ? -k : k];
          m[j] = (k < 0 ? -magnitude : magnitude) * r.scale[0];
        }
      }
    }
    if (t.factored) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) u[j] = u[j] * (scale * r.row) * c[j];
    } else {
      float v[kValues];
      unpack_values(load_values(t.second, false, r.piece.offset, r.piece.count, r.piece.whole), false, v);
#pragma unroll
      for (int j = 0; j < kValues; ++j) u[j] = u[j] * scale / sqrtf(v[j] * correct2);
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      u[j] = j < r.piece.count ? u[j] : 0.0f;
      m[j] = j < r.piece.count ? m[j] * beta1 + u[j] * rest1 : 0.0f;
    }
  }
};

__device__ inline Moments moments(const Came8bitLaunch& a, const Came8bitTensor& t, const Tile& tile, int owner,
                                  const SharedCode& code) {
  Moments result{t,
                 tile,
                 code,
                 clipped(a, t, owner),
                 hyper(a, owner, 2),
                 static_cast<float>(1 - hyper64(a, owner, 2)),
                 hyper(a, owner, 10),
                 {}};
  if (t.factored) load_columns(t.w_col, t, tile, result.c);
  return result;
}

__global__ void __launch_bounds__(kCame8bitThreads, 2) came8bit_residual_kernel(Came8bitLaunch a) {
  constexpr int kBatch = 2;
  SharedMemory memory;
  const Shared<float> slots = memory.take<float>(kWarps * kCame8bitStrip);
  const SharedCode code = take_code(memory);
  if (load_global(a.found_inf) != 0.0f) return;
  const int owner = load_global(a.tile_owner + blockIdx.x);
  const Came8bitTensor t = tensor_of(a, owner);
  if (!t.factored && !t.codes) return;
  if (t.codes && !t.linear) {
    fill(code, true);
    __syncthreads();
  }
  const Tile tile = tile_of(t);
  const Moments moment = moments(a, t, tile, owner, code);
  float column[kValues] = {};
  for (int64_t row = tile.begin; row < tile.end; row += kBatch * kWarps) {
    Moments::Row rows[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) rows[k] = moment.load(row + k * kWarps);
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      float u[kValues], m[kValues], sum = 0.0f, low = kCodeLargest, high = -kCodeLargest;
      moment.compute(rows[k], u, m);
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        const float residual = u[j] - m[j], square = residual * residual;
        sum += square, column[j] += square;
        const float value = saturated(m[j]);
        const bool valid = j < rows[k].piece.count;
        low = valid && value < low ? value : low, high = valid && value > high ? value : high;
      }
      sum = warp_sum(sum);
      if (t.codes) {
#pragma unroll
        for (int apart = kWarpSize / 2; apart > 0; apart /= 2) {
          const float other_low = __shfl_xor_sync(kAllLanes, low, apart);
          const float other_high = __shfl_xor_sync(kAllLanes, high, apart);
          low = other_low < low ? other_low : low, high = other_high > high ? other_high : high;
        }
      }
      if (threadIdx.x % kWarpSize != 0 || row + k * kWarps >= tile.end) continue;
      const int64_t at = (tile.strip * t.B + tile.b) * t.R + row + k * kWarps;
      if (t.factored) store_global(t.row_part + at, sum);
      if (t.codes) store_global(t.low + at, low), store_global(t.high + at, high);
    }
  }
  if (t.factored) store_columns(t, tile, column, slots);
}

// A row as phase 3 needs it.
struct Applied {
  Moments::Row row;
  Raw p;
  float res_row, fresh[2];
};

__device__ inline Applied load_applied(const Moments& moment, int64_t row) {
  const Came8bitTensor& t = moment.t;
  Applied r{};
  r.row = moment.load(row);
  const Piece& piece = r.row.piece;
  r.p = load_values(t.p, t.p_bf16, piece.offset, piece.count, piece.whole);
  r.res_row = 1.0f;
  if (row >= moment.tile.end) return r;
  if (t.factored) r.res_row = load_global(t.w_res_row + piece.row);
  if (t.codes) {
    const float* scales = t.fresh + 2 * moment.block_of(row);
    r.fresh[0] = load_global(scales), r.fresh[1] = load_global(scales + 1);
  }
  return r;
}

__global__ void __launch_bounds__(kCame8bitThreads, 2) came8bit_apply_kernel(Came8bitLaunch a) {
  SharedMemory memory;
  const SharedCode code = take_code(memory);
  if (load_global(a.found_inf) != 0.0f) return;
  const int owner = load_global(a.tile_owner + blockIdx.x);
  const Came8bitTensor t = tensor_of(a, owner);
  if (t.codes && !t.linear) {
    fill(code, true);
    __syncthreads();
  }
  const Tile tile = tile_of(t);
  const Moments moment = moments(a, t, tile, owner, code);
  const float lr = static_cast<float>(hyper64(a, owner, 0) * hyper64(a, owner, 9));
  const float decay = static_cast<float>(hyper64(a, owner, 0) * hyper64(a, owner, 1));
  const int64_t seed = a.seeds == nullptr ? -1 : load_global(a.seeds + owner);
  float residual[kValues] = {};
  if (t.factored) load_columns(t.w_res_col, t, tile, residual);
  Applied next = load_applied(moment, tile.begin);  // a row ahead
  for (int64_t row = tile.begin; row < tile.end; row += kWarps) {
    const Applied now = next;
    if (row + kWarps < tile.end) next = load_applied(moment, row + kWarps);
    const Piece& piece = now.row.piece;
    const float step = lr * now.res_row;
    float u[kValues], m[kValues], p[kValues];
    moment.compute(now.row, u, m);
    unpack_values(now.p, t.p_bf16, p);
#pragma unroll
    for (int j = 0; j < kValues; ++j)
      p[j] = p[j] - p[j] * decay - (t.factored ? m[j] * step * residual[j] : m[j] * step);
    if (t.p_bf16)
      store_bf16(static_cast<uint16_t*>(t.p), piece.offset, piece.count, piece.whole, seed, p);
    else
      store_floats(static_cast<float*>(t.p), piece.offset, piece.count, piece.whole, p);
    if (!t.codes) {
      store_floats(t.m, piece.offset, piece.count, piece.whole, m);
      continue;
    }
    const float inverse = code_inverse(t.linear ? now.fresh[1] : now.fresh[0]);
    uint64_t codes = 0;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const float value = saturated(m[j]);
      const uint64_t byte =
          t.linear ? encode_linear(value, now.fresh[0], inverse) : encode_signed(code, value * inverse);
      codes |= byte << 8 * j;
    }
    store_codes(t.codes, piece.offset, piece.count, piece.whole, codes);
  }
}

}  // namespace

cudaError_t came8bit_pass(const Came8bitLaunch& a, cudaStream_t stream) {
  if (a.tiles == 0) return cudaSuccess;
  switch (a.phase) {
    case 0:
      return SANA_EXT_LAUNCH(came8bit_squares_kernel, a.tiles, kCame8bitThreads, kColumnBytes, stream, a);
    case 1:
      return SANA_EXT_LAUNCH(came8bit_norm_kernel, a.tiles, kCame8bitThreads, shared_size<float>(kWarps), stream, a);
    case 2:
      return SANA_EXT_LAUNCH(came8bit_residual_kernel, a.tiles, kCame8bitThreads, kColumnBytes + kCodeBytes, stream, a);
    default:
      return SANA_EXT_LAUNCH(came8bit_apply_kernel, a.tiles, kCame8bitThreads, kCodeBytes, stream, a);
  }
}

}  // namespace sana_ext::cuda
