// The emulator: good kernels against plain loops, and the same kernels with planted mistakes, each of which must be
// found, whatever the order of the threads.
#include <functional>
#include <string>

#include "check_test.h"
#include "emulator_kernels.cuh"

namespace sana_ext::test {
namespace {

using namespace cuda;  // NOLINT: the kernels under test
using emulator::Fault;
using emulator::GlobalMemory;

constexpr int kSeeds = 8;

template <class T>
struct Array {
  std::vector<T> data;
  GlobalMemory known;
  Array(const char* name, size_t count, bool writable)
      : data(count), known(name, data.data(), count * sizeof(T), writable) {
    if (writable) std::memset(static_cast<void*>(data.data()), 0xff, count * sizeof(T));
  }
};

template <Plant kPlant>
void sum(int64_t n) {
  const int64_t per_block = 200, blocks = (n + per_block - 1) / per_block;
  Random random(3);
  Array<float> x("x", static_cast<size_t>(n), false), sums("sums", static_cast<size_t>(blocks), true);
  for (float& v : x.data) v = random();
  const SumArgs a{n, per_block, x.data.data(), sums.data.data()};
  SANA_EXT_LAUNCH(sum_kernel<kPlant>, dim3(static_cast<unsigned>(blocks)), dim3(128), shared_size<float>(4), nullptr,
                  a);
  for (int64_t b = 0; b < blocks; ++b) {
    double expected = 0;
    for (int64_t i = b * per_block; i < n && i < (b + 1) * per_block; ++i) expected += x.data[static_cast<size_t>(i)];
    CHECK_CLOSE(sums.data[static_cast<size_t>(b)], expected, 1e-4);
  }
}

template <Plant kPlant>
void transpose(int rows, int columns) {
  const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(columns);
  Array<float> x("x", count, false), y("y", count, true);
  for (size_t i = 0; i < count; ++i) x.data[i] = static_cast<float>(i);
  const TransposeArgs a{rows, columns, x.data.data(), y.data.data()};
  const auto tiles = [](int n) { return static_cast<unsigned>((n + kTransposeTile - 1) / kTransposeTile); };
  SANA_EXT_LAUNCH(transpose_kernel<kPlant>, dim3(tiles(columns), tiles(rows)), dim3(32, 8),
                  shared_size<float>(kTransposeTile * (kTransposeTile + 1)), nullptr, a);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c)
      CHECK(y.data[static_cast<size_t>(c * rows + r)] == x.data[static_cast<size_t>(r * columns + c)]);
}

template <class T, Plant kPlant>
void gemm(int M, int N, int K) {
  Random random(5);
  Array<T> x("a", static_cast<size_t>(M * K), false), y("b", static_cast<size_t>(K * N), false);
  Array<float> z("c", static_cast<size_t>(M * N), true);
  for (auto* array : {&x, &y})
    for (T& v : array->data) v = from_float<T>(random());
  const GemmArgs<T> g{M, N, K, x.data.data(), y.data.data(), z.data.data()};
  const auto tiles = [](int n) { return static_cast<unsigned>((n + kGemmTile - 1) / kGemmTile); };
  SANA_EXT_LAUNCH((gemm_kernel<T, kPlant>), dim3(tiles(N), tiles(M)), dim3(128), kGemmShared<T>, nullptr, g);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      double expected = 0;
      for (int k = 0; k < K; ++k)
        expected += double{to_float(x.data[static_cast<size_t>(m * K + k)])} *
                    double{to_float(y.data[static_cast<size_t>(k * N + n)])};
      CHECK_CLOSE(z.data[static_cast<size_t>(m * N + n)], expected, 1e-4);
    }
  }
}

template <Plant kPlant>
void warp() {
  Array<Bytes16> matrix("matrix", 32, false);
  Array<uint32_t> out("out", 32 * kWarpResults, true);
  const auto element = [](int row, int column) { return static_cast<uint32_t>(row * 8 + column); };
  for (int row = 0; row < 32; ++row)
    for (int i = 0; i < 4; ++i)
      matrix.data[static_cast<size_t>(row)].word[i] = element(row, 2 * i) | element(row, 2 * i + 1) << 16;
  const WarpArgs a{matrix.data[0].word, out.data.data()};
  SANA_EXT_LAUNCH(warp_kernel<kPlant>, dim3(1), dim3(64), shared_size<Half>(32 * 8) + shared_size<uint32_t>(32),
                  nullptr, a);
  for (unsigned lane = 0; lane < 32; ++lane) {
    const uint32_t* r = out.data.data() + lane * kWarpResults;
    const int row = static_cast<int>(lane / 4), column = static_cast<int>(lane % 4 * 2);
    int k = 0;
    CHECK(r[k++] == (lane ^ 5));
    CHECK(r[k++] == (lane < 3 ? lane : lane - 3));
    CHECK(r[k++] == (lane % 8 < 5 ? lane + 3 : lane));
    CHECK(r[k++] == 9);
    CHECK(r[k++] == 0x49249249u);
    CHECK(r[k++] == 1);
    CHECK(r[k++] == 0);
    CHECK(r[k++] == 496);
    CHECK(r[k++] == (lane < 16 ? 120u : 16u));
    for (const int first : {0, 0, 8, 0, 8, 16, 24})
      CHECK(r[k++] == (element(first + row, column) | element(first + row, column + 1) << 16));
    for (const int first : {0, 0, 8, 0, 8, 16, 24})
      CHECK(r[k++] == (element(first + column, row) | element(first + column + 1, row) << 16));
    CHECK(r[k++] == (31 - lane) * (31 - lane));
    CHECK(r[k++] == 64);
    CHECK(r[k++] == (element(static_cast<int>(lane), 2) | element(static_cast<int>(lane), 3) << 16));
    const double x = lane - 15.5;
    for (const auto& [value, error] : {std::pair{std::tanh(x), 0x1p-11}, {std::exp2(x), 0x1p-21}, {1 / x, 0x1p-21}})
      CHECK_CLOSE(bits_float(r[k++]), value, std::abs(value) * error);
    const float whole = static_cast<float>(lane) - 4.0f, positive = whole > 0 ? whole : 0,
                negative = whole < 0 ? -whole : 0;
    CHECK(r[k++] == (float_to_bfloat16(positive) | static_cast<uint32_t>(float_to_bfloat16(negative)) << 16));
    CHECK(std::isnan(half_to_float(static_cast<uint16_t>(r[k]))));
    CHECK(r[k++] >> 16 == float_to_half(positive));
    CHECK(k == kWarpResults);
  }
}

