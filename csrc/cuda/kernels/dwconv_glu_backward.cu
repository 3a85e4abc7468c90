// A block owns 32 channels of each half, up to 32 columns and a strip of rows; a warp owns 8 columns, a lane one
// channel of both halves. With s = silu(u), c = DW(s) + bias and dc its gradient, at row r:
//   1. rows of u and dout arrive in rings in shared memory by cp.async, two rows ahead; one barrier per row,
//   2. row r - 2 of dc is complete, and so are its neighbours' columns beside this warp's, which came through shared
//      memory: it is added into ds of rows r - 3, r - 2 and r - 1, and multiplied into the sums of dweight with those
//      rows of s; ds of row r - 3 is complete: du = ds * silu'(u) is stored,
//   3. row r of s is added into c of rows r - 1, r and r + 1; c of row r - 1 is complete: its gate gives dc.
// The sums c, ds, dweight and dbias stay in registers. s and silu'(u) of three rows wait in shared memory, where the
// thread that wrote them reads them back. Where an image has several tiles, the outer warps also compute dc of the
// column beside the tile. Bytes: u and dout once (but for the halo), du once. Per element of dout about 127
// instructions (bf16, sm_90), 54 of them FMAs of the three stencils: their issue, not memory, bounds this kernel.
#include "depthwise.cuh"

namespace sana_ext::cuda {
namespace {

constexpr int kStages = 3, kHaloU = 4, kHaloDout = 2, kChannels = kWarpSize;
constexpr int kRows = 3;          // of s and silu'(u) that wait
constexpr int kQuads = kRun / 4;  // four columns at once
constexpr int kSums = 20;         // per lane: nine taps and the bias, of both halves

struct Arguments {
  DwconvGluBackward a;
  DwconvGluCut cut;
};

// Elements of shared memory: of a row in a ring for a block of kDwconvGluWarps, and of what each warp keeps there.
constexpr int kRowU = (kDwconvGluWarps * kRun + kHaloU) * 2 * kChannels;
constexpr int kRowDout = (kDwconvGluWarps * kRun + kHaloDout) * kChannels;
constexpr int kWaitingRow = 2 * kRun * kChannels, kWaiting = kRows * kWaitingRow;
constexpr int kEdgeRow = 2 * 2 * kChannels, kEdges = 2 * kEdgeRow, kBeside = 2 * 2 * kChannels;

// Blocks on a multiprocessor at once. The predicates of a ragged W need registers, and fp32 as much shared memory as
// two.
template <class T, bool kWhole>
constexpr int kBlocks = kWhole && sizeof(T) == 2 ? 3 : 2;

// kWhole: W is a multiple of 8, so that a warp has all of its columns or none.
template <class T, bool kAligned, bool kWhole>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kWhole>) dwconv_glu_backward_kernel(Arguments args) {
  using CopyU = RowCopy<T, 2, kChannels, kHaloU, kAligned>;
  using CopyDout = RowCopy<T, 1, kChannels, kHaloDout, kAligned>;
  const DwconvGluBackward& a = args.a;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = args.cut.warps;
  const bool parameters = a.partial != nullptr;
  const DwconvGluPlace at(args.cut, a.H, kChannels);
  SharedMemory memory;
  const Shared<T> ring_u = memory.take<T>(kStages * kRowU);
  const Shared<T> ring_dout = memory.take<T>(kStages * kRowDout);
  const Shared<float> slopes = memory.take<float>(warps * kWaiting);
  const Shared<float> values = memory.take<float>(parameters ? warps * kWaiting : 0);
  const Shared<float> edges = memory.take<float>((warps + 2) * kEdges);
  const Shared<float> beside_sums = memory.take<float>(2 * kBeside);

  // Rows of dc: one more than the strip's on either side, inside the image. Rows of s: one more again, but zeros below
  // it.
  const int dc_begin = at.first > 0 ? at.first - 1 : 0, dc_end = at.last < a.H ? at.last + 1 : at.last;
  const int begin = at.first > 1 ? at.first - 2 : 0;
  CopyU copy_u(a.u, at.b * a.u_stride_b + begin * a.W * a.u_stride_n + at.channel, a.u_stride_n, a.F, a.F - at.channel,
               at.x - 2, warps * kRun + kHaloU, a.W, ring_u, kStages, kRowU);
  CopyDout copy_dout(a.dout, at.b * a.dout_stride_b + dc_begin * a.W * a.dout_stride_n + at.channel, a.dout_stride_n,
                     a.F, a.F - at.channel, at.x - 1, warps * kRun + kHaloDout, a.W, ring_dout, kStages, kRowDout);
  const auto fetch = [&](int r, int to) {  // row r of u and row r - 1 of dout
    if (r <= dc_end) {
      r < a.H ? copy_u(ring_u + to * kRowU) : copy_u.zero(ring_u + to * kRowU);
      r > dc_begin ? copy_dout(ring_dout + to * kRowDout) : copy_dout.zero(ring_dout + to * kRowDout);
    }
    copy_async_commit();
  };
  for (int to = 0; to < kStages - 1; ++to) fetch(begin + to, to);

  const int64_t channel = at.channel + lane;
  Taps<1> taps[2];
  for (int half = 0; half < 2; ++half) taps[half].load(a.weight, a.bias, half * a.F + channel, a.F - channel);
  float c_even[2][kRun], c_odd[2][kRun], ds_even[2][kRun], ds_odd[2][kRun], dc[2][kRun];
  float dweight[2][9], dbias[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int x = 0; x < kRun; ++x) {
      c_even[half][x] = c_odd[half][x] = taps[half].bias[0];
      ds_even[half][x] = ds_odd[half][x] = dc[half][x] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < 9; ++k) dweight[half][k] = 0.0f;
  }
  // This lane's first column of the strip's first row of du; `outputs` of the eight columns exist.
  const int64_t element = size_of(a.du.dtype), pixel = 2 * a.F * element;
  char* du =
      static_cast<char*>(a.du.data) + ((at.b * a.H + at.first) * a.W + at.x + warp * kRun) * pixel + channel * element;
  const int64_t inside = channel < a.F ? a.W - at.x - warp * kRun : 0;
  const int outputs = inside < kRun ? static_cast<int>(inside) : kRun;

