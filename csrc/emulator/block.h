// One thread block at a time, one fiber per thread. A thread runs until it must wait for others; which of the threads
// that can run is next is drawn from a seeded generator, and so is the order of the blocks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "runtime.h"
#include "shadow.h"

namespace sana_ext::emulator {

using cuda::dim3;

// What a kernel did wrong: names the kernel, the block and the thread.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int kWarpSize = 32;

// A place in a kernel's source, by default argument that of the caller.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const;
};

// Order of threads and blocks in later launches of this OS thread. The environment's SANA_EXT_EMULATOR_SEED is the
// default.
void set_seed(uint64_t seed);
// Compute capability (80, 89, 90) whose limit of shared memory counts; 0, the default: the smallest of the three.
void set_architecture(int architecture);

struct PendingCopy {
  size_t to;         // offset in shared memory
  const void* from;  // nullptr: zeros
  size_t bytes;
};

// One emulated thread.
struct Thread {
  Fiber fiber;
  unsigned linear = 0;
  dim3 index;
  bool left = false;               // has returned from the kernel
  const char* waits_in = nullptr;  // what it waits for, if it does
  Site waits_at{};
  std::vector<PendingCopy> open;  // asynchronous copies that no group contains yet
  std::vector<std::vector<PendingCopy>> groups;
  uint32_t clock = 0;                                 // advances at every synchronisation
  std::shared_ptr<const std::vector<uint32_t>> seen;  // clocks of all threads whose doings this one may rely on

  unsigned warp() const { return linear / kWarpSize; }
  unsigned lane() const { return linear % kWarpSize; }
};

// Operands of a warp-wide operation, by lane; nullptr outside the mask.
struct Lanes {
  unsigned mask;
  const void* in[kWarpSize];
  void* out[kWarpSize];
};

class Block {
 public:
  Block(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes);
  ~Block();

  void run(dim3 index, const std::function<void()>& body, uint64_t seed);

  // Called by the thread that runs.
  Thread& thread() { return *threads_[current_]; }
  const dim3& index() const { return index_; }
  const dim3& grid() const { return grid_; }
  const dim3& size() const { return block_; }
  void barrier(int id, unsigned count, Site site);
  // The last lane of `mask` to arrive applies `operation` for all; `orders_memory` makes it a __syncwarp.
  void collective(const char* name, unsigned mask, const void* in, void* out, void (*operation)(const Lanes&),
                  Site site, bool orders_memory = false);
  [[noreturn]] void fault(const std::string& what);

  // Shared memory: checked, then touched. The second reads on behalf of a lane of the warp that runs.
  void read_shared(size_t offset, void* to, size_t bytes);
  void read_shared_by_lane(int lane, size_t offset, void* to, size_t bytes);
  void write_shared(size_t offset, const void* from, size_t bytes);
  void copy_async(size_t to, const void* from, size_t bytes);
  void commit_copies();
  void wait_copies(size_t groups_in_flight);
  size_t shared_bytes() const { return shared_.size(); }

  static Block* active();  // of this OS thread

 private:
  struct Barrier {
    unsigned count = 0;
    Site site{};
    std::vector<unsigned> waiting;
  };
  struct Meeting {
    const char* name;
    Site site;
    unsigned warp, arrived;
    Lanes lanes;
  };

  static void thread_entry(void* self);
  void wait(const char* in, Site at);
  void synchronise(const std::vector<unsigned>& threads);  // each sees all that the others did
  void check_exit();
  [[noreturn]] void stuck();
  std::string name_of(unsigned thread) const;
  void check_conflict(const char* verb, size_t offset, const Shadow::Conflict& conflict);

  const char* kernel_;
  dim3 grid_, block_, index_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<unsigned> ready_;
  unsigned current_ = 0, alive_ = 0;
  uint32_t time_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
  std::vector<Barrier> barriers_;
  std::vector<Meeting> meetings_;
  std::vector<unsigned char> shared_;
  Shadow shadow_;
};

// kernel<<<grid, block, shared_bytes, stream>>>: runs `body` once per thread, all blocks one after the other, at once.
cuda::cudaError_t launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, cuda::cudaStream_t stream,
                         const std::function<void()>& body);

}  // namespace sana_ext::emulator
