#include "came8bit.h"

#include "code8_vec.h"
#include "vec.h"

namespace sana_ext::cpu::SANA_EXT_ISA {
namespace {

SANA_EXT_INLINE Vec<float> square_root(Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (Vec<float>)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (Vec<float>)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
SANA_EXT_INLINE float square_root(float x) { return __builtin_sqrtf(x); }

float average(float old, float value, double beta) {
  return old * static_cast<float>(beta) + value * static_cast<float>(1 - beta);
}

// The units of an item: matrix, first row and last row (exclusive).
struct Chunk {
  int64_t matrix, begin, end;
  Chunk(const Came8bit& a, int64_t item) : matrix(item / a.chunks) {
    const int64_t rows = a.chunk_units * a.unit_rows;
    begin = item % a.chunks * rows;
    end = begin + rows < a.R ? begin + rows : a.R;
  }
};

// What u is made of, at g's own scale: u = g * factor * clipped * (row * col, or 1 / sqrt(v)).
float clipping(const Came8bit& a) {
  const double rms = __builtin_sqrt(static_cast<double>(*a.w_square) / a.numel) / a.clip;
  return static_cast<float>(rms > 1 ? 1 / rms : 1);
}

// A piece of a row, or of the run of an unfactored parameter: n values from `offset` on.
struct Piece {
  int64_t offset, n;
  int64_t row;  // among all rows of all matrices
  int64_t col;  // the first column
};

// The pieces of the block `index` of the unit that begins at `row`: body(piece), in order.
template <class Body>
SANA_EXT_INLINE void for_pieces(const Came8bit& a, int64_t matrix, int64_t row, int64_t rows, int64_t index,
                                const Body& body) {
  const int64_t first = matrix * a.R + row;
  if (!a.factored) {
    const int64_t begin = index * a.block, length = rows * a.C, rest = length - begin;
    body(Piece{first * a.C + begin, a.blocks > 1 && a.block < rest ? a.block : rest, 0, 0});
  } else if (a.blocks > 1) {
    const int64_t col = index * a.block, rest = a.C - col;
    body(Piece{first * a.C + col, a.block < rest ? a.block : rest, first, col});
  } else {
    for (int64_t r = 0; r < rows; ++r) body(Piece{(first + r) * a.C, a.C, first + r, 0});
  }
}

// The sum of body(g, offset, n) over an item of an unfactored parameter, kRun values at a time.
constexpr int64_t kRun = 4096;
template <class Body>
SANA_EXT_INLINE double over_run(const Came8bit& a, const Chunk& chunk, float* scratch, const Body& body) {
  double sum = 0;
  const int64_t last = chunk.end * a.C;
  for (int64_t offset = chunk.begin * a.C; offset < last; offset += kRun) {
    const int64_t n = last - offset < kRun ? last - offset : kRun;
    sum += body(load_row<float>(a.g, offset, n, scratch), offset, n);
  }
  return sum;
}

// The rows of an item, four at a time: one stream of memory alone does not fill a core's bandwidth, and a column is
// loaded once for four rows. body(first row, Rows<n>).
template <int n>
struct Rows {
  static constexpr int kRows = n;
};
template <class Body>
SANA_EXT_INLINE void for_rows(const Chunk& chunk, const Body& body) {
  int64_t row = chunk.begin;
  for (; row + 4 <= chunk.end; row += 4) body(row, Rows<4>{});
  for (; row < chunk.end; ++row) body(row, Rows<1>{});
}
SANA_EXT_INLINE const void* gradient(const Came8bit& a, int64_t row) {
  return static_cast<const char*>(a.g.data) + row * a.C * size_of(a.g.dtype);
}

// Asks for what a later vector will need. Beyond the end of a tensor it does nothing.
template <class T>
SANA_EXT_INLINE void prefetch(Whole, const T* p) {
  __builtin_prefetch(p);
}
template <class T>
SANA_EXT_INLINE void prefetch(One, const T*) {}
// The piece one row (or, not factored, some values) further on: n elements of a tensor.
SANA_EXT_INLINE void prefetch_next(const Came8bit& a, ConstPtr tensor, const Piece& piece) {
  const int64_t bytes = size_of(tensor.dtype), ahead = a.C < 512 ? 2048 : a.C;
  const char* p = static_cast<const char*>(tensor.data) + (piece.offset + ahead) * bytes;
  for (int64_t i = 0; i < piece.n * bytes; i += 64) __builtin_prefetch(p + i);
}

// Buffers of one thread.
struct Buffers {
  Scratch<float> g, m;
  explicit Buffers(const Came8bit& a)
      : g(a.blocks > 1 ? a.block : a.C * a.unit_rows), m(a.blocks > 1 ? a.block : a.C * a.unit_rows) {}
};

// Walks over the blocks of an item with the momentum at hand: begin_block(m), body(piece, g, m of the piece), then
// end_block(m, codes, scales, n).
template <class Body, class End>
SANA_EXT_INLINE void for_blocks(const Came8bit& a, const Chunk& chunk, Buffers& buffers, const Body& body,
                                const End& end) {
  for (int64_t row = chunk.begin; row < chunk.end; row += a.unit_rows) {
    const int64_t rows = row + a.unit_rows < chunk.end ? a.unit_rows : chunk.end - row;
    for (int64_t index = 0; index < a.blocks; ++index) {
      const int64_t start = (chunk.matrix * a.R + row) * a.C + (a.blocks > 1 ? index * a.block : 0);
      const int64_t rest = a.blocks > 1 ? a.C - index * a.block : rows * a.C;
      const int64_t n = a.blocks > 1 && a.block < rest ? a.block : rest;
      const int64_t number = (chunk.matrix * a.units + row / a.unit_rows) * a.blocks + index;
      float* m = a.m + start;
      float* scales = a.scales + (a.linear ? 2 : 1) * number;
      if (a.codes != nullptr) {
        m = buffers.m.data();
        decode_block(a.codes + start, scales, a.linear, n, m);
      }
      for_pieces(a, chunk.matrix, row, rows, index, [&](const Piece& piece) SANA_EXT_LAMBDA_INLINE {
        body(piece, load_row<float>(a.g, piece.offset, piece.n, buffers.g.data()), m + (piece.offset - start));
      });
      if (a.codes != nullptr) end(m, n, a.codes + start, scales);
    }
  }
}

// 32 bits for each index: the finalizer of MurmurHash3.
template <class V>
SANA_EXT_INLINE V random_bits(V h) {
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

SANA_EXT_INLINE void store_by_chance(BFloat16* p, Vec<float> v, uint32_t index, uint32_t seed) {
  Vec<uint32_t> lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  const auto bits = reinterpret_cast<Vec<uint32_t>>(v);
  const auto rounded = (bits + (random_bits((lane + index) * 2654435769u + seed) >> 16)) >> 16;
  const auto result = (bits & 0x7fffffffu) >= 0x7f800000u ? (bits >> 16) : rounded;
  store<uint16_t>(&p->bits, __builtin_convertvector(result, Vec<uint16_t>));
}
SANA_EXT_INLINE void store_by_chance(BFloat16* p, float v, uint32_t index, uint32_t seed) {
  const uint32_t bits = float_bits(v);
  const uint32_t rounded = bits + (random_bits(index * 2654435769u + seed) >> 16);
  p->bits = static_cast<uint16_t>(((bits & 0x7fffffffu) >= 0x7f800000u ? bits : rounded) >> 16);
}
template <class T, class V>
SANA_EXT_INLINE void store_by_chance(T*, V, uint32_t, uint32_t) {}  // only bf16 is rounded so

// p -= p * decay + update(lanes, i) over one piece.
template <class Update>
SANA_EXT_INLINE void update_parameter(const Came8bit& a, const Piece& piece, float decay, const Update& update) {
  with_type<float>(a.p.dtype, static_cast<char*>(a.p.data) + piece.offset * size_of(a.p.dtype), [&](auto* p) {
    if (a.by_chance) {
      for_each(piece.n, [&](auto v, int64_t i) SANA_EXT_LAMBDA_INLINE {
        const auto old = v.load(p + i);
        store_by_chance(p + i, old - old * decay - update(v, i), static_cast<uint32_t>(piece.offset + i), a.seed);
      });
    } else {
      for_each(piece.n, [&](auto v, int64_t i) SANA_EXT_LAMBDA_INLINE {
        const auto old = v.load(p + i);
        v.store(p + i, old - old * decay - update(v, i));
      });
    }
  });
}

// partial[item] -> out, per matrix, in order.
void add_chunks(const Came8bit& a, float* out) {
  if (a.partial == out || a.chunks == 1) return;
  for (int64_t b = 0; b < a.B; ++b) {
    float* sum = out + b * a.C;
    zero(sum, a.C);
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
      const float* part = a.partial + (b * a.chunks + chunk) * a.C;
      for_each(a.C,
               [&](auto v, int64_t c) SANA_EXT_LAMBDA_INLINE { v.store(sum + c, v.load(sum + c) + v.load(part + c)); });
    }
  }
}

double add_sums(const Came8bit& a) {
  double sum = 0;
  for (int64_t i = 0; i < a.B * a.chunks; ++i) sum += a.sums[i];
  return sum;
}

// row <- the new average of each row (w holds the mean of this step), w <- 1 / sqrt(row / mean of all rows).
void commit_rows(const Came8bit& a, float* row, float* w, const float* total, double beta, double eps) {
  for (int64_t b = 0; b < a.B; ++b) {
    const float mean = static_cast<float>(total[b] / a.rows);
    for (int64_t i = b * a.R; i < (b + 1) * a.R; ++i) {
      row[i] = average(row[i], w[i] + static_cast<float>(eps), beta);
      w[i] = 1.0f / __builtin_sqrtf(row[i] / mean);
    }
  }
}
void commit_cols(const Came8bit& a, float* col, float* w, double beta, double eps, double correct) {
  const float rows = static_cast<float>(a.rows), corrected = static_cast<float>(correct);
  for (int64_t i = 0; i < a.B * a.C; ++i) {
    col[i] = average(col[i], w[i] / rows + static_cast<float>(eps), beta);
    w[i] = 1.0f / __builtin_sqrtf(col[i] * corrected);
  }
}

// The sum over a matrix's rows of what commit_rows will make of them; returns the sum of this step's means.
double total_rows(const Came8bit& a, const float* row, const float* w, float* total, double beta, double eps) {
  double all = 0;
  for (int64_t b = 0; b < a.B; ++b) {
    double sum = 0;
    for (int64_t i = b * a.R; i < (b + 1) * a.R; ++i) {
      sum += average(row[i], w[i] + static_cast<float>(eps), beta);
      all += w[i];
    }
    total[b] = static_cast<float>(sum);
  }
  return all;
}

}  // namespace

void came8bit_squares(const Came8bit& a, int64_t begin, int64_t end) {
  const float factor = static_cast<float>(a.factor);
  Scratch<float> scratch(a.factored ? 0 : kRun);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk(a, item);
    if (!a.factored) {
      a.sums[item] = over_run(a, chunk, scratch.data(), [&](const float* g, int64_t, int64_t n) {
        Sum<float> sum;
        for_each_slot(n, [&](auto v, int64_t i, auto slot) SANA_EXT_LAMBDA_INLINE {
          const auto x = v.load(g + i) * factor;
          sum.add(x * x, slot);
        });
        return sum.total();
      });
      continue;
    }
    float* partial = a.partial + item * a.C;
    zero(partial, a.C);
    for_rows(chunk, [&](int64_t row, auto count) SANA_EXT_LAMBDA_INLINE {
      constexpr int n = decltype(count)::kRows;
      const int64_t number = chunk.matrix * a.R + row;
      with_type<float>(a.g.dtype, gradient(a, number), [&](const auto* g) {
        Sum<float> sum[n];
        for_each(a.C, [&](auto v, int64_t c) SANA_EXT_LAMBDA_INLINE {
          auto column = v.load(partial + c);
          for (int k = 0; k < n; ++k) {
            prefetch(v, g + (n + k) * a.C + c);  // the rows after these
            const auto x = v.load(g + k * a.C + c) * factor, square = x * x;
            sum[k].add(square);
            column = column + square;
          }
          v.store(partial + c, column);
        });
        for (int k = 0; k < n; ++k) a.w_row[number + k] = sum[k].total() / static_cast<float>(a.C);
      });
    });
  }
}

void came8bit_norm(const Came8bit& a, int64_t begin, int64_t end) {
  const float factor = static_cast<float>(a.factor), correct2 = static_cast<float>(a.correct2);
  const float beta2 = static_cast<float>(a.beta2), rest2 = static_cast<float>(1 - a.beta2),
              eps1 = static_cast<float>(a.eps1);
  Scratch<float> scratch(a.factored ? 0 : kRun);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk(a, item);
    if (!a.factored) {
      a.sums[item] = over_run(a, chunk, scratch.data(), [&](const float* g, int64_t offset, int64_t n) {
        float* second = a.second + offset;
        Sum<float> sum;
        for_each_slot(n, [&](auto v, int64_t i, auto slot) SANA_EXT_LAMBDA_INLINE {
          const auto x = v.load(g + i) * factor, average = v.load(second + i) * beta2 + (x * x + eps1) * rest2;
          v.store(second + i, average);
          const auto u = x / square_root(average * correct2);
          sum.add(u * u, slot);
        });
        return sum.total();
      });
      continue;
    }
    const float* col = a.w_col + chunk.matrix * a.C;
    double all = 0;
    for_rows(chunk, [&](int64_t row, auto count) SANA_EXT_LAMBDA_INLINE {
      constexpr int n = decltype(count)::kRows;
      const int64_t number = chunk.matrix * a.R + row;
      with_type<float>(a.g.dtype, gradient(a, number), [&](const auto* g) {
        Sum<float> sum[n];
        for_each(a.C, [&](auto v, int64_t c) SANA_EXT_LAMBDA_INLINE {
          const auto column = v.load(col + c);
          for (int k = 0; k < n; ++k) {
            prefetch(v, g + (n + k) * a.C + c);
            const auto u = v.load(g + k * a.C + c) * (factor * a.w_row[number + k]) * column;
            sum[k].add(u * u);
          }
        });
        for (int k = 0; k < n; ++k) all += sum[k].total();
      });
    });
    a.sums[item] = all;
  }
}

