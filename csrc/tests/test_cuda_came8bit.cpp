// The CUDA kernels of came8bit under the emulator: against the formulas in double, aligned and not, phase by phase or
// at once, and the same bits whatever the order of threads and blocks.
#include "../cuda/kernels/came8bit.h"

#include <deque>

#include "../emulator/block.h"
#include "../emulator/memory.h"

#include "came8bit_case.h"

namespace sana_ext::test {
namespace {

using emulator::GlobalMemory;

struct Run {
  explicit Run(std::vector<CameParameter> list_, bool aligned = true) : list(std::move(list_)) {
    const CameNumbers h;
    int64_t floats = 0;
    uint32_t tiles = 0, items = 0;
    for (CameParameter& p : list) {
      cuda::Came8bitTensor t{};
      t.linear = p.linear, t.p = p.p.data(), t.g = p.g.data();
      t.p_bf16 = ConstPtr(p.p).dtype == Dtype::kBFloat16, t.g_bf16 = ConstPtr(p.g).dtype == Dtype::kBFloat16;
      t.codes = p.quantised ? p.codes.data() : nullptr, t.m = p.quantised ? nullptr : number(p.m);
      t.scales = number(p.scales), t.second = number(p.second), t.col = number(p.col);
      t.res_row = number(p.res_row), t.res_col = number(p.res_col);
      // std::vector may hand out no memory for nothing; codes that do not exist are not asked for.
      if (p.quantised && p.n == 0) t.codes = &nothing;
      cuda::came8bit_layout(t, p.shape.B, p.shape.R, p.shape.C, p.shape.factored, p.shape.block);
      t.aligned = t.aligned && aligned;
      CHECK(cuda::came8bit_work(t) == p.work.count());
      cuda::came8bit_place_work(t, number(p.work));
      t.first_tile = tiles, t.first_item = items;
      tiles += static_cast<uint32_t>(t.tiles), items += static_cast<uint32_t>(t.items);
      floats += cuda::came8bit_space(t);
      table.push_back(t);
      for (Buffer* b : {&p.p, &p.scales, &p.m, &p.second, &p.col, &p.res_row, &p.res_col, &p.work}) know(*b, true);
      know(p.g, false);
      know("codes", p.codes.data(), p.codes.size(), true);
      for (const double x : {h.lr, h.weight_decay, h.beta1, h.beta2, h.beta3, h.eps1, h.eps2, h.clip, h.factor,
                             h.correct1, h.correct2, h.correct3, double(p.shape.R), double(p.n)})
        hyper.push_back(x);
    }
    space.assign(floats, NAN), tile_sums.assign(tiles, NAN), item_sums.assign(2 * items, NAN);
    tile_owner.resize(tiles), item_owner.resize(items), flags.resize(list.size());
    float* next = space.data();
    for (auto& t : table) cuda::came8bit_place(t, next), next += cuda::came8bit_space(t);
    know("space", space.data(), space.size() * 4, true), know("tile_sums", tile_sums.data(), tiles * 4, true);
    know("item_sums", item_sums.data(), items * 16, true), know("tile_owner", tile_owner.data(), tiles * 4, true);
    know("item_owner", item_owner.data(), items * 4, true), know("flags", flags.data(), flags.size() * 4, true);
    know("hyper", hyper.data(), hyper.size() * 8, false), know("found_inf", &found, 4, true);
    copies.resize(table.size());
    a.tensors = copies.data(), a.tile_owner = tile_owner.data(), a.item_owner = item_owner.data();
    a.tile_sums = tile_sums.data(), a.item_sums = item_sums.data(), a.flags = flags.data(), a.hyper = hyper.data();
    a.found_inf = &found, a.count = static_cast<int32_t>(table.size()), a.tiles = tiles, a.items = items;
  }
  static float* number(Buffer& b) { return static_cast<float*>(b.data()); }
  void know(const char* name, const void* data, size_t bytes, bool writable) {
    known.emplace_back(name, data, bytes, writable);
  }
  void know(Buffer& b, bool writable) {
    know("tensor", b.data(), static_cast<size_t>(b.count() * size_of(ConstPtr(b).dtype)), writable);
  }
  void step(int first, int last) {
    for (int32_t begin = 0; begin < a.count; begin += cuda::kCame8bitTensors) {
      cuda::Came8bitTable part{};
      part.launch = a, part.first = begin;
      for (int32_t i = begin; i < a.count && i < begin + cuda::kCame8bitTensors; ++i)
        part.tensors[part.count++] = table[i];
      cuda::came8bit_table(part, nullptr);
    }
    cuda::came8bit_phases(a, first, last, nullptr);
  }
  // As another call would: nothing is left of what is not kept.
  void forget() {
    space.assign(space.size(), NAN), tile_sums.assign(tile_sums.size(), NAN);
    item_sums.assign(item_sums.size(), NAN);
  }

