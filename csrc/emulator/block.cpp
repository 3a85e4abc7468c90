#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "memory.h"

namespace sana_ext::emulator {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr int kBarriers = 16;

thread_local Block* active_block = nullptr;
thread_local int architecture = 0;

uint64_t& seed() {
  thread_local uint64_t value = [] {
    const char* text = std::getenv("SANA_EXT_EMULATOR_SEED");
    return text != nullptr ? std::strtoull(text, nullptr, 10) : 0;
  }();
  return value;
}

// splitmix64
struct Generator {
  uint64_t state;
  uint64_t operator()() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  unsigned below(size_t n) { return static_cast<unsigned>((*this)() % n); }
};

// Shared memory that one block may ask for: CUDA programming guide, table of compute capabilities.
size_t shared_limit() { return (architecture == 80 ? 163u : architecture == 90 ? 227u : 99u) << 10; }

dim3 unflatten(uint64_t i, dim3 size) {
  return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
          static_cast<unsigned>(i / size.x / size.y)};
}

std::string text(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string text(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

// The fibers of this OS thread, kept from launch to launch.
std::vector<std::unique_ptr<Thread>>& thread_pool() {
  thread_local std::vector<std::unique_ptr<Thread>> pool;
  return pool;
}

}  // namespace

void set_seed(uint64_t value) { seed() = value; }
void set_architecture(int value) { architecture = value; }

bool Site::operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }

Block* Block::active() { return active_block; }

Block::Block(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes)
    : kernel_(kernel), grid_(grid), block_(block), barriers_(kBarriers), shared_(shared_bytes) {
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  const auto refuse = [&](const std::string& why) { throw Fault("kernel " + std::string(kernel) + ": " + why); };
  if (count == 0 || count > kMaxThreads)
    refuse("a block of " + std::to_string(count) + " threads; 1 to 1024 are allowed");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    refuse("a grid of " + text(grid) + " blocks is not allowed");
  if (shared_bytes > shared_limit())
    refuse(std::to_string(shared_bytes) + " bytes of shared memory; the limit is " + std::to_string(shared_limit()));
  threads_.swap(thread_pool());
  while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < count; ++i) {
    threads_[i]->linear = i;
    threads_[i]->index = unflatten(i, block);
  }
  alive_ = static_cast<unsigned>(count);
}

Block::~Block() { threads_.swap(thread_pool()); }

void Block::run(dim3 index, const std::function<void()>& body, uint64_t block_seed) {
  const unsigned count = block_.x * block_.y * block_.z;
  index_ = index, body_ = &body, alive_ = count, error_ = nullptr, time_ = 1;
  shared_.assign(shared_.size(), 0xff);  // NaN in every floating-point type
  shadow_.reset(shared_.size());
  for (Barrier& barrier : barriers_) barrier = Barrier{};
  meetings_.clear();
  ready_.clear();
  const auto nothing = std::make_shared<const std::vector<uint32_t>>(count, 0);
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = *threads_[i];
    t.left = false, t.clock = 1, t.seen = nothing;
    t.waits_in = nullptr, t.open.clear(), t.groups.clear();
    t.fiber.start(&thread_entry, this);
    ready_.push_back(i);
  }
  Generator random{block_seed};
  while (alive_ > 0 && error_ == nullptr) {
    if (ready_.empty()) stuck();
    const unsigned pick = random.below(ready_.size());
    current_ = ready_[pick];
    ready_[pick] = ready_.back();
    ready_.pop_back();
    threads_[current_]->fiber.resume();
  }
  if (error_) std::rethrow_exception(error_);
}

void Block::thread_entry(void* self) {
  Block& block = *static_cast<Block*>(self);
  try {
    (*block.body_)();
    block.check_exit();
  } catch (...) {
    block.error_ = std::current_exception();
  }
  block.thread().left = true;
  --block.alive_;
}

void Block::wait(const char* in, Site at) {
  Thread& self = thread();
  self.waits_in = in, self.waits_at = at;
  self.fiber.yield();
  self.waits_in = nullptr;
}

std::string Block::name_of(unsigned thread) const { return "thread " + text(threads_[thread]->index); }

void Block::fault(const std::string& what) {
  throw Fault("kernel " + std::string(kernel_) + ", block " + text(index_) + ", " + name_of(current_) + ": " + what);
}

