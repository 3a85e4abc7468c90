// A block owns 64 channels of each half (fp32: 32), up to 32 columns and a strip of rows, and marches down the strip.
// A warp owns 8 columns; a lane owns one 32-bit word of each half: two neighbouring 16-bit channels, or one of fp32.
//   1. rows of u arrive in a ring in shared memory by cp.async, kStages - 1 rows ahead; one barrier per row,
//   2. a lane reads row r of its 8 columns and the two beside them, takes SiLU, and adds the row into the sums of the
//      output rows r - 1, r and r + 1, which live in registers: an element is read and unpacked once, not nine times,
//   3. row r - 1 is complete: gate, store.
// SiLU is taken again for the columns beside a run and for the rows beside a strip. That is a quarter more of it than
// needed and still cheaper than a ring of silu(u): three instructions per element against five for a way through shared
// memory and one more barrier. Bytes: u once (but for the halo), out once. Per output 42 instructions (bf16, sm_90), 18
// of them the taps' FMAs. Generic, for rows that 16-byte copies do not reach: the same with a ring of fp32, filled
// through registers.
#include "depthwise.cuh"

namespace sana_ext::cuda {
namespace {

constexpr int kStages = 4, kHalo = 2;

struct Arguments {
  DwconvGluForward a;
  DwconvGluCut cut;
};

template <class T>
constexpr int kLaneChannels = 4 / sizeof(T);
template <class T>
constexpr int kBlockChannels = kLaneChannels<T> * kWarpSize;

template <class T>
SANA_EXT_HOST_DEVICE int ring_elements(int warps) {
  return kStages * (warps * kRun + kHalo) * 2 * kBlockChannels<T>;
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) dwconv_glu_forward_kernel(Arguments args) {
  constexpr int kLane = kLaneChannels<T>, kChannels = kBlockChannels<T>;
  using Copy = RowCopy<T, 2, kChannels, kHalo, kAligned>;
  const DwconvGluForward& a = args.a;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const DwconvGluPlace at(args.cut, a.H, kChannels);
  SharedMemory memory;
  const Shared<T> ring = memory.take<T>(ring_elements<T>(args.cut.warps));
  const int columns = args.cut.warps * kRun + kHalo, row_elements = columns * Copy::kColumn;
  const int begin = at.first > 0 ? at.first - 1 : 0, end = at.last < a.H ? at.last + 1 : at.last;  // rows of u to read
  Copy copy(a.u, at.b * a.u_stride_b + begin * a.W * a.u_stride_n + at.channel, a.u_stride_n, a.F, a.F - at.channel,
            at.x - 1, columns, a.W, ring, kStages, row_elements);
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (begin + stage < end) copy(ring + stage * row_elements);
    copy_async_commit();
  }

  const int64_t channel = at.channel + lane * kLane;
  Taps<kLane> taps[2];
  for (int half = 0; half < 2; ++half) taps[half].load(a.weight, a.bias, half * a.F + channel, a.F - channel);
  float even[2][kRun][kLane], odd[2][kRun][kLane];  // sums of output rows, at first begin - 1 and begin
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int x = 0; x < kRun; ++x)
#pragma unroll
      for (int l = 0; l < kLane; ++l) even[half][x][l] = odd[half][x][l] = taps[half].bias[l];

  // This lane's first column of the strip's first output row; `outputs` of the eight columns exist.
  const int64_t pixel = a.F * size_of(a.out.dtype), first = (at.b * a.H + at.first) * a.W + at.x + warp * kRun;
  char* out = static_cast<char*>(a.out.data) + first * pixel + channel * size_of(a.out.dtype);
  const int64_t inside = channel < a.F ? a.W - at.x - warp * kRun : 0;
  const int outputs = inside < kRun ? static_cast<int>(inside) : kRun;

