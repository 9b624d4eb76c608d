/* Stands in for the CUDA driver and for the libraries beside it: memory is the host's, and kernels
 * are counted, not run. XLA's own runtime above it allocates, records, updates and launches command
 * buffers as it does on a GPU. Only what XLA calls is here; the rest it finds missing and reports.
 *
 * One source for all libraries: each has the same symbols, and only those of its own are looked up.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef uint64_t address; /* CUdeviceptr */
typedef int result;       /* CUresult and its like in the other libraries; 0 is success */

static const result OUT_OF_MEMORY = 2;
static const int CUDA = 13000;       /* version 13.0 */
static const size_t GIB = 1ul << 30;

/* What the driver was asked to do, for the tests. */
static struct {
    long kernels;   /* launched one by one */
    long launches;  /* of graphs */
    long nodes;     /* added to graphs */
    long updates;   /* of nodes in graphs that can be launched */
    long instances; /* graphs made ready for launch */
} counted;

void standin_counts(long out[5]) { memcpy(out, &counted, sizeof counted); }

static void *object(void) { return calloc(1, 512); }

/* Device: one H100, as far as XLA asks (CUdevice_attribute). */
result cuInit(unsigned flags) { return 0; }
result cuDriverGetVersion(int *version) { *version = CUDA; return 0; }
result cuDeviceGetCount(int *count) { *count = 1; return 0; }
result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
result cuDeviceGetName(char *name, int size, int device) {
    snprintf(name, size, "stand-in for an H100");
    return 0;
}
result cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 8 * GIB; return 0; }
result cuDeviceGetPCIBusId(char *id, int size, int device) {
    snprintf(id, size, "0000:00:00.0");
    return 0;
}
result cuDeviceGetAttribute(int *value, int attribute, int device) {
    static const struct { int attribute, value; } known[] = {
        {1, 1024}, {2, 1024}, {3, 1024}, {4, 64},          /* threads of a block, x, y, z */
        {5, 2147483647}, {6, 65535}, {7, 65535},           /* blocks of a grid */
        {8, 49152}, {81, 233472}, {97, 232448},            /* shared memory */
        {10, 32}, {12, 65536}, {82, 65536}, {39, 2048},    /* warp, registers, threads */
        {13, 1980000}, {36, 2619000}, {37, 5120},          /* clocks, kHz; width of the bus, bits */
        {16, 132}, {38, 52428800}, {75, 9}, {76, 0},       /* multiprocessors, L2, capability 9.0 */
        {40, 3}, {41, 1}, {106, 32}, {111, 1024},
        {102, 1},                                          /* virtual memory management */
    };
    *value = 0;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].attribute == attribute) *value = known[i].value;
    return 0;
}

/* Contexts, streams, events: everything is done at once, in the calling thread. */
static __thread void *context;
result cuDevicePrimaryCtxRetain(void **out, int device) { *out = &counted; return 0; }
result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return 0;
}
result cuCtxGetCurrent(void **out) { *out = context; return 0; }
result cuCtxSetCurrent(void *now) { context = now; return 0; }
result cuCtxSynchronize(void) { return 0; }
result cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}
result cuStreamCreate(void **stream, unsigned flags) { *stream = object(); return 0; }
result cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    return cuStreamCreate(stream, flags);
}
result cuStreamDestroy_v2(void *stream) { return 0; }
result cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
result cuStreamQuery(void *stream) { return 0; }
result cuStreamSynchronize(void *stream) { return 0; }
result cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
result cuLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
    function(data);
    return 0;
}
result cuEventCreate(void **event, unsigned flags) { *event = object(); return 0; }
result cuEventDestroy_v2(void *event) { return 0; }
result cuEventQuery(void *event) { return 0; }
result cuEventRecord(void *event, void *stream) { return 0; }
result cuEventSynchronize(void *event) { return 0; }