void came8bit_residual(const Came8bit& a, int64_t begin, int64_t end) {
  if (!a.factored) return;
  const float clipped = clipping(a), factor = static_cast<float>(a.factor);
  const float beta1 = static_cast<float>(a.beta1), rest1 = static_cast<float>(1 - a.beta1);
  Buffers buffers(a);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk(a, item);
    const float* col = a.w_col + chunk.matrix * a.C;
    float* partial = a.partial + item * a.C;
    zero(partial, a.C);
    for (int64_t row = chunk.begin; row < chunk.end; ++row) a.w_res_row[chunk.matrix * a.R + row] = 0;
    for_blocks(
        a, chunk, buffers,
        [&](const Piece& piece, const float* g, const float* m) SANA_EXT_LAMBDA_INLINE {
          const float scale = factor * clipped * a.w_row[piece.row];
          const float* c = col + piece.col;
          float* out = partial + piece.col;
          prefetch_next(a, a.g, piece);
          Sum<float> sum;
          for_each_slot(piece.n, [&](auto v, int64_t i, auto slot) SANA_EXT_LAMBDA_INLINE {
            const auto u = v.load(g + i) * scale * v.load(c + i);
            const auto residual = u - (v.load(m + i) * beta1 + u * rest1), square = residual * residual;
            sum.add(square, slot);
            v.store(out + i, v.load(out + i) + square);
          });
          a.w_res_row[piece.row] += sum.total() / static_cast<float>(a.C);
        },
        [](float*, int64_t, uint8_t*, float*) {});
  }
}