void Block::stuck() {
  for (const Meeting& m : meetings_) {
    const unsigned missing = static_cast<unsigned>(__builtin_ctz(m.lanes.mask & ~m.arrived));
    current_ = m.warp * kWarpSize + static_cast<unsigned>(__builtin_ctz(m.arrived));
    const Thread& absent = *threads_[m.warp * kWarpSize + missing];
    fault(std::string(m.name) + " at " + text(m.site) + " waits for lane " + std::to_string(missing) +
          ", which waits in " + absent.waits_in + " at " + text(absent.waits_at));
  }
  for (int id = 0; id < kBarriers; ++id) {
    const Barrier& b = barriers_[static_cast<size_t>(id)];
    if (b.waiting.empty()) continue;
    current_ = b.waiting.front();
    fault("barrier " + std::to_string(id) + " at " + text(b.site) + " never gets all of its " +
          std::to_string(b.count) + " threads");
  }
  throw Fault("kernel " + std::string(kernel_) + ": no thread can run");
}

void Block::synchronise(const std::vector<unsigned>& threads) {
  std::vector<uint32_t> joined = *threads_[threads.front()]->seen;
  const std::vector<uint32_t>* last = nullptr;
  for (const unsigned i : threads) {
    const std::vector<uint32_t>* seen = threads_[i]->seen.get();
    if (seen == last) continue;
    last = seen;
    for (size_t k = 0; k < joined.size(); ++k) joined[k] = std::max(joined[k], (*seen)[k]);
  }
  ++time_;
  for (const unsigned i : threads) joined[i] = threads_[i]->clock;
  const auto shared = std::make_shared<const std::vector<uint32_t>>(std::move(joined));
  for (const unsigned i : threads) threads_[i]->seen = shared, threads_[i]->clock = time_;
}

void Block::barrier(int id, unsigned count, Site site) {
  const unsigned size = block_.x * block_.y * block_.z;
  if (id < 0 || id >= kBarriers) fault("barrier " + std::to_string(id) + " does not exist; there are 16");
  if (id != 0 && (count == 0 || count % kWarpSize != 0 || count > size))
    fault("barrier " + std::to_string(id) + " for " + std::to_string(count) + " threads of " + std::to_string(size) +
          "; it takes whole warps");
  if (id == 0 && alive_ < size)
    for (unsigned i = 0; i < size; ++i)
      if (threads_[i]->left) fault("waits at " + text(site) + ", but " + name_of(i) + " has left the kernel");
  Barrier& b = barriers_[static_cast<size_t>(id)];
  if (b.waiting.empty()) {
    b.count = count, b.site = site;
  } else if (b.count != count || (id == 0 && !(b.site == site))) {  // warps may meet at named ones from two places
    fault("divergent barrier: is at " + text(site) + " while " + name_of(b.waiting.front()) + " waits at " +
          text(b.site));
  }
  b.waiting.push_back(current_);
  if (b.waiting.size() < count) return wait("a barrier", site);
  const std::vector<unsigned> threads = std::move(b.waiting);
  b = Barrier{};
  synchronise(threads);
  for (const unsigned i : threads)
    if (i != current_) ready_.push_back(i);
}

void Block::collective(const char* name, unsigned mask, const void* in, void* out, void (*operation)(const Lanes&),
                       Site site, bool orders_memory) {
  const Thread& self = thread();
  const unsigned bit = 1u << self.lane(), first = self.warp() * kWarpSize;
  if ((mask & bit) == 0) fault(std::string(name) + ": the mask does not contain the calling lane");
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const unsigned i = first + lane;
    if (i >= block_.x * block_.y * block_.z)
      fault(std::string(name) + ": lane " + std::to_string(lane) + " of the mask does not exist in this block");
    if (threads_[i]->left)
      fault(std::string(name) + ": lane " + std::to_string(lane) + " of the mask has left the kernel");
  }
  // Other masks that contain this lane are met later, or never: then no thread can run and stuck() tells.
  size_t at = 0;
  while (at < meetings_.size() && !(meetings_[at].warp == self.warp() && meetings_[at].lanes.mask == mask)) ++at;
  if (at == meetings_.size()) meetings_.push_back({name, site, self.warp(), 0, {mask, {}, {}}});
  Meeting& m = meetings_[at];
  if (std::strcmp(m.name, name) != 0)
    fault(std::string(name) + " while other lanes of its warp wait in " + m.name + " at " + text(m.site));
  m.arrived |= bit;
  m.lanes.in[self.lane()] = in;
  m.lanes.out[self.lane()] = out;
  if (m.arrived != mask) return wait(name, site);
  const Lanes lanes = m.lanes;
  meetings_.erase(meetings_.begin() + static_cast<std::ptrdiff_t>(at));
  if (operation != nullptr) operation(lanes);
  std::vector<unsigned> threads;
  for (unsigned lane = 0; lane < kWarpSize; ++lane)
    if (mask >> lane & 1) threads.push_back(first + lane);
  if (orders_memory) synchronise(threads);
  for (const unsigned i : threads)
    if (i != current_) ready_.push_back(i);
}

