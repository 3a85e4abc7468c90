#include "shadow.h"

#include "block.h"

namespace sana_ext::emulator {
namespace {

// Whether what `other` did at `clock` is ordered before what `thread` does now.
bool ordered(int16_t other, uint32_t clock, const Thread& thread) {
  return static_cast<unsigned>(other) == thread.linear || (*thread.seen)[static_cast<size_t>(other)] >= clock;
}

}  // namespace

void Shadow::reset(size_t bytes) {
  cells_.assign(bytes, Cell{});
  readers_.clear();
}

Shadow::Conflict Shadow::read(size_t offset, size_t bytes, const Thread& thread) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = cells_[i];
    if (cell.copier != kNobody) return {Kind::kInFlight, static_cast<unsigned>(cell.copier)};
    if (cell.writer == kNobody) return {Kind::kUninitialised, 0};
    if (!ordered(cell.writer, cell.write_clock, thread))
      return {Kind::kReadAfterWrite, static_cast<unsigned>(cell.writer)};
    const auto self = static_cast<int16_t>(thread.linear);
    if (cell.readers == 0 && (cell.reader == kNobody || ordered(cell.reader, cell.read_clock, thread))) {
      cell.reader = self, cell.read_clock = thread.clock;
      continue;
    }
    if (cell.readers == 0) {
      readers_.push_back({{cell.reader, cell.read_clock}});
      cell.readers = static_cast<uint32_t>(readers_.size());
    }
    auto& readers = readers_[cell.readers - 1];
    bool known = false;
    for (Reader& reader : readers) {
      if (reader.thread != self) continue;
      reader.clock = thread.clock;
      known = true;
    }
    if (!known) readers.push_back({self, thread.clock});
  }
  return {};
}

Shadow::Conflict Shadow::check_write(const Cell& cell, const Thread& thread) const {
  if (cell.copier != kNobody) return {Kind::kInFlight, static_cast<unsigned>(cell.copier)};
  if (cell.writer != kNobody && !ordered(cell.writer, cell.write_clock, thread))
    return {Kind::kWriteAfterWrite, static_cast<unsigned>(cell.writer)};
  if (cell.reader != kNobody && !ordered(cell.reader, cell.read_clock, thread))
    return {Kind::kWriteAfterRead, static_cast<unsigned>(cell.reader)};
  if (cell.readers == 0) return {};
  for (const Reader& reader : readers_[cell.readers - 1])
    if (!ordered(reader.thread, reader.clock, thread))
      return {Kind::kWriteAfterRead, static_cast<unsigned>(reader.thread)};
  return {};
}

Shadow::Conflict Shadow::write(size_t offset, size_t bytes, const Thread& thread) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    const Conflict conflict = check_write(cells_[i], thread);
    if (conflict.kind != Kind::kNone) return conflict;
    cells_[i] = Cell{thread.clock, 0, static_cast<int16_t>(thread.linear), kNobody, kNobody, 0};
  }
  return {};
}

Shadow::Conflict Shadow::begin_copy(size_t offset, size_t bytes, const Thread& thread) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    const Conflict conflict = check_write(cells_[i], thread);
    if (conflict.kind != Kind::kNone) return conflict;
    cells_[i].copier = static_cast<int16_t>(thread.linear);
  }
  return {};
}

void Shadow::end_copy(size_t offset, size_t bytes, const Thread& thread) {
  for (size_t i = offset; i < offset + bytes; ++i)
    cells_[i] = Cell{thread.clock, 0, static_cast<int16_t>(thread.linear), kNobody, kNobody, 0};
}

}  // namespace sana_ext::emulator
