#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define SANA_EXT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SANA_EXT_ASAN 1
#endif
#endif
#ifdef SANA_EXT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Pushes the registers that a function must preserve, stores the stack pointer to *save, and goes on where `to` was
// saved. A system call less per switch than swapcontext().
extern "C" void sana_ext_emulator_switch(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl sana_ext_emulator_switch
.hidden sana_ext_emulator_switch
.type sana_ext_emulator_switch, @function
sana_ext_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sana_ext_emulator_switch, .-sana_ext_emulator_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl sana_ext_emulator_switch
.hidden sana_ext_emulator_switch
.type sana_ext_emulator_switch, %function
sana_ext_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size sana_ext_emulator_switch, .-sana_ext_emulator_switch
)");
#else
#error "the emulator's context switch is written for x86-64 and AArch64"
#endif

namespace sana_ext::emulator {
namespace {

#ifdef SANA_EXT_ASAN
constexpr size_t kStackSize = 256 << 10;  // frames are several times larger there
#else
constexpr size_t kStackSize = 64 << 10;
#endif

thread_local Fiber* starting = nullptr;

size_t page_size() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// A stack on which the switch finds saved registers (zeros) and returns into `function`.
void* first_context(char* top, void (*function)()) {
  const auto address = reinterpret_cast<uintptr_t>(function);
#if defined(__x86_64__)
  char* context = top - 8 * sizeof(uintptr_t);  // six registers, the address, and one word that aligns the stack
  std::memset(context, 0, 8 * sizeof(uintptr_t));
  std::memcpy(context + 6 * sizeof(uintptr_t), &address, sizeof address);
#else
  char* context = top - 160;
  std::memset(context, 0, 160);
  std::memcpy(context + 88, &address, sizeof address);  // x30
#endif
  return context;
}

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, page_size() + kStackSize, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(memory);
  stack_ = mapping_ + page_size();
  mprotect(mapping_, page_size(), PROT_NONE);
}

Fiber::~Fiber() {
#ifdef SANA_EXT_ASAN
  __asan_unpoison_memory_region(stack_, kStackSize);
#endif
  munmap(mapping_, page_size() + kStackSize);
}

void Fiber::start(void (*entry)(void*), void* argument) {
#ifdef SANA_EXT_ASAN
  __asan_unpoison_memory_region(stack_, kStackSize);  // what a forgotten entry left behind
#endif
  entry_ = entry;
  argument_ = argument;
  asan_.own_fake_stack = nullptr;
  own_context_ = first_context(stack_ + kStackSize, [] { run(); });
}

void Fiber::run() {
  Fiber* self = starting;
#ifdef SANA_EXT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &self->asan_.resumer_stack, &self->asan_.resumer_stack_size);
#endif
  self->entry_(self->argument_);
  self->leave(true);
  __builtin_unreachable();
}

void Fiber::resume() {
  starting = this;
#ifdef SANA_EXT_ASAN
  __sanitizer_start_switch_fiber(&asan_.resumer_fake_stack, stack_, kStackSize);
#endif
  sana_ext_emulator_switch(&resumer_context_, own_context_);
#ifdef SANA_EXT_ASAN
  __sanitizer_finish_switch_fiber(asan_.resumer_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::yield() { leave(false); }

void Fiber::leave(bool for_good) {
#ifdef SANA_EXT_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &asan_.own_fake_stack, asan_.resumer_stack,
                                 asan_.resumer_stack_size);
#endif
  (void)for_good;
  sana_ext_emulator_switch(&own_context_, resumer_context_);
#ifdef SANA_EXT_ASAN
  __sanitizer_finish_switch_fiber(asan_.own_fake_stack, &asan_.resumer_stack, &asan_.resumer_stack_size);
#endif
}

}  // namespace sana_ext::emulator
