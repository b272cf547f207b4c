/* A libcuda.so.1 for machines without one: there is a device, and it has a context. Nothing else is ever called. */
#define DONE(name) int name(void) { return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
DONE(cuCtxGetCurrent) DONE(cuCtxSetCurrent) DONE(cuDeviceGet) DONE(cuDeviceGetAttribute) DONE(cuDevicePrimaryCtxRetain)
DONE(cuFuncGetAttribute) DONE(cuFuncSetAttribute) DONE(cuFuncSetCacheConfig) DONE(cuGetErrorString)
DONE(cuLaunchCooperativeKernel) DONE(cuLaunchKernel) DONE(cuLinkAddData_v2) DONE(cuLinkComplete) DONE(cuLinkCreate_v2)
DONE(cuModuleGetFunction) DONE(cuModuleLoad) DONE(cuModuleLoadData) DONE(cuModuleLoadDataEx) DONE(cuModuleUnload)
DONE(cuOccupancyMaxActiveBlocksPerMultiprocessor) DONE(cuPointerGetAttribute) DONE(cuTensorMapEncodeTiled)
