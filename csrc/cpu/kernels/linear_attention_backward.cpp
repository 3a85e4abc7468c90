#include "linear_attention.h"
#include "linear_attention_tile.h"
#include "vec.h"

namespace sana_ext::cpu::SANA_EXT_ISA {
namespace {

// The gradient of a norm's weight is sum x rstd dy = (sum y dy) / weight over the masked y = weight x rstd; where the
// weight is 0 the mask is, too, but for NaN.
template <class A>
SANA_EXT_INLINE void store_weight_gradient(const A* products, const A* weights, int64_t H, int64_t D, int64_t P,
                                           A* out) {
  for (int64_t h = 0; h < H; ++h)
    for (int64_t c = 0; c < D; ++c) {
      const A weight = weights[h * P + c];
      out[h * D + c] = weight == A(0) ? products[h * P + c] * A(0) : products[h * P + c] / weight;
    }
}

template <class A, int kD>
void backward_q(const LinearAttentionBackwardQ& a, int64_t begin, int64_t end) {
  const int64_t N = a.size.N, H = a.size.H, D = kD > 0 ? kD : a.size.D, P = kD > 0 ? kD : a.size.P;
  const int64_t chunks = (N + a.size.chunk - 1) / a.size.chunk, state_size = (D + 1) * P;
  constexpr int64_t kBlock = kLinearAttentionBlock;
  Scratch<A> weights(H * P), products(H * P), u_scratch(kBlock * P), g_scratch(kBlock * P), t_scratch(kBlock * P);
  A *u = u_scratch.data(), *g = g_scratch.data(), *du = t_scratch.data();
  load_weights(a.weight_q, a.size, weights.data());
  A extra[kBlock], sum_b[kBlock], lost[kBlock];
  for (A& e : extra) e = a.weight_q ? A(0) : A(a.eps);
  zero(lost, kBlock);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / chunks, first = item % chunks * a.size.chunk;
    const int64_t last = first + a.size.chunk < N ? first + a.size.chunk : N;
    A* states = static_cast<A*>(a.partial) + item * H * state_size;
    zero(states, H * state_size);
    zero(products.data(), H * P);
    for (int64_t n = first; n < last; n += kBlock) {
      const int64_t tokens = last - n < kBlock ? last - n : kBlock;
      const A* rstd = a.rstd_q != nullptr ? static_cast<const A*>(a.rstd_q) + b * N + n : nullptr;
      if (a.weight_q)
        row_poison(a.q, a.size, b, n, tokens, lost);  // whatever is not finite reaches the token's gradient
      if (rstd != nullptr)
        for (int64_t t = 0; t < tokens; ++t) extra[t] = A(a.eps) / rstd[t];
      zero(sum_b, kBlock);
      for (int64_t h = 0; h < H; ++h) {
        const A* z = static_cast<const A*>(a.padded) + (b * H + h) * state_size + D * P;
        const A* St = static_cast<const A*>(a.transposed) + (b * H + h) * D * P;
        const A* weight = weights.data() + h * P;
        A *dS = states + h * state_size, *dz = dS + D * P, *product = products.data() + h * P;
        read_head<A>(a.q, b, n, h, tokens, D, P, [&](int64_t t, int64_t c, Vec<A> q) SANA_EXT_LAMBDA_INLINE {
          store(u + t * P + c, relu<A>(q * load(weight + c)));
        });
        read_head<A>(a.dout, b, n, h, tokens, D, P,
                     [&](int64_t t, int64_t c, Vec<A> dout) SANA_EXT_LAMBDA_INLINE { store(g + t * P + c, dout); });
        multiply<A>(g, St, nullptr, du, tokens, D, P);  // t = S g
        for (int64_t t = 0; t < tokens; ++t) {
          const A r = inverse(dot(u + t * P, z, P) + (extra[t] + lost[t])),
                  coefficient = -dot(u + t * P, du + t * P, P) * r * r;
          sum_b[t] += coefficient;
          for (int64_t c = 0; c < P; c += kLanes) {
            const Vec<A> ut = load(u + t * P + c);
            const Vec<A> d = load(du + t * P + c) * r + load(z + c) * coefficient;
            const Vec<A> masked = (ut <= Vec<A>{} ? Vec<A>{} : d) + lost[t];  // as in torch, NaN passes the mask
            store(du + t * P + c, masked * load(weight + c));
            store(product + c, load(product + c) + ut * masked);
            store(dz + c, load(dz + c) + ut * coefficient);
            store(g + t * P + c, load(g + t * P + c) * r);
          }
        }
        accumulate(u, g, dS, tokens, D, P);
        write_head<A>(a.dq, b, n, h, tokens, D,
                      [&](int64_t t, int64_t c) SANA_EXT_LAMBDA_INLINE { return load(du + t * P + c); });
      }
      if (rstd == nullptr) continue;
      // The norm's scale does not leave eps / rstd_q: dq += q (eps rstd_q / C) sum_heads b.
      for (int64_t t = 0; t < tokens; ++t) sum_b[t] *= A(a.eps) / A(H * D) * rstd[t];
      for (int64_t h = 0; h < H; ++h) {
        const LinearAttentionRows<ConstPtr> written{a.dq.p, a.dq.stride_b, a.dq.stride_n, a.dq.stride_h};
        read_head<A>(written, b, n, h, tokens, D, P,
                     [&](int64_t t, int64_t c, Vec<A> dq) SANA_EXT_LAMBDA_INLINE { store(du + t * P + c, dq); });
        read_head<A>(a.q, b, n, h, tokens, D, P, [&](int64_t t, int64_t c, Vec<A> q) SANA_EXT_LAMBDA_INLINE {
          store(du + t * P + c, load(du + t * P + c) + q * sum_b[t]);
        });
        write_head<A>(a.dq, b, n, h, tokens, D,
                      [&](int64_t t, int64_t c) SANA_EXT_LAMBDA_INLINE { return load(du + t * P + c); });
      }
    }
    if (a.weight_q)
      store_weight_gradient(products.data(), weights.data(), H, D, P, static_cast<A*>(a.partial_weight) + item * H * D);
  }
}

template <class A, int kD>
void backward_k(const LinearAttentionBackwardK& a, int64_t begin, int64_t end) {
  const int64_t N = a.size.N, H = a.size.H, D = kD > 0 ? kD : a.size.D, P = kD > 0 ? kD : a.size.P;
  const int64_t chunks = (N + a.size.chunk - 1) / a.size.chunk, state_size = (D + 1) * P;
  constexpr int64_t kBlock = kLinearAttentionBlock;
  Scratch<A> weights(H * P), products(H * P), khat_scratch(kBlock * P), v_scratch(kBlock * P), dv_scratch(kBlock * P);
  Scratch<A> dk_scratch(kBlock * H * P);
  A *khat = khat_scratch.data(), *v = v_scratch.data(), *dv = dv_scratch.data();
  load_weights(a.weight_k, a.size, weights.data());
  A scale[kBlock], sum_products[kBlock];
  for (A& s : scale) s = A(1);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / chunks, first = item % chunks * a.size.chunk;
    const int64_t last = first + a.size.chunk < N ? first + a.size.chunk : N;
    zero(products.data(), H * P);
    for (int64_t n = first; n < last; n += kBlock) {
      const int64_t tokens = last - n < kBlock ? last - n : kBlock;
      if (a.weight_k)
        std::memcpy(scale, static_cast<const A*>(a.rstd_k) + b * N + n, static_cast<size_t>(tokens) * sizeof(A));
      zero(sum_products, kBlock);
      for (int64_t h = 0; h < H; ++h) {
        const A *dS = static_cast<const A*>(a.padded) + (b * H + h) * state_size, *dz = dS + D * P;
        const A* dSt = static_cast<const A*>(a.transposed) + (b * H + h) * D * P;
        const A* weight = weights.data() + h * P;
        A *product = products.data() + h * P, *dk = dk_scratch.data() + h * kBlock * P;
        read_head<A>(a.k, b, n, h, tokens, D, P, [&](int64_t t, int64_t c, Vec<A> k) SANA_EXT_LAMBDA_INLINE {
          store(khat + t * P + c, relu<A>(k * load(weight + c) * scale[t]));
        });
        read_head<A>(a.v, b, n, h, tokens, D, P,
                     [&](int64_t t, int64_t c, Vec<A> x) SANA_EXT_LAMBDA_INLINE { store(v + t * P + c, x); });
        multiply<A>(khat, dS, nullptr, dv, tokens, D, P);
        write_head<A>(a.dv, b, n, h, tokens, D,
                      [&](int64_t t, int64_t c) SANA_EXT_LAMBDA_INLINE { return load(dv + t * P + c); });
        multiply<A>(v, dSt, dz, dk, tokens, D, P);  // dkhat before the mask
        for (int64_t t = 0; t < tokens; ++t) {
          Vec<A> row{};
          for (int64_t c = 0; c < P; c += kLanes) {
            const Vec<A> y = load(khat + t * P + c);
            const Vec<A> dy = y <= Vec<A>{} ? Vec<A>{} : load(dk + t * P + c);
            store(product + c, load(product + c) + y * dy);
            row += y * dy;
            store(dk + t * P + c, dy * load(weight + c) * scale[t]);
          }
          sum_products[t] += sum_lanes<A>(row);
        }
      }
      // With the norm: dk = rstd weight dkhat - k (rstd^2 / C) sum_C khat dkhat; the sum runs over all heads.
      for (int64_t t = 0; t < tokens; ++t) sum_products[t] *= scale[t] * scale[t] / A(H * D);
      for (int64_t h = 0; h < H; ++h) {
        A* dk = dk_scratch.data() + h * kBlock * P;
        if (a.weight_k)
          read_head<A>(a.k, b, n, h, tokens, D, P, [&](int64_t t, int64_t c, Vec<A> k) SANA_EXT_LAMBDA_INLINE {
            store(dk + t * P + c, load(dk + t * P + c) - k * sum_products[t]);
          });
        write_head<A>(a.dk, b, n, h, tokens, D,
                      [&](int64_t t, int64_t c) SANA_EXT_LAMBDA_INLINE { return load(dk + t * P + c); });
      }
    }
    if (a.weight_k)
      store_weight_gradient(products.data(), weights.data(), H, D, P, static_cast<A*>(a.partial_weight) + item * H * D);
  }
}

}  // namespace

void linear_attention_backward_q(const LinearAttentionBackwardQ& a, int64_t begin, int64_t end) {
  if (a.size.fp64) return backward_q<double, 0>(a, begin, end);
  with_head_size(a.size.D, [&](auto D) { backward_q<float, decltype(D)::value>(a, begin, end); });
}

void linear_attention_backward_k(const LinearAttentionBackwardK& a, int64_t begin, int64_t end) {
  if (a.size.fp64) return backward_k<double, 0>(a, begin, end);
  with_head_size(a.size.D, [&](auto D) { backward_k<float, decltype(D)::value>(a, begin, end); });
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