  const auto waiting = [&](const Shared<float>& rows, int row, int half, int quad) {
    return rows + warp * kWaiting + lane * 4 + row * kWaitingRow + (half * kQuads + quad) * kWarpSize * 4;
  };
  const auto load_quad = [&](const Shared<float>& place, float (&v)[4]) {
    const Bytes16 w = load_shared16(place);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = bits_float(w.word[i]);
  };
  const auto store_quad = [&](const Shared<float>& place, const float (&v)[4]) {
    Bytes16 w;
#pragma unroll
    for (int i = 0; i < 4; ++i) w.word[i] = float_bits(v[i]);
    store_shared16(place, w);
  };
  // Column 0 (left) or 7 (right) of row y of dc, of warp -1 to `warps`: of the columns beside the tile, too.
  const auto edge = [&](int y, int of_warp, int right, int half) {
    return (of_warp + 1) * kEdges + lane + (y & 1) * kEdgeRow + (right * 2 + half) * kWarpSize;
  };

  // Above the first row all is zero. So are the rows of s beside the strip, in what dweight is summed from.
  const float zeros[4] = {};
  for (int i = 0; i < kWaiting / (4 * kWarpSize); ++i) {
    store_quad(slopes + warp * kWaiting + (i * kWarpSize + lane) * 4, zeros);
    if (parameters) store_quad(values + warp * kWaiting + (i * kWarpSize + lane) * 4, zeros);
  }
  for (int i = threadIdx.x; i < (warps + 2) * kEdges; i += blockDim.x) edges[i] = 0.0f;

  const auto in_strip = [&](int row) { return row >= at.first && row < at.last; };