void came8bit_apply(const Came8bit& a, int64_t begin, int64_t end) {
  const float clipped = clipping(a), factor = static_cast<float>(a.factor), correct2 = static_cast<float>(a.correct2);
  const float beta1 = static_cast<float>(a.beta1), rest1 = static_cast<float>(1 - a.beta1);
  const float lr = static_cast<float>(a.lr * a.correct1), decay = static_cast<float>(a.lr * a.weight_decay);
  Buffers buffers(a);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk(a, item);
    const float* col = a.w_col + chunk.matrix * a.C;
    const float* res_col = a.w_res_col + chunk.matrix * a.C;
    for_blocks(
        a, chunk, buffers,
        [&](const Piece& piece, const float* g, float* m) SANA_EXT_LAMBDA_INLINE {
          prefetch_next(a, a.g, piece);
          prefetch_next(a, a.p, piece);
          if (!a.factored) {
            const float* second = a.second + piece.offset;
            const float scale = factor * clipped;
            return update_parameter(a, piece, decay, [&](auto v, int64_t i) SANA_EXT_LAMBDA_INLINE {
              const auto u = v.load(g + i) * scale / square_root(v.load(second + i) * correct2);
              const auto average = v.load(m + i) * beta1 + u * rest1;
              v.store(m + i, average);
              return average * lr;
            });
          }
          const float scale = factor * clipped * a.w_row[piece.row], step = lr * a.w_res_row[piece.row];
          const float *c = col + piece.col, *rc = res_col + piece.col;
          update_parameter(a, piece, decay, [&](auto v, int64_t i) SANA_EXT_LAMBDA_INLINE {
            const auto u = v.load(g + i) * scale * v.load(c + i);
            const auto average = v.load(m + i) * beta1 + u * rest1;
            v.store(m + i, average);
            return average * step * v.load(rc + i);
          });
        },
        [&](float* m, int64_t n, uint8_t* codes, float* scales) { encode_block(m, a.linear, n, codes, scales); });
  }
}