// The kernel must fail, for every seed, with a message that says `what`, names the kernel and a thread.
void must_fail(const char* what, const char* kernel, const std::function<void()>& run) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    emulator::set_seed(static_cast<uint64_t>(seed));
    std::string message = "no fault was found";
    const int before = failures;
    try {
      run();
    } catch (const Fault& fault) {
      message = fault.what();
    }
    failures = before;  // a wrong result alone does not count as found
    const auto says = [&](const char* part) { return message.find(part) != std::string::npos; };
    const bool found = says(what) && says(kernel) && says("block (") && says("thread (");
    if (!found) std::printf("expected \"%s\" of %s, seed %d: %s\n", what, kernel, seed, message.c_str());
    CHECK(found);
    if (seed == 0) std::printf("  %s\n", message.c_str());
  }
}

void good_kernels() {
  for (int seed = 0; seed < kSeeds; ++seed) {
    emulator::set_seed(static_cast<uint64_t>(seed));
    for (const int64_t n : {1, 200, 1003}) sum<Plant::kNothing>(n);
    transpose<Plant::kNothing>(32, 32);
    transpose<Plant::kNothing>(37, 70);
    gemm<BFloat16, Plant::kNothing>(32, 32, 64);
    gemm<Half, Plant::kNothing>(37, 40, 72);
    gemm<BFloat16, Plant::kNothing>(1, 8, 8);
    warp<Plant::kNothing>();
  }
}

void planted_faults() {
  must_fail("reads shared memory", "sum_kernel", [] { sum<Plant::kMissingBarrier>(1003); });
  must_fail("of x, which has 4012 bytes", "sum_kernel", [] { sum<Plant::kGlobalOutOfBounds>(1003); });
  must_fail("out of bounds: element 4 of a shared array of 4", "sum_kernel",
            [] { sum<Plant::kSharedOutOfBounds>(1003); });
  must_fail("divergent barrier", "sum_kernel", [] { sum<Plant::kDivergentBarrier>(1003); });
  must_fail("the kernel", "sum_kernel", [] { sum<Plant::kEarlyExit>(1003); });
  must_fail("waits for lane 5", "sum_kernel", [] { sum<Plant::kMissingLane>(1003); });
  must_fail("which nobody has written", "sum_kernel", [] { sum<Plant::kUninitialised>(1003); });
  must_fail("which another block of this launch writes", "sum_kernel", [] { sum<Plant::kSharedOutput>(1003); });
  must_fail("to x, which is an input", "sum_kernel", [] { sum<Plant::kWritesInput>(1003); });
  must_fail("reads shared memory", "transpose_kernel", [] { transpose<Plant::kMissingBarrier>(32, 32); });
  must_fail("which nobody has written", "transpose_kernel", [] { transpose<Plant::kOffByOneIndex>(32, 32); });
  must_fail("which nobody has written", "transpose_kernel", [] { transpose<Plant::kUninitialised>(37, 70); });
  must_fail("a wait is missing", "gemm_kernel", [] { gemm<BFloat16, Plant::kMissingWait>(32, 32, 64); });
  must_fail("shared memory", "gemm_kernel", [] { gemm<BFloat16, Plant::kMissingBarrier>(32, 32, 64); });
  must_fail("out of bounds: read of 16 bytes", "gemm_kernel",
            [] { gemm<Half, Plant::kGlobalOutOfBounds>(37, 40, 72); });
  must_fail("no multiple of 16", "gemm_kernel", [] { gemm<Half, Plant::kMisaligned>(32, 32, 64); });
  must_fail("shared memory", "warp_kernel", [] { warp<Plant::kMissingBarrier>(); });
  must_fail("reads shared memory", "warp_kernel", [] { warp<Plant::kMissingWait>(); });
}

void limits() {
  const auto says = [](const char* what, dim3 block, size_t shared_bytes) {
    try {
      emulator::launch("nothing", 1, block, shared_bytes, nullptr, [] {});
    } catch (const Fault& fault) {
      return std::string(fault.what()).find(what) != std::string::npos;
    }
    return *what == '\0';
  };
  CHECK(says("a block of 2048 threads", dim3(64, 32), 0));
  CHECK(says("", 32, 99 << 10));
  CHECK(says("the limit is 101376", 32, (99 << 10) + 1));
  for (const auto& [architecture, kib] : {std::pair{80, 163}, {89, 99}, {90, 227}}) {
    emulator::set_architecture(architecture);
    CHECK(says("", 32, static_cast<size_t>(kib) << 10));
    CHECK(says("bytes of shared memory; the limit is", 32, (static_cast<size_t>(kib) << 10) + 1));
  }
  emulator::set_architecture(0);
}

void tests() {
  good_kernels();
  planted_faults();
  limits();
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