  // Row y of dc into ds and dweight. `above` holds ds of row y - 1, which this completes, and then that of row y + 1;
  // rows y - 1, y and y + 1 of s wait in places oldest and the next two.
  const auto propagate = [&](int y, float (&above)[2][kRun], float (&here)[2][kRun], int oldest) {
    const int wanted = in_strip(y - 1) ? outputs : 0;
    const bool stored = wanted > 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto& w = taps[half].tap;
      float d[kRun + 2];
      d[0] = edges[edge(y, warp - 1, 1, half)], d[kRun + 1] = edges[edge(y, warp + 1, 0, half)];
#pragma unroll
      for (int x = 0; x < kRun; ++x) d[x + 1] = dc[half][x];
      if (parameters) {
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          const int row = oldest + i < kRows ? oldest + i : oldest + i - kRows;
#pragma unroll
          for (int quad = 0; quad < kQuads; ++quad) {
            float s[4];
            load_quad(waiting(values, row, half, quad), s);
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
              for (int j = 0; j < 3; ++j) dweight[half][3 * i + j] += s[n] * d[4 * quad + n + 2 - j];
          }
        }
        if (in_strip(y)) {
#pragma unroll
          for (int x = 0; x < kRun; ++x) dbias[half] += dc[half][x];
        }
      }
      char* to = du + half * a.F * element;
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        float slope[4];
        load_quad(waiting(slopes, oldest, half, quad), slope);
#pragma unroll
        for (int n = 0; n < 4; ++n, to += pixel) {
          const int x = 4 * quad + n;
          float below = 0.0f, complete = above[half][x];
#pragma unroll
          for (int j = 0; j < 3; ++j) {
            const float value = d[x + 2 - j];
            complete += w[j][0] * value;
            here[half][x] += w[3 + j][0] * value;
            below += w[6 + j][0] * value;
          }
          const float result[1] = {complete * slope[n]};
          if (kWhole ? stored : x < wanted) store_lane<T, kAligned>({to, a.du.dtype}, result);
          above[half][x] = below;
        }
      }
    }
    if (in_strip(y - 1)) du += a.W * pixel;
  };

  // Columns -1 and 8 * warps of a tile that has a neighbour there: row r of s into their c; then dc of row r - 1. The
  // sums are in shared memory, in two rows that change places. Left: the first warp; right: the last.
  const bool has_left = warp == 0 && at.x > 0, has_right = warp == warps - 1 && at.x + warps * kRun < a.W;
  const auto convolve_beside = [&](int r, int stage, int right) {
    const int first = right ? (warps * kRun + 1) : 0;  // where its copies begin
    float c[2];
    for (int half = 0; half < 2; ++half) {
      const auto& w = taps[half].tap;
      const int above = right * kBeside + (r + 1) % 2 * 2 * kChannels + half * kChannels + lane;
      const int here = right * kBeside + r % 2 * 2 * kChannels + half * kChannels + lane;
      const bool fresh = r == begin;
      c[half] = fresh ? taps[half].bias[0] : beside_sums[above];
      float sum = fresh ? taps[half].bias[0] : beside_sums[here], below = taps[half].bias[0];
      for (int j = 0; j < 3; ++j) {
        const int from = stage * kRowU + (first + j) * CopyU::kColumn + half * kChannels + lane;
        const float s = silu<T>(to_float(static_cast<T>(ring_u[from])));
        c[half] += w[6 + j][0] * s, sum += w[3 + j][0] * s, below += w[j][0] * s;
      }
      beside_sums[here] = sum, beside_sums[above] = below;
    }
    const float dh = to_float(static_cast<T>(ring_dout[stage * kRowDout + first * CopyDout::kColumn + lane]));
    const Silu g = silu_and_slope<T>(c[1]);
    const int of_warp = right ? warps : -1;
    edges[edge(r - 1, of_warp, 1 - right, 0)] = dh * g.value;
    edges[edge(r - 1, of_warp, 1 - right, 1)] = dh * c[0] * g.slope;
  };

  // Row r of s into c; then dc of row r - 1, whose c `above` holds. Row r of s waits in place `row`.
  const auto convolve = [&](int r, float (&above)[2][kRun], float (&here)[2][kRun], int stage, int row) {
    const Shared<T> u = ring_u + stage * kRowU + warp * kRun * CopyU::kColumn + lane;
    const Shared<T> dout = ring_dout + stage * kRowDout + warp * kRun * CopyDout::kColumn + lane;
    const bool summed = parameters && in_strip(r), skipped = parameters && !in_strip(r);
    float below[2][kRun], s[2][4], slope[2][4];
#pragma unroll
    for (int k = 0; k < kRun + 2; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto& w = taps[half].tap;
        const Silu silu = silu_and_slope<T>(to_float(static_cast<T>(u[(k + 1) * CopyU::kColumn + half * kChannels])));
#pragma unroll
        for (int j = 0; j < 3; ++j) {
          const int x = k - j;
          if (x < 0 || x >= kRun) continue;
          above[half][x] += w[6 + j][0] * silu.value;
          here[half][x] += w[3 + j][0] * silu.value;
          below[half][x] = (j == 0 ? taps[half].bias[0] : below[half][x]) + w[j][0] * silu.value;
        }
        if (k < 1 || k > kRun) continue;
        s[half][(k - 1) % 4] = silu.value, slope[half][(k - 1) % 4] = silu.slope;
        if (k % 4 != 0) continue;
        store_quad(waiting(slopes, row, half, k / 4 - 1), slope[half]);
        if (summed) store_quad(waiting(values, row, half, k / 4 - 1), s[half]);
        if (skipped) store_quad(waiting(values, row, half, k / 4 - 1), zeros);
      }
      if (k < 2) continue;
      const int x = k - 2;
      const float dh = to_float(static_cast<T>(dout[(x + 1) * CopyDout::kColumn]));
      const Silu g = silu_and_slope<T>(above[1][x]);
      dc[0][x] = dh * g.value, dc[1][x] = dh * above[0][x] * g.slope;
#pragma unroll
      for (int half = 0; half < 2; ++half) above[half][x] = below[half][x];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      edges[edge(r - 1, warp, 0, half)] = dc[half][0];
      edges[edge(r - 1, warp, 1, half)] = dc[half][kRun - 1];
    }
  };

  int stage = 0, row = 0;
  const auto step = [&](int r, float (&c_above)[2][kRun], float (&c_here)[2][kRun], float (&ds_above)[2][kRun],
                        float (&ds_here)[2][kRun]) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // row r of u and row r - 2 of dc have arrived, row r - 1 of u is read
    fetch(r + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    propagate(r - 2, ds_above, ds_here, row);
    convolve(r, c_above, c_here, stage, row);
    if (has_left) convolve_beside(r, stage, 0);
    if (has_right) convolve_beside(r, stage, 1);
    stage = stage == kStages - 1 ? 0 : stage + 1;
    row = row == kRows - 1 ? 0 : row + 1;
  };
  const auto swap = [](float (&one)[2][kRun], float (&other)[2][kRun]) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int x = 0; x < kRun; ++x) {
        const float value = one[half][x];
        one[half][x] = other[half][x], other[half][x] = value;
      }
  };
  for (int r = begin; r <= dc_end; r += 2) {  // two rows: the sums change places without a move
    step(r, c_even, c_odd, ds_even, ds_odd);
    if (r < dc_end)
      step(r + 1, c_odd, c_even, ds_odd, ds_even);
    else
      swap(ds_even, ds_odd);
  }
  // The last rows of ds. Below the image dc is zero.
  for (int y = dc_end - 1; y <= at.last; ++y) {
    __syncthreads();
    propagate(y, ds_even, ds_odd, row);
    swap(ds_even, ds_odd);
    row = row == kRows - 1 ? 0 : row + 1;
    if (y == at.last) break;
    for (int half = 0; half < 2; ++half) {
      for (int x = 0; x < kRun; ++x) dc[half][x] = 0.0f;
      for (int warp_and_beside = -1; warp_and_beside <= warps; ++warp_and_beside)
        if (warp == 0 && y < at.last)
          for (int right = 0; right < 2; ++right) edges[edge(y + 1, warp_and_beside, right, half)] = 0.0f;
    }
  }

  if (!parameters) return;
  __syncthreads();  // nobody reads `values` any more
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int k = 0; k < 10; ++k)
      values[(warp * kSums + half * 10 + k) * kWarpSize + lane] = k < 9 ? dweight[half][k < 9 ? k : 0] : dbias[half];
  __syncthreads();
  if (channel >= a.F) return;
  for (int k = warp; k < kSums; k += warps) {
    float total = 0.0f;
    for (int from = 0; from < warps; ++from) total += values[(from * kSums + k) * kWarpSize + lane];
    store_global(a.partial + (at.part * 10 + k % 10) * 2 * a.F + k / 10 * a.F + channel, total);
  }
}

