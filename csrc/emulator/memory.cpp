#include "memory.h"

#include <cstdint>
#include <vector>

namespace sana_ext::emulator {
namespace {

struct Range {
  std::string name;
  uintptr_t begin, end;
  bool writable;
  std::vector<uint32_t> writer;  // by byte: number of the block + 1, 0 for nobody
};

thread_local std::vector<Range> ranges;

}  // namespace

GlobalMemory::GlobalMemory(const char* name, const void* data, size_t bytes, bool writable) : data_(data) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  ranges.push_back({name, begin, begin + bytes, writable, {}});
}

GlobalMemory::~GlobalMemory() {
  for (size_t i = ranges.size(); i-- > 0;) {
    if (ranges[i].begin != reinterpret_cast<uintptr_t>(data_)) continue;
    ranges.erase(ranges.begin() + static_cast<std::ptrdiff_t>(i));
    return;
  }
}

void begin_launch() {
  for (Range& range : ranges)
    if (range.writable) range.writer.assign(range.end - range.begin, 0);
}

std::string check_global(const void* address, size_t bytes, bool write, uint32_t block) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const Range *inside = nullptr, *nearest = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  bool shared = false;  // with another block
  for (Range& range : ranges) {
    if (at >= range.begin && at + bytes <= range.end && (!write || range.writable)) {
      for (size_t i = at - range.begin; range.writable && i < at - range.begin + bytes; ++i) {
        shared = shared || (range.writer[i] != 0 && range.writer[i] != block + 1);
        if (write) range.writer[i] = block + 1;
      }
      if (at % bytes == 0 && !shared) return {};
      inside = &range;
    }
    const uintptr_t apart = at >= range.end ? at - range.end : at < range.begin ? range.begin - at : 0;
    if (apart < distance) distance = apart, nearest = &range;
  }
  const std::string access = std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes";
  if (inside != nullptr && shared)
    return access + " at byte " + std::to_string(at - inside->begin) + " of " + inside->name +
           ", which another block of this launch writes";
  if (inside != nullptr)
    return access + " at byte " + std::to_string(at - inside->begin) + " of " + inside->name +
           ", an address that is no multiple of " + std::to_string(bytes);
  if (nearest == nullptr) return access + " in global memory where none is known";
  if (write && !nearest->writable && at >= nearest->begin && at + bytes <= nearest->end)
    return access + " to " + nearest->name + ", which is an input";
  const bool before = at < nearest->begin;
  const uintptr_t offset = before ? nearest->begin - at : at - nearest->begin;
  return "out of bounds: " + access + " at byte " + (before ? "-" : "") + std::to_string(offset) + " of " +
         nearest->name + ", which has " + std::to_string(nearest->end - nearest->begin) + " bytes";
}

}  // namespace sana_ext::emulator