/* Memory: reserved addresses are backed when they are touched. */
result cuMemGetInfo_v2(size_t *available, size_t *total) {
    *available = 7 * GIB;
    *total = 8 * GIB;
    return 0;
}
result cuMemHostAlloc(void **out, size_t bytes, unsigned flags) {
    return posix_memalign(out, 4096, bytes) ? OUT_OF_MEMORY : 0;
}
result cuMemFreeHost(void *memory) { free(memory); return 0; }
result cuMemAlloc_v2(address *out, size_t bytes) { return cuMemHostAlloc((void **)out, bytes, 0); }
result cuMemFree_v2(address memory) { free((void *)memory); return 0; }
result cuMemGetAllocationGranularity(size_t *bytes, const void *what, int option) {
    *bytes = 2ul << 20;
    return 0;
}
result cuMemAddressReserve(address *out, size_t bytes, size_t aligned, address at, uint64_t flags) {
    void *found = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *out = (address)found;
    return found == MAP_FAILED ? OUT_OF_MEMORY : 0;
}
result cuMemAddressFree(address memory, size_t bytes) {
    return munmap((void *)memory, bytes) ? OUT_OF_MEMORY : 0;
}
result cuMemCreate(uint64_t *handle, size_t bytes, const void *what, uint64_t flags) {
    *handle = (uint64_t)object();
    return 0;
}
result cuMemRelease(uint64_t handle) { return 0; }
result cuMemMap(address at, size_t bytes, size_t offset, uint64_t handle, uint64_t flags) {
    return 0;
}
result cuMemUnmap(address at, size_t bytes) { return 0; }
result cuMemSetAccess(address at, size_t bytes, const void *what, size_t count) { return 0; }
result cuMemcpyDtoDAsync_v2(address to, address from, size_t bytes, void *stream) {
    memmove((void *)to, (void *)from, bytes);
    return 0;
}
result cuMemcpyHtoDAsync_v2(address to, const void *from, size_t bytes, void *stream) {
    memmove((void *)to, from, bytes);
    return 0;
}
result cuMemcpyDtoHAsync_v2(void *to, address from, size_t bytes, void *stream) {
    memmove(to, (void *)from, bytes);
    return 0;
}
result cuMemsetD8Async(address to, unsigned char value, size_t bytes, void *stream) {
    memset((void *)to, value, bytes);
    return 0;
}
result cuMemsetD32Async(address to, unsigned value, size_t count, void *stream) {
    for (size_t i = 0; i < count; i++) ((unsigned *)to)[i] = value;
    return 0;
}
result cuPointerGetAttribute(void *out, int attribute, address memory) {
    if (attribute == 2) *(unsigned *)out = 2; /* the type of memory: a device's */
    else if (attribute == 3 || attribute == 4) *(address *)out = memory;
    else *(unsigned *)out = 0;
    return 0;
}
result cuPointerGetAttributes(unsigned count, int *attributes, void **out, address memory) {
    for (unsigned i = 0; i < count; i++) cuPointerGetAttribute(out[i], attributes[i], memory);
    return 0;
}

/* Kernels: loaded, and counted instead of run. */
result cuModuleLoadData(void **module, const void *image) { *module = object(); return 0; }
result cuModuleUnload(void *module) { return 0; }
result cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = object();
    return 0;
}
result cuModuleGetGlobal_v2(address *out, size_t *bytes, void *module, const char *name) {
    *bytes = 1 << 20;
    return cuMemAlloc_v2(out, *bytes);
}
result cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0; /* threads of a block; registers */
    return 0;
}
result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
result cuFuncSetCacheConfig(void *function, int config) { return 0; }
result cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
    counted.kernels++;
    return 0;
}

/* Graphs: XLA's command buffers. */
result cuGraphCreate(void **graph, unsigned flags) { *graph = object(); return 0; }
result cuGraphDestroy(void *graph) { return 0; }
result cuGraphAddNode_v2(void **node, void *graph, void *const *after, const void *edges,
                         size_t count, void *what) {
    counted.nodes++;
    *node = object();
    return 0;
}
result cuGraphAddNode(void **node, void *graph, void *const *after, size_t count, void *what) {
    return cuGraphAddNode_v2(node, graph, after, NULL, count, what);
}
result cuGraphNodeGetType(void *node, int *type) { *type = 0; /* a kernel */ return 0; }
result cuGraphInstantiateWithFlags(void **ready, void *graph, uint64_t flags) {
    counted.instances++;
    *ready = object();
    return 0;
}
result cuGraphExecNodeSetParams(void *ready, void *node, void *what) {
    counted.updates++;
    return 0;
}
result cuGraphExecDestroy(void *ready) { return 0; }
result cuGraphLaunch(void *ready, void *stream) { counted.launches++; return 0; }