constexpr int kSlices = 8;

// A block sums 32 channels of one tap, each warp every eighth partial sum.
__global__ void __launch_bounds__(kSlices* kWarpSize) dwconv_glu_sum_kernel(DwconvGluSums a) {
  SharedMemory memory;
  const Shared<float> slots = memory.take<float>(kSlices * kWarpSize);
  const int lane = threadIdx.x % kWarpSize, slice = threadIdx.x / kWarpSize;
  const int64_t k = blockIdx.x % 10, channel = static_cast<int64_t>(blockIdx.x) / 10 * kWarpSize + lane;
  float sum = 0.0f;
  if (channel < a.channels) {
#pragma unroll 4
    for (int64_t part = slice; part < a.parts; part += kSlices)
      sum += load_global(a.partial + (part * 10 + k) * a.channels + channel);
  }
  slots[slice * kWarpSize + lane] = sum;
  __syncthreads();
  if (slice != 0 || channel >= a.channels) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kSlices; ++i) total += slots[i * kWarpSize + lane];
  if (k < 9)
    store_element(a.dweight, channel * 9 + k, total);
  else if (a.dbias)
    store_element(a.dbias, channel, total);
}

template <class T, bool kAligned, bool kWhole>
cudaError_t launch_backward(const DwconvGluBackward& a, cudaStream_t stream) {
  const Arguments args{a, dwconv_glu_backward_cut(a.B, a.H, a.W, a.F)};
  const int warps = args.cut.warps;
  const size_t shared = shared_size<T>(kStages * kRowU) + shared_size<T>(kStages * kRowDout) +
                        shared_size<float>((a.partial ? 2 : 1) * warps * kWaiting) +
                        shared_size<float>((warps + 2) * kEdges) + shared_size<float>(2 * kBeside);
  return SANA_EXT_LAUNCH((dwconv_glu_backward_kernel<T, kAligned, kWhole>), static_cast<unsigned>(args.cut.blocks(a.B)),
                         static_cast<unsigned>(warps * kWarpSize), shared, stream, args);
}

