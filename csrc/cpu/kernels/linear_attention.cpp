#include "linear_attention.h"

#include "linear_attention_tile.h"
#include "stream.h"
#include "vec.h"

namespace sana_ext::cpu::SANA_EXT_ISA {
namespace {

template <class A, int kD>
void state(const LinearAttentionState& a, int64_t begin, int64_t end) {
  const int64_t N = a.size.N, H = a.size.H, D = kD > 0 ? kD : a.size.D, P = kD > 0 ? kD : a.size.P;
  const int64_t chunks = (N + a.size.chunk - 1) / a.size.chunk, state_size = (D + 1) * P;
  Scratch<A> weights(H * P), khat(kLinearAttentionBlock * P), values(kLinearAttentionBlock * P);
  load_weights(a.weight_k, a.size, weights.data());
  A ones[kLinearAttentionBlock];
  for (A& one : ones) one = A(1);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / chunks, first = item % chunks * a.size.chunk;
    const int64_t last = first + a.size.chunk < N ? first + a.size.chunk : N;
    A* states = static_cast<A*>(a.partial) + item * H * state_size;
    for (int64_t n = first; n < last; n += kLinearAttentionBlock) {
      const int64_t tokens = last - n < kLinearAttentionBlock ? last - n : kLinearAttentionBlock;
      const A* scale = ones;
      if (a.weight_k) {
        A* rstd = static_cast<A*>(a.rstd_k) + b * N + n;
        row_rstd(a.k, a.size, b, n, tokens, a.norm_eps, rstd);
        scale = rstd;
      }
      for (int64_t h = 0; h < H; ++h) {
        A *S = states + h * state_size, *z = S + D * P;
        const A* weight = weights.data() + h * P;
        read_head<A>(a.k, b, n, h, tokens, D, P, [&](int64_t t, int64_t c, Vec<A> k) SANA_EXT_LAMBDA_INLINE {
          k = relu<A>(k * load(weight + c) * scale[t]);
          store(khat.data() + t * P + c, k);
        });
        read_head<A>(a.v, b, n, h, tokens, D, P, [&](int64_t t, int64_t c, Vec<A> v) SANA_EXT_LAMBDA_INLINE {
          store(values.data() + t * P + c, v);
        });
        for (int64_t c = 0; c < P; c += kLanes) {
          Vec<A> total = n == first ? Vec<A>{} : load(z + c);
          for (int64_t t = 0; t < tokens; ++t) total += load(khat.data() + t * P + c);
          store(z + c, total);
        }
        accumulate(khat.data(), values.data(), S, tokens, D, P, n == first);
      }
    }
  }
}

template <class A>
void sum(const LinearAttentionSum& a, int64_t begin, int64_t end) {
  const int64_t H = a.size.H, D = a.size.D, P = a.size.P, width = a.width;
  Scratch<A> total_scratch((D + 1) * P);
  A* total = total_scratch.data();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / H, h = item % H;
    zero(total, (D + 1) * P);
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
      const A* part = static_cast<const A*>(a.partial) + ((b * a.chunks + chunk) * H + h) * (D + 1) * width;
      for (int64_t i = 0; i <= D; ++i)
        for (int64_t c = 0; c < D; c += kLanes)
          store(total + i * P + c, load(total + i * P + c) + load_part<A>(part + i * width + c, D - c));
    }
    if (a.state != nullptr)
      for (int64_t i = 0; i <= D; ++i)
        std::memcpy(static_cast<A*>(a.state) + (item * (D + 1) + i) * D, total + i * P,
                    static_cast<size_t>(D) * sizeof(A));
    if (a.padded != nullptr)
      std::memcpy(static_cast<A*>(a.padded) + item * (D + 1) * P, total, static_cast<size_t>((D + 1) * P) * sizeof(A));
    if (a.transposed != nullptr) {
      A* out = static_cast<A*>(a.transposed) + item * D * P;
      for (int64_t j = 0; j < D; ++j)
        for (int64_t i = 0; i < P; ++i) out[j * P + i] = i < D ? total[i * P + j] : A(0);
    }
  }
}

