#include "adamw8bit.h"

#include "../../common/rounding.h"
#include "code8_vec.h"

namespace sana_ext::cpu::SANA_EXT_ISA {
namespace {

constexpr int64_t kBlock = kAdamW8bitBlock;

SANA_EXT_INLINE Vec<float> square_root(Vec<float> v) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)v);
#elif defined(__x86_64__)
  return (Vec<float>)_mm_sqrt_ps((__m128)v);
#elif defined(__aarch64__)
  return (Vec<float>)vsqrtq_f32((float32x4_t)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// The tensor that block `item` belongs to.
const AdamW8bitTensor* find(const AdamW8bitTensor* tensors, int64_t count, int64_t item) {
  int64_t low = 0;
  while (count > 1) {
    const int64_t half = count / 2;
    if (tensors[low + half].first_block <= item)
      low += half, count -= half;
    else
      count = half;
  }
  return tensors + low;
}

// Calls f(tensor, first element, elements) for each of the blocks [begin, end).
template <class F>
SANA_EXT_INLINE void for_each_block(const AdamW8bitTensor* tensors, int64_t count, int64_t begin, int64_t end,
                                    const F& f) {
  if (begin >= end) return;
  const AdamW8bitTensor* t = find(tensors, count, begin);
  for (int64_t item = begin; item < end; ++item) {
    int64_t at = (item - t->first_block) * kBlock;
    if (at >= t->n) ++t, at = 0;
    f(*t, at, t->n - at < kBlock ? t->n - at : kBlock);
  }
}

// The block after the next one: arithmetic is long enough that the processor does not look that far ahead by itself.
SANA_EXT_INLINE void prefetch(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i);
}
SANA_EXT_INLINE void prefetch(const AdamW8bitTensor& t, int64_t at) {
  if (at + kBlock > t.n) return;
  const int64_t p = size_of(t.p.dtype), g = size_of(t.g.dtype), state = t.absmax1 == nullptr ? 4 : 1;
  prefetch(static_cast<const char*>(t.p.data) + at * p, kBlock * p);
  prefetch(static_cast<const char*>(t.g.data) + at * g, kBlock * g);
  prefetch(static_cast<const char*>(t.state1) + at * state, kBlock * state);
  prefetch(static_cast<const char*>(t.state2) + at * state, kBlock * state);
}

// A block in fp32, filled up with zeros: they change neither sums nor scales.
struct alignas(64) Block {
  float p[kBlock], g[kBlock], m[kBlock], v[kBlock];
  uint8_t codes[kBlock];
};

SANA_EXT_INLINE void load_block(float* to, ConstPtr from, int64_t at, int64_t n) {
  with_type<float>(from.dtype, from.data, [&](const auto* source) {
    for_each(n,
             [&](auto lanes, int64_t i) SANA_EXT_LAMBDA_INLINE { lanes.store(to + i, lanes.load(source + at + i)); });
  });
  if (n < kBlock) zero(to + n, kBlock - n);
}

