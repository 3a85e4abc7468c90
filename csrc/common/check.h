// Argument errors of the glue. The public Python functions explain bad input at length; these checks keep a direct call
// of torch.ops.sana_ext.* from reading outside a tensor.
#pragma once
#include <sstream>
#include <stdexcept>

namespace sana_ext {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "sana_ext: ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

}  // namespace sana_ext