/* The runtime library, with which XLA registers its own kernels. */
void **__cudaRegisterFatBinary(void *binary) { return object(); }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(void) {}
void __cudaRegisterVar(void) {}
result cudaDriverGetVersion(int *version) { return cuDriverGetVersion(version); }
result cudaRuntimeGetVersion(int *version) { return cuDriverGetVersion(version); }
result cudaGetDeviceCount(int *count) { return cuDeviceGetCount(count); }
result cudaPeekAtLastError(void) { return 0; }

/* The management library. What it does not know is an error that XLA puts up with. */
static const result NOT_SUPPORTED = 3;
result nvmlInit_v2(void) { return 0; }
const char *nvmlErrorString(result code) { return "not supported by the stand-in"; }
result nvmlSystemGetDriverVersion(char *version, unsigned size) {
    snprintf(version, size, "580.0");
    return 0;
}
result nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) {
    *device = &counted;
    return 0;
}
result nvmlDeviceGetCurrPcieLinkGeneration(void *device, unsigned *generation) {
    *generation = 5;
    return 0;
}
result nvmlDeviceGetFieldValues(void *device, int count, void *values) { return NOT_SUPPORTED; }
result nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *later) { return NOT_SUPPORTED; }
result nvmlSystemGetConfComputeState(void *state) { return NOT_SUPPORTED; }

/* Matrix products: no algorithm is offered, so that XLA makes kernels of its own. */
result cublasCreate_v2(void **handle) { *handle = object(); return 0; }
result cublasLtCreate(void **handle) { *handle = object(); return 0; }
result cublasLtMatmulDescCreate(void **out) { *out = object(); return 0; }
result cublasLtMatmulDescDestroy(void *it) { return 0; }
result cublasLtMatmulDescSetAttribute(void *it, int which, const void *value, size_t bytes) {
    return 0;
}
result cublasLtMatmulPreferenceCreate(void **out) { *out = object(); return 0; }
result cublasLtMatmulPreferenceDestroy(void *it) { return 0; }
result cublasLtMatmulPreferenceSetAttribute(void *it, int which, const void *value, size_t bytes) {
    return 0;
}
result cublasLtMatrixLayoutCreate(void **out) { *out = object(); return 0; }
result cublasLtMatrixLayoutDestroy(void *it) { return 0; }
result cublasLtMatrixLayoutGetAttribute(void *it, int which, void *out, size_t bytes, size_t *n) {
    return 0;
}
result cublasLtMatrixLayoutSetAttribute(void *it, int which, const void *value, size_t bytes) {
    return 0;
}
result cublasLtMatmulAlgoGetHeuristic(void *handle, void *what, void *a, void *b, void *c, void *d,
                                      void *preference, int most, void *out, int *found) {
    *found = 0;
    return 0;
}

/* The profiler's library: without it, XLA's profiler shows nothing of the host either. */
result cuptiActivityDisable(int kind) { return 0; }
result cuptiActivityEnable(int kind) { return 0; }
result cuptiActivityFlushAll(unsigned flags) { return 0; }
result cuptiActivityRegisterCallbacks(void *request, void *complete) { return 0; }
result cuptiActivitySetAttribute(int which, size_t *bytes, void *value) { return 0; }
result cuptiEnableCallback(unsigned enable, void *it, int domain, int id) { return 0; }
result cuptiFinalize(void) { return 0; }
result cuptiSetThreadIdType(int type) { return 0; }
result cuptiSubscribe(void **it, void *callback, void *data) { *it = object(); return 0; }
result cuptiUnsubscribe(void *it) { return 0; }
result cuptiGetTimestamp(uint64_t *ns) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    *ns = now.tv_sec * 1000000000ul + now.tv_nsec;
    return 0;
}