template <bool kSigned>
SANA_EXT_INLINE void load_state(float* to, Block& b, const void* state, const float* absmax, int64_t at, int64_t n) {
  if (absmax == nullptr) {
    std::memcpy(to, static_cast<const float*>(state) + at, static_cast<size_t>(n) * sizeof(float));
    if (n < kBlock) zero(to + n, kBlock - n);
    return;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(state) + at;
  if (n < kBlock) {
    std::memset(b.codes, kSigned ? kCodeZero : 0, sizeof b.codes);
    std::memcpy(b.codes, codes, static_cast<size_t>(n));
    codes = b.codes;
  }
  const float scale = absmax[at / kBlock];
  const float* table = kSigned ? kSignedTable.value : kUnsignedCode.magnitude;
  for (int64_t i = 0; i < kBlock; i += kLanes) store(to + i, look_up(table, load_bytes(codes + i)) * scale);
}

// Leaves the values finite.
template <bool kSigned>
SANA_EXT_INLINE void store_state(void* state, float* absmax, Block& b, float* from, int64_t at, int64_t n,
                                 bool keep_sign) {
  if (absmax == nullptr) {
    std::memcpy(static_cast<float*>(state) + at, from, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  Vec<float> top[4] = {};
  for (int64_t i = 0; i < kBlock; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      auto x = at_most(at_least(load(from + i + j * kLanes), -kCodeLargest), kCodeLargest);
      x = x == x ? x : Vec<float>{};
      store(from + i + j * kLanes, x);
      const auto magnitude = reinterpret_cast<Vec<float>>(reinterpret_cast<Vec<uint32_t>>(x) & 0x7fffffffu);
      top[j] = magnitude > top[j] ? magnitude : top[j];
    }
  }
  for (int j = 1; j < 4; ++j) top[0] = top[j] > top[0] ? top[j] : top[0];
  float lanes[kLanes];
  store(lanes, top[0]);
  float largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  const float scale = kSigned ? code_scale(largest) : unsigned_code_scale(largest), inverse = code_inverse(scale);
  absmax[at / kBlock] = scale;
  uint8_t* codes = n < kBlock ? b.codes : static_cast<uint8_t*>(state) + at;
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const auto x = load(from + i);
    store_bytes(codes + i, kSigned ? encode_signed(x * inverse) : encode_unsigned(x, inverse));
  }
  if (keep_sign)
    for (int64_t i = 0; i < n; ++i) codes[i] = codes[i] == kCodeZero && from[i] < 0 ? kCodeZero - 1 : codes[i];
  if (n < kBlock) std::memcpy(static_cast<uint8_t*>(state) + at, codes, static_cast<size_t>(n));
}

SANA_EXT_INLINE void store_parameter(Ptr to, const float* p, int64_t at, int64_t n, int64_t seed) {
  if (to.dtype != Dtype::kBFloat16 || seed < 0) return store_row<float>(to, at, n, p);
  uint16_t* target = static_cast<uint16_t*>(to.data) + at;
  for (int64_t i = 0; i < n; ++i)
    target[i] =
        float_to_bfloat16_by_chance(p[i], random_bits(static_cast<uint32_t>(at + i), static_cast<uint32_t>(seed)));
}

// Beside an m that is not 0, v is at least `least`.
SANA_EXT_INLINE void update(float* p, const float* g_at, float* m_at, float* v_at, float least, const AdamW8bitHyper& h,
                            bool after, bool bf16) {
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const auto g = load(g_at + i) * h.factor, old_m = load(m_at + i);
    auto old_v = load(v_at + i);
    old_v = old_m != 0.0f ? at_least(old_v, least) : old_v;
    const auto m = old_m * h.beta1 + g * h.rest1, v = old_v * h.beta2 + g * g * h.rest2;
    store(m_at + i, m);
    store(v_at + i, v);
    const auto step = m / (square_root(v) * h.root + h.eps) * h.size;
    store(p + i, after ? load(p + i) - step : load(p + i) * h.keep - step);
  }
  if (!after) return;
  for (int64_t i = 0; i < kBlock; ++i) p[i] = (bf16 ? bfloat16_to_float(float_to_bfloat16(p[i])) : p[i]) * h.keep;
}

}  // namespace

void adamw8bit_step(const AdamW8bit& a, int64_t begin, int64_t end) {
  Block b;
  for_each_block(a.tensors, a.count, begin, end, [&](const AdamW8bitTensor& t, int64_t at, int64_t n) {
    prefetch(t, at + 2 * kBlock);
    // Whole fp32 blocks are read and written where they are.
    const bool direct_p = t.p.dtype == Dtype::kFloat32 && n == kBlock,
               direct_g = t.g.dtype == Dtype::kFloat32 && n == kBlock;
    float* p = direct_p ? static_cast<float*>(t.p.data) + at : b.p;
    const float* g = direct_g ? static_cast<const float*>(t.g.data) + at : b.g;
    if (!direct_p) load_block(b.p, t.p, at, n);
    if (!direct_g) load_block(b.g, t.g, at, n);
    load_state<true>(b.m, b, t.state1, t.absmax1, at, n);
    load_state<false>(b.v, b, t.state2, t.absmax2, at, n);
    const float least = t.absmax2 == nullptr ? 0.0f : kUnsignedCode.magnitude[1] * t.absmax2[at / kBlock];
    update(p, g, b.m, b.v, least, t.h, a.bitsandbytes_cuda, t.p.dtype == Dtype::kBFloat16);
    if (!direct_p) store_parameter(t.p, b.p, at, n, t.seed);
    store_state<true>(t.state1, t.absmax1, b, b.m, at, n, a.bitsandbytes_cuda);
    store_state<false>(t.state2, t.absmax2, b, b.v, at, n, false);
  });
}

void adamw8bit_check(const AdamW8bitCheck& a, int64_t begin, int64_t end) {
  bool found = false;
  for_each_block(a.tensors, a.count, begin, end, [&](const AdamW8bitTensor& t, int64_t at, int64_t n) {
    with_type<float>(t.g.dtype, t.g.data, [&](const auto* g) {
      Vec<float> whole{};  // NaN as soon as a product is not finite: 0 * infinity
      float one = 0;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) whole += load(g + at + i) * a.factor * 0.0f;
      for (; i < n; ++i) one += load_one(g + at + i) * a.factor * 0.0f;
      const float sum = sum_lanes<float>(whole) + one;
      found = found || sum != sum;
    });
  });
  if (found) __atomic_store_n(a.found, 1, __ATOMIC_RELAXED);
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
