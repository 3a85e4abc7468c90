// Who touched which byte of shared memory last. Two threads touch a byte in an order that the program fixes only if
// some synchronisation lies between; each thread's clock counts its synchronisations, and each thread knows up to which
// clock of every other thread it may rely on (`seen`).
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sana_ext::emulator {

struct Thread;

class Shadow {
 public:
  enum class Kind { kNone, kUninitialised, kInFlight, kReadAfterWrite, kWriteAfterWrite, kWriteAfterRead };
  struct Conflict {
    Kind kind = Kind::kNone;
    unsigned other = 0;  // the other thread
  };

  void reset(size_t bytes);
  // Each notes the access and tells what is wrong with the first bad byte, if any.
  Conflict read(size_t offset, size_t bytes, const Thread& thread);
  Conflict write(size_t offset, size_t bytes, const Thread& thread);
  Conflict begin_copy(size_t offset, size_t bytes, const Thread& thread);  // in flight from now on
  void end_copy(size_t offset, size_t bytes, const Thread& thread);        // counts as written now

 private:
  static constexpr int16_t kNobody = -1;
  struct Cell {
    uint32_t write_clock = 0, read_clock = 0;
    int16_t writer = kNobody, reader = kNobody, copier = kNobody;
    uint32_t readers = 0;  // more than one: index + 1 into readers_
  };
  struct Reader {
    int16_t thread;
    uint32_t clock;
  };

  Conflict check_write(const Cell& cell, const Thread& thread) const;

  std::vector<Cell> cells_;
  std::vector<std::vector<Reader>> readers_;
};

}  // namespace sana_ext::emulator