// Nobody may wait for a thread that leaves.
void Block::check_exit() {
  const Thread& self = thread();
  if (!barriers_[0].waiting.empty())
    fault("leaves the kernel while " + name_of(barriers_[0].waiting.front()) + " waits at the barrier of " +
          text(barriers_[0].site));
  for (const Meeting& m : meetings_)
    if (m.warp == self.warp() && (m.lanes.mask >> self.lane() & 1) != 0)
      fault("leaves the kernel while other lanes wait for it in " + std::string(m.name) + " at " + text(m.site));
}

void Block::check_conflict(const char* verb, size_t offset, const Shadow::Conflict& conflict) {
  using Kind = Shadow::Kind;
  if (conflict.kind == Kind::kNone) return;
  const std::string here = std::string(verb) + " shared memory at byte " + std::to_string(offset);
  const std::string other = conflict.other == current_ ? "this thread" : name_of(conflict.other);
  switch (conflict.kind) {
    case Kind::kUninitialised:
      fault(here + ", which nobody has written yet");
    case Kind::kInFlight:
      fault(here + " while an asynchronous copy of " + other + " into it is in flight: a wait is missing");
    case Kind::kReadAfterWrite:
      fault(here + ", written by " + other + " with no barrier between");
    case Kind::kWriteAfterWrite:
      fault(here + ", written by " + other + " too, with no barrier between");
    default:
      fault(here + ", read by " + other + " with no barrier between");
  }
}

void Block::read_shared(size_t offset, void* to, size_t bytes) {
  check_conflict("reads", offset, shadow_.read(offset, bytes, thread()));
  std::memcpy(to, shared_.data() + offset, bytes);
}

void Block::read_shared_by_lane(int lane, size_t offset, void* to, size_t bytes) {
  const unsigned self = current_;
  current_ = thread().warp() * kWarpSize + static_cast<unsigned>(lane);
  read_shared(offset, to, bytes);
  current_ = self;
}

void Block::write_shared(size_t offset, const void* from, size_t bytes) {
  check_conflict("writes", offset, shadow_.write(offset, bytes, thread()));
  std::memcpy(shared_.data() + offset, from, bytes);
}

void Block::copy_async(size_t to, const void* from, size_t bytes) {
  check_conflict("copies to", to, shadow_.begin_copy(to, bytes, thread()));
  thread().open.push_back({to, from, bytes});
}

void Block::commit_copies() {
  Thread& self = thread();
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

void Block::wait_copies(size_t groups_in_flight) {
  auto& groups = thread().groups;
  while (groups.size() > groups_in_flight) {
    for (const PendingCopy& copy : groups.front()) {
      if (copy.from != nullptr)
        std::memcpy(shared_.data() + copy.to, copy.from, copy.bytes);
      else
        std::memset(shared_.data() + copy.to, 0, copy.bytes);
      shadow_.end_copy(copy.to, copy.bytes, thread());
    }
    groups.erase(groups.begin());
  }
}

cuda::cudaError_t launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, cuda::cudaStream_t,
                         const std::function<void()>& body) {
  if (active_block != nullptr) throw Fault("kernel " + std::string(kernel) + ": launched from inside a kernel");
  Block runner(kernel, grid, block, shared_bytes);
  Generator random{seed()};
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) {
    order[i] = i;
    std::swap(order[i], order[random.below(i + 1)]);
  }
  begin_launch();
  active_block = &runner;
  struct Restore {
    ~Restore() { active_block = nullptr; }
  } restore;
  for (const uint64_t i : order) runner.run(unflatten(i, grid), body, random());
  return cuda::cudaSuccess;
}

}  // namespace sana_ext::emulator