template <class A, int kD>
void output(const LinearAttentionOutput& a, int64_t begin, int64_t end) {
  const int64_t N = a.size.N, H = a.size.H, D = kD > 0 ? kD : a.size.D, P = kD > 0 ? kD : a.size.P;
  const int64_t blocks = (N + kLinearAttentionBlock - 1) / kLinearAttentionBlock;
  Scratch<A> weights(H * P), qhat(kLinearAttentionBlock * P);
  zero(qhat.data(), kLinearAttentionBlock * P);  // rows past the last token are summed, too
  load_weights(a.weight_q, a.size, weights.data());
  const LinearAttentionRows<Ptr> out{a.out, N * H * D, H * D, D};
  const bool streaming = streams(a.out, D, a.size.B * N * H * D);
  A extra[kLinearAttentionBlock], scale[kLinearAttentionBlock];
  for (A& e : extra) e = a.weight_q ? A(0) : A(a.eps);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks, n = item % blocks * kLinearAttentionBlock;
    const int64_t tokens = N - n < kLinearAttentionBlock ? N - n : kLinearAttentionBlock;
    if (a.weight_q) {
      // A NaN makes NaN of the whole token, an infinity of its channel: the norm's scale is then NaN or 0.
      A* rstd = a.rstd_q != nullptr ? static_cast<A*>(a.rstd_q) + b * N + n : scale;
      row_rstd(a.q, a.size, b, n, tokens, a.norm_eps, rstd);
      for (int64_t t = 0; t < tokens; ++t) extra[t] = a.rstd_q != nullptr ? A(a.eps) / rstd[t] : poison(rstd[t]);
    }
    for (int64_t h = 0; h < H; ++h) {
      const A *S = static_cast<const A*>(a.padded) + (b * H + h) * (D + 1) * P, *z = S + D * P;
      const A* weight = weights.data() + h * P;
      read_head<A>(a.q, b, n, h, tokens, D, P, [&](int64_t t, int64_t c, Vec<A> q) SANA_EXT_LAMBDA_INLINE {
        const Vec<A> u = relu<A>(q * load(weight + c));
        store(qhat.data() + t * P + c, a.weight_q ? u + poison(q) : u);
      });
      for (int64_t t = 0; t < tokens; t += kLanes) {
        Vec<A> products[kLanes] = {};
        for (int64_t c = 0; c < P; c += kLanes)
          for (int i = 0; i < kLanes; ++i) products[i] += load(qhat.data() + (t + i) * P + c) * load(z + c);
        store(scale + t, inverse<A>(sum_each<A>(products) + load(extra + t)));
      }
      on_head<A>(out, b, n, h, [&](auto* p) SANA_EXT_LAMBDA_INLINE {
        multiply<A>(qhat.data(), S, nullptr, tokens, D, P, [&](int64_t t, int64_t c) {
          auto* target = p + t * out.stride_n + c;
          const A* scales = scale + t;
          return [=, stride = out.stride_n, count = D - c](int r, int v, Vec<A> sum) SANA_EXT_LAMBDA_INLINE {
            auto* to = target + r * stride + v * kLanes;
            streaming ? stream(to, sum * scales[r]) : store_part<A>(to, sum * scales[r], count - v * kLanes);
          };
        });
      });
    }
  }
  if (streaming) stream_fence();
}

}  // namespace

void linear_attention_state(const LinearAttentionState& a, int64_t begin, int64_t end) {
  if (a.size.fp64) return state<double, 0>(a, begin, end);
  with_head_size(a.size.D, [&](auto D) { state<float, decltype(D)::value>(a, begin, end); });
}

void linear_attention_sum(const LinearAttentionSum& a, int64_t begin, int64_t end) {
  a.size.fp64 ? sum<double>(a, begin, end) : sum<float>(a, begin, end);
}

void linear_attention_output(const LinearAttentionOutput& a, int64_t begin, int64_t end) {
  if (a.size.fp64) return output<double, 0>(a, begin, end);
  with_head_size(a.size.D, [&](auto D) { output<float, decltype(D)::value>(a, begin, end); });
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
