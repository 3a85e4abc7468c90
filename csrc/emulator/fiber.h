// Cooperative threads on one OS thread: each has its own stack, runs until it yields, and is resumed by its creator.
#pragma once
#include <cstddef>

namespace sana_ext::emulator {

class Fiber {
 public:
  Fiber();  // maps a stack with a guard page below it, which all later entries use
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(argument). A fiber that has not returned from its last entry is forgotten: nothing
  // on its stack is destroyed.
  void start(void (*entry)(void*), void* argument);
  void resume();  // returns when the fiber yields or its entry returns; no exception may leave the entry
  void yield();   // called on the fiber itself

 private:
  [[noreturn]] static void run();
  void leave(bool for_good);

  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  char* mapping_ = nullptr;
  char* stack_ = nullptr;  // lowest usable byte
  void* own_context_ = nullptr;
  void* resumer_context_ = nullptr;
  // What AddressSanitizer wants to know of both stacks.
  struct {
    void *own_fake_stack = nullptr, *resumer_fake_stack = nullptr;
    const void* resumer_stack = nullptr;
    size_t resumer_stack_size = 0;
  } asan_;
};

}  // namespace sana_ext::emulator