  // Column x of one output row, whose sums are complete.
  const auto finish = [&](const float (&sums)[2][kRun][kLane], int x, char* to, int wanted) {
    float h[kLane];
#pragma unroll
    for (int l = 0; l < kLane; ++l) h[l] = sums[0][x][l] * silu<T>(sums[1][x][l]);
    if (x < wanted) store_lane<T, kAligned>({to, a.out.dtype}, h);
  };

  // Row r of u: completes `above`, the sums of output row r - 1; then these registers take the sums of row r + 1.
  int stage = 0;
  const auto step = [&](int r, float (&above)[2][kRun][kLane], float (&here)[2][kRun][kLane]) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // row r has arrived, row r - 1 is read
    const int ahead = stage == 0 ? kStages - 1 : stage - 1;
    if (r + kStages - 1 < end) copy(ring + ahead * row_elements);
    copy_async_commit();
    const Shared<T> row = ring + stage * row_elements + warp * kRun * Copy::kColumn + lane * kLane;
    stage = stage == kStages - 1 ? 0 : stage + 1;
    float below[2][kRun][kLane];
    char* to = out;
    const int wanted = r > at.first ? outputs : 0;
#pragma unroll
    for (int k = 0; k < kRun + kHalo; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto& w = taps[half].tap;
        float s[kLane];
        load_lane(row + k * Copy::kColumn + half * kChannels, s);
#pragma unroll
        for (int l = 0; l < kLane; ++l) {
          s[l] = silu<T>(s[l]);
#pragma unroll
          for (int j = 0; j < 3; ++j) {
            const int x = k - j;
            if (x < 0 || x >= kRun) continue;
            above[half][x][l] += w[6 + j][l] * s[l];
            here[half][x][l] += w[3 + j][l] * s[l];
            below[half][x][l] = (j == 0 ? taps[half].bias[l] : below[half][x][l]) + w[j][l] * s[l];
          }
        }
      }
      if (k < kHalo) continue;
      const int x = k - kHalo;
      finish(above, x, to, wanted);
      to += pixel;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int l = 0; l < kLane; ++l) above[half][x][l] = below[half][x][l];
    }
    if (r > at.first) out += a.W * pixel;
  };
  for (int r = begin; r < end; r += 2) {  // two rows: the sums change places without a move
    step(r, even, odd);
    if (r + 1 < end) step(r + 1, odd, even);
  }
  if (end > at.last) return;
  const bool last_is_odd = (end - begin) % 2 != 0;  // at the image's lower border nothing comes below the last row
#pragma unroll
  for (int x = 0; x < kRun; ++x, out += pixel)
    last_is_odd ? finish(odd, x, out, outputs) : finish(even, x, out, outputs);
}

template <class T, bool kAligned>
cudaError_t launch_forward(const DwconvGluForward& a, cudaStream_t stream) {
  const DwconvGluCut cut = dwconv_glu_cut(a.B, a.H, a.W, a.F, kBlockChannels<T>, a.H);
  const Arguments args{a, cut};
  const auto threads = static_cast<unsigned>(cut.warps * kWarpSize);
  return SANA_EXT_LAUNCH((dwconv_glu_forward_kernel<T, kAligned>), static_cast<unsigned>(cut.blocks(a.B)), threads,
                         shared_size<T>(ring_elements<T>(cut.warps)), stream, args);
}

}  // namespace

cudaError_t dwconv_glu_forward(const DwconvGluForward& a, cudaStream_t stream) {
  if (a.B == 0 || a.F == 0) return cudaSuccess;
  const bool aligned = takes_copies(a.u, a.u_stride_b, a.u_stride_n) && takes_copies(a.out, a.F, a.F);
  if (!aligned) return launch_forward<float, false>(a, stream);
  if (a.u.dtype == Dtype::kBFloat16) return launch_forward<BFloat16, true>(a, stream);
  if (a.u.dtype == Dtype::kFloat16) return launch_forward<Half, true>(a, stream);
  return launch_forward<float, true>(a, stream);
}

}  // namespace sana_ext::cuda
