// Which global memory a kernel may touch. Accesses outside, unaligned ones, writes to inputs, and bytes that two blocks
// of a launch write, or one writes and another reads, are faults.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace sana_ext::emulator {

// Makes [data, data + bytes) known to launches of this OS thread while it lives.
class GlobalMemory {
 public:
  GlobalMemory(const char* name, const void* data, size_t bytes, bool writable);
  ~GlobalMemory();
  GlobalMemory(const GlobalMemory&) = delete;
  GlobalMemory& operator=(const GlobalMemory&) = delete;

 private:
  const void* data_;
};

// Forgets which block wrote what.
void begin_launch();
// What is wrong with an access by block number `block`, or an empty string. `bytes` is a power of two.
std::string check_global(const void* address, size_t bytes, bool write, uint32_t block);

}  // namespace sana_ext::emulator
