// The CUDA kernels of adamw8bit under the emulator: against the formulas in double, aligned and not, and the same bits
// whatever the order of threads and blocks.
#include "../cuda/kernels/adamw8bit.h"

#include <deque>

#include "../emulator/block.h"
#include "../emulator/memory.h"

#include "adamw8bit_case.h"

namespace sana_ext::test {
namespace {

using emulator::GlobalMemory;

struct Run {
  explicit Run(std::vector<AdamParameter> list_) : list(std::move(list_)), hyper(list.size() * 9), found{0.0f} {
    const AdamNumbers h;
    const double row[] = {h.beta1, h.rest1, h.beta2, h.rest2, h.size, h.root, h.eps, h.keep, h.factor};
    for (size_t i = 0; i < hyper.size(); ++i) hyper[i] = row[i % 9];
    know("hyper", hyper.data(), hyper.size() * 8, false), know("found_inf", &found, 4, true);
    know("factor", &factor, 4, false);
    uint32_t blocks = 0;
    for (AdamParameter& p : list) {
      cuda::AdamW8bitTensor& t = a.tensors[a.count++];
      t.n = p.n, t.first_block = blocks, t.p = p.p.data(), t.g = p.g.data();
      t.p_bf16 = ConstPtr(p.p).dtype == Dtype::kBFloat16, t.g_bf16 = ConstPtr(p.g).dtype == Dtype::kBFloat16;
      t.state1 = p.state1(), t.state2 = p.state2();
      const size_t state = p.quantised ? p.codes1.size() : static_cast<size_t>(p.n) * 4;
      know("state1", t.state1, state, true), know("state2", t.state2, state, true);
      know("p", p.p, true), know("g", p.g, false);
      if (p.quantised) {
        t.absmax1 = static_cast<float*>(p.absmax1.data()), t.absmax2 = static_cast<float*>(p.absmax2.data());
        know("absmax1", p.absmax1, true), know("absmax2", p.absmax2, true);
      }
      t.aligned = true;
      for (const void* q :
           {const_cast<const void*>(t.p), t.g, const_cast<const void*>(t.state1), const_cast<const void*>(t.state2)})
        t.aligned = t.aligned && reinterpret_cast<uintptr_t>(q) % 16 == 0;
      blocks += static_cast<uint32_t>(p.blocks());
    }
    a.blocks = blocks, a.hyper = hyper.data(), a.found_inf = &found, a.factor = &factor;
    flags.resize((blocks + cuda::kAdamW8bitChunk - 1) / cuda::kAdamW8bitChunk);
    a.flags = flags.data(), know("flags", flags.data(), flags.size() * 4, true);
  }
  void know(const char* name, const void* data, size_t bytes, bool writable) {
    known.emplace_back(name, data, bytes, writable);
  }
  void know(const char* name, Buffer& b, bool writable) {
    know(name, b.data(), static_cast<size_t>(b.count() * size_of(ConstPtr(b).dtype)), writable);
  }
  void check() {
    cuda::adamw8bit_check(a, nullptr);
    cuda::adamw8bit_found({static_cast<int64_t>(flags.size()), flags.data(), &found}, nullptr);
  }

  std::vector<AdamParameter> list;
  std::vector<double> hyper;
  std::vector<int32_t> flags;
  float found, factor = 0.5f;
  cuda::AdamW8bitLaunch a{};
  std::deque<GlobalMemory> known;
};

void steps(Dtype p, Dtype g) {
  Random random(static_cast<uint64_t>(p) * 10 + static_cast<uint64_t>(g));
  const std::vector<AdamParameter> before = adam_parameters(p, g, random);
  emulator::set_seed(1);
  Run first(before);
  first.check();
  CHECK(first.found == 0);
  cuda::adamw8bit_step(first.a, nullptr);
  emulator::set_seed(2);
  Run second(before);
  for (int32_t i = 0; i < second.a.count; ++i) second.a.tensors[i].aligned = false;  // element by element
  cuda::adamw8bit_step(second.a, nullptr);
  for (size_t i = 0; i < before.size(); ++i) {
    check_step(before[i], first.list[i], {});
    CHECK(same(first.list[i], second.list[i]));
  }
  Run bad(before);
  bad.list[4].g.set(bad.list[4].n - 1, NAN);
  bad.check();
  CHECK(bad.found == 1);
  cuda::adamw8bit_step(bad.a, nullptr);
  for (size_t i = 0; i < before.size(); ++i)
    CHECK(same(bad.list[i].p, before[i].p) && bad.list[i].codes1 == before[i].codes1);
}

void tests() {
  for (const Dtype p : {Dtype::kFloat32, Dtype::kBFloat16})
    for (const Dtype g : {Dtype::kFloat32, Dtype::kBFloat16}) steps(p, g);
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