template <class T>
cudaError_t launch_aligned(const DwconvGluBackward& a, cudaStream_t stream) {
  return a.W % kRun == 0 ? launch_backward<T, true, true>(a, stream) : launch_backward<T, true, false>(a, stream);
}

}  // namespace

cudaError_t dwconv_glu_backward(const DwconvGluBackward& a, cudaStream_t stream) {
  if (a.B == 0 || a.F == 0) return cudaSuccess;
  const bool aligned = takes_copies(a.u, a.u_stride_b, a.u_stride_n) && takes_copies(a.du, a.F, a.F) &&
                       takes_copies(a.dout, a.dout_stride_b, a.dout_stride_n);
  if (!aligned) return launch_backward<float, false, false>(a, stream);
  if (a.u.dtype == Dtype::kBFloat16) return launch_aligned<BFloat16>(a, stream);
  if (a.u.dtype == Dtype::kFloat16) return launch_aligned<Half>(a, stream);
  return launch_aligned<float>(a, stream);
}

cudaError_t dwconv_glu_sums(const DwconvGluSums& a, cudaStream_t stream) {
  if (a.channels == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((a.channels + kWarpSize - 1) / kWarpSize * 10);
  return SANA_EXT_LAUNCH(dwconv_glu_sum_kernel, blocks, kSlices * kWarpSize, shared_size<float>(kSlices * kWarpSize),
                         stream, a);
}

}  // namespace sana_ext::cuda
