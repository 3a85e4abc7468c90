// sana_ext._C: what was built. It holds no kernel, and its absence disables none.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of sana_ext.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = SANA_EXT_VERSION;
    info["compiler"] = "" __VERSION__;
    info["torch_at_build"] = SANA_EXT_TORCH;
    info["torch_target"] = SANA_EXT_TORCH_TARGET;
    info["libraries"] = SANA_EXT_LIBRARIES;
    info["nvcc"] = SANA_EXT_NVCC;
    info["cuda"] = SANA_EXT_CUDA;
    info["cuda_architectures"] = SANA_EXT_CUDA_ARCHITECTURES;
    return info;
  });
}