void came8bit_before(const Came8bit& a, int64_t begin, int64_t end) {
  for (int64_t phase = begin; phase < end; ++phase) {
    if (!a.factored) continue;
    if (phase == 1) {
      commit_rows(a, a.second, a.w_row, a.w_total, a.beta2, a.eps1);
      commit_cols(a, a.col, a.w_col, a.beta2, a.eps1, a.correct2);
    } else if (phase == 3) {
      commit_rows(a, a.res_row, a.w_res_row, a.w_res_total, a.beta3, a.eps2);
      commit_cols(a, a.res_col, a.w_res_col, a.beta3, a.eps2, a.correct3);
    }
  }
}

void came8bit_after(const Came8bit& a, int64_t begin, int64_t end) {
  for (int64_t phase = begin; phase < end; ++phase) {
    if (phase == 1) *a.w_square = static_cast<float>(add_sums(a));
    if (phase == 0) {
      const double all = a.factored ? a.C * total_rows(a, a.second, a.w_row, a.w_total, a.beta2, a.eps1) : add_sums(a);
      if (!(all <= 3.4028235e38)) *a.not_finite = 1;  // NaN, too
    }
    if (!a.factored) continue;
    if (phase == 0) add_chunks(a, a.w_col);
    if (phase == 2) {
      total_rows(a, a.res_row, a.w_res_row, a.w_res_total, a.beta3, a.eps2);
      add_chunks(a, a.w_res_col);
    }
  }
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
