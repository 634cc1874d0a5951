/* The part of the CUDA driver that the runtime calls, on host memory, in the order of the calls: what is enqueued runs at
   once, and a graph, when it is launched, calls back. For tests of the calls on a machine without a GPU. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_CONTEXT = 201 };

static int started, streams, retained, devices = 1, broken;
static size_t limit = (size_t)1 << 30;
static void (*on_launch)(intptr_t);
static intptr_t blocks, handles;
/* As in CUDA, a thread has its own stack of contexts, and captures what it enqueues itself. */
static __thread int depth;
static __thread intptr_t capturing;

#define ADD(count, change) __atomic_add_fetch(&(count), change, __ATOMIC_SEQ_CST)

void standin_devices(int count) { devices = count; }
void standin_broken(int value) { broken = value; }
void standin_memory(size_t bytes) { limit = bytes; }
void standin_on_launch(void (*callback)(intptr_t)) { on_launch = callback; }
int standin_capturing(void) { return capturing != 0; }
intptr_t standin_next_graph(void) { return capturing; }
/* What is held: contexts, streams, blocks of memory, pushes. */
int standin_held(void) { return retained + streams + (int)blocks + depth; }

CUresult cuInit(unsigned int flags) { started = 1; return devices ? OK : 100; }
CUresult cuGetErrorName(CUresult code, const char **text) {
  *text = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR";
  return OK;
}
CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = code == OUT_OF_MEMORY ? "out of memory" : "no such thing";
  return OK;
}
CUresult cuDeviceGetCount(int *count) { *count = devices; return started ? OK : NOT_INITIALIZED; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal < devices ? OK : INVALID_VALUE; }
CUresult cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Stand-in", size); return OK; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : 9;
  return attribute == 75 || attribute == 76 ? OK : INVALID_VALUE;
}
CUresult cuDevicePrimaryCtxRetain(void **context, int device) {
  if (broken) return OUT_OF_MEMORY;
  ADD(retained, 1);
  *context = &retained;
  return OK;
}
CUresult cuDevicePrimaryCtxRelease_v2(int device) { ADD(retained, -1); return OK; }
CUresult cuCtxPushCurrent_v2(void *context) { if (context != &retained) return INVALID_VALUE; depth++; return OK; }
CUresult cuCtxPopCurrent_v2(void **context) { if (!depth) return NO_CONTEXT; depth--; *context = &retained; return OK; }
CUresult cuMemAlloc_v2(uint64_t *address, size_t size) {
  if (!depth) return NO_CONTEXT;
  if (size > limit) return OUT_OF_MEMORY;
  ADD(blocks, 1);
  *address = (uint64_t)(uintptr_t)malloc(size);
  return OK;
}
CUresult cuMemFree_v2(uint64_t address) { ADD(blocks, -1); free((void *)(uintptr_t)address); return depth ? OK : NO_CONTEXT; }
CUresult cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) {
  memcpy((void *)(uintptr_t)to, from, size);
  return depth ? OK : NO_CONTEXT;
}
CUresult cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
  memcpy(to, (void *)(uintptr_t)from, size);
  return depth ? OK : NO_CONTEXT;
}
CUresult cuStreamCreate(void **stream, unsigned int flags) {
  ADD(streams, 1);
  *stream = (void *)(uintptr_t)(0x1000 + ADD(handles, 1));
  return flags == 1 && depth ? OK : INVALID_VALUE;
}
CUresult cuStreamDestroy_v2(void *stream) { ADD(streams, -1); return OK; }
CUresult cuStreamSynchronize(void *stream) { return depth && !capturing ? OK : NO_CONTEXT; }
CUresult cuStreamBeginCapture_v2(void *stream, int mode) {
  if (!stream || mode != 1) return INVALID_VALUE;
  capturing = ADD(handles, 1);
  return OK;
}
CUresult cuStreamEndCapture(void *stream, void **graph) {
  if (!capturing) return INVALID_VALUE;
  *graph = (void *)capturing;
  capturing = 0;
  return OK;
}
CUresult cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
  *executable = graph;
  return flags ? INVALID_VALUE : OK;
}
CUresult cuGraphLaunch(void *executable, void *stream) { on_launch((intptr_t)executable); return OK; }
CUresult cuGraphExecDestroy(void *executable) { return OK; }
CUresult cuGraphDestroy(void *graph) { return OK; }
