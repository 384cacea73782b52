// A libcuda.so.1 for tests: "images" are paths of emulated kernels (kernel_emulator.py), launched on the CPU.
// Refuses what the real one refuses: launches without the right current context, and unannounced shared memory.
#include <dlfcn.h>

#include <map>
#include <vector>

#include "tensor_map.h"

namespace {
enum { kOk = 0, kInvalidValue = 1, kInvalidContext = 201, kFileNotFound = 301, kNotFound = 500, kLaunchFailed = 719 };
int primary_context;
std::vector<void*> current_contexts;
std::map<void*, void*> module_of;
std::map<void*, int> shared_limit;
bool has_context() { return !current_contexts.empty() && current_contexts.back() == &primary_context; }
}  // namespace

extern "C" {
void* last_stream;
int num_launches;

int cuInit(unsigned flags) { return flags ? kInvalidValue : kOk; }

int cuDeviceGet(int* device, int ordinal) {
  *device = 40 + ordinal;
  return ordinal == 0 ? kOk : 101;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &primary_context;
  return device == 40 ? kOk : 101;
}

int cuCtxPushCurrent_v2(void* context) {
  current_contexts.push_back(context);
  return kOk;
}

int cuCtxPopCurrent_v2(void** context) {
  if (current_contexts.empty()) return kInvalidContext;
  *context = current_contexts.back();
  current_contexts.pop_back();
  return kOk;
}

int num_current_contexts() { return static_cast<int>(current_contexts.size()); }

int cuModuleLoadData(void** module, const char* image) {
  if (!has_context()) return kInvalidContext;
  *module = dlopen(image, RTLD_NOW | RTLD_LOCAL);
  return *module ? kOk : kFileNotFound;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = dlsym(module, name);
  if (!*function) return kNotFound;
  module_of[*function] = module;
  shared_limit[*function] = 48 << 10;
  return kOk;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8 || !has_context()) return kInvalidValue;
  shared_limit[function] = value;
  return kOk;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y,
                   unsigned z, unsigned shared_bytes, void* stream, void** params, void** extra) {
  if (!has_context()) return kInvalidContext;
  if (grid_z != 1 || y != 1 || z != 1 || extra || static_cast<int>(shared_bytes) > shared_limit[function])
    return kInvalidValue;
  typedef int (*Emulate)(void*, const void*, unsigned, unsigned, int, int, unsigned);
  Emulate emulate = reinterpret_cast<Emulate>(dlsym(module_of[function], "gd_emulate"));
  last_stream = stream;
  num_launches++;
  return emulate(function, params[0], grid_x, grid_y, x, shared_bytes, 1) == 0 ? kOk : kLaunchFailed;
}

int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* base, const uint64_t* sizes,
                           const uint64_t* strides, const unsigned* box, const unsigned* element_strides,
                           int interleave, int swizzle, int l2_promotion, int fill) {
  return encode_tensor_map(map, type, rank, base, sizes, strides, box, element_strides, interleave, swizzle,
                           l2_promotion, fill);
}

int cuGetErrorName(int error, const char** name) {
  *name = error == kNotFound ? "CUDA_ERROR_NOT_FOUND" : error == kInvalidValue ? "CUDA_ERROR_INVALID_VALUE" : nullptr;
  return *name ? kOk : kInvalidValue;
}
}
