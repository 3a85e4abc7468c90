// Which global memory a kernel may touch. Accesses outside, unaligned ones and writes to inputs are faults.
#pragma once
#include <cstddef>
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

// What is wrong with an access, or an empty string. `bytes` is a power of two.
std::string check_global(const void* address, size_t bytes, bool write);

}  // namespace sana_ext::emulator
