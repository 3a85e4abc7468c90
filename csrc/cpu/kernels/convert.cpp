#include "convert.h"

#include "vec.h"

namespace sana_ext::cpu::SANA_EXT_ISA {
namespace {

template <class A, class S, class T>
void convert_row(const S* source, const A* addend, T* target, int64_t cols) {
  if (addend == nullptr) {
    for_each(cols,
             [&](auto lanes, int64_t i) SANA_EXT_LAMBDA_INLINE { lanes.store(target + i, lanes.load(source + i)); });
  } else {
    for_each(cols, [&](auto lanes, int64_t i) SANA_EXT_LAMBDA_INLINE {
      lanes.store(target + i, lanes.load(source + i) + lanes.load(addend + i));
    });
  }
}

template <class A>
void convert_rows(const Convert& a, int64_t begin, int64_t end) {
  with_type<A>(a.source.dtype, a.source.data, [&](const auto* source) {
    with_type<A>(a.target.dtype, a.target.data, [&](auto* target) {
      const A* addend = static_cast<const A*>(a.addend);
      for (int64_t r = begin; r < end; ++r) {
        convert_row<A>(source + r * a.source_stride, addend ? addend + r * a.addend_stride : nullptr,
                       target + r * a.target_stride, a.cols);
      }
    });
  });
}

template <class A>
void sum_blocks(const ColumnSums& a, int64_t begin, int64_t end) {
  with_type<A>(a.source.dtype, a.source.data, [&](const auto* source) {
    for (int64_t block = begin; block < end; ++block) {
      A* partial = static_cast<A*>(a.partial) + block * a.cols;
      const int64_t first = block * kColumnSumsBlock;
      const int64_t last = first + kColumnSumsBlock < a.rows ? first + kColumnSumsBlock : a.rows;
      zero(partial, a.cols);
      for (int64_t r = first; r < last; ++r) convert_row<A>(source + r * a.source_stride, partial, partial, a.cols);
    }
  });
}

}  // namespace

void convert(const Convert& a, int64_t begin, int64_t end) {
  if (a.source.dtype == Dtype::kFloat64) return convert_rows<double>(a, begin, end);
  convert_rows<float>(a, begin, end);
}

void column_sums(const ColumnSums& a, int64_t begin, int64_t end) {
  if (a.source.dtype == Dtype::kFloat64) return sum_blocks<double>(a, begin, end);
  sum_blocks<float>(a, begin, end);
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