  std::vector<CameParameter> list;
  std::vector<cuda::Came8bitTensor> table, copies;
  std::vector<double> hyper, item_sums;
  std::vector<float> space, tile_sums;
  std::vector<int32_t> tile_owner, item_owner, flags;
  uint8_t nothing = 0;
  float found = 0;
  cuda::Came8bitLaunch a{};
  std::deque<GlobalMemory> known;
};

void steps(Dtype p, Dtype g) {
  Random random(static_cast<uint64_t>(p) * 10 + static_cast<uint64_t>(g));
  const std::vector<CameParameter> before = came_parameters(p, g, random);
  emulator::set_seed(1);
  Run first(before);
  first.step(0, 3);
  CHECK(first.found == 0);
  emulator::set_seed(2);
  Run second(before, false);  // element by element, each phase in a call of its own
  for (int phase = 0; phase < 4; ++phase) second.step(phase, phase), second.forget();
  for (size_t i = 0; i < before.size(); ++i) {
    check_came(before[i], first.list[i], {});
    CHECK(same(first.list[i], second.list[i]));
  }
  if (p != Dtype::kBFloat16) return;
  Run bad(before);
  for (const size_t at : {size_t{4}, size_t{34}}) {  // a factored parameter, one that is not
    Buffer& gradient = bad.list[at].g;
    const double kept = gradient[gradient.count() - 1];
    bad.found = 0;
    gradient.set(gradient.count() - 1, at == 4 ? NAN : 1e30);
    bad.step(0, 3);
    CHECK(bad.found == 1);
    gradient.set(gradient.count() - 1, kept);
  }
  for (size_t i = 0; i < before.size(); ++i) CHECK(same(bad.list[i], before[i]));
}

// The layout of rows of the published shapes: strips end where blocks do, and no column is in two.
void layouts() {
  for (const int64_t block : {1, 7, 64, 256, 2048, 65536})
    for (const int64_t C : {1, 3, 63, 64, 255, 256, 257, 1120, 2240, 4095, 5600, 11200, 131071}) {
      uint8_t code = 0;
      cuda::Came8bitTensor t{};
      t.codes = &code;
      cuda::came8bit_layout(t, 1, 200, C, true, block);
      int64_t covered = 0;
      for (int64_t strip = 0; strip < t.strips; ++strip) {
        const int64_t within = strip % t.block_strips * t.strip_width;
        const int64_t begin = strip / t.block_strips * t.block + within;
        int64_t columns = t.strip_width < t.block - within ? t.strip_width : t.block - within;
        columns = columns < C - begin ? columns : C - begin;
        CHECK(columns <= 0 || begin == covered);
        covered += columns > 0 ? columns : 0;
      }
      CHECK(covered == C && t.strip_width <= cuda::kCame8bitStrip);
    }
}

void tests() {
  layouts();
  steps(Dtype::kFloat32, Dtype::kFloat32);
  steps(Dtype::kBFloat16, Dtype::kBFloat16);
  steps(Dtype::kBFloat16, Dtype::kFloat32);
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
