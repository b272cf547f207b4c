/* What autograd asks of the CUDA runtime: one device, one stream on which all work is done already. Loaded before the
   real library, whose other functions stay as they are. */
#include <stddef.h>
#define DONE(name) int name(void) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)1; return 0; }
DONE(cudaSetDevice) DONE(cudaGetLastError) DONE(cudaPeekAtLastError) DONE(cudaStreamQuery) DONE(cudaStreamSynchronize)
DONE(cudaDeviceSynchronize) DONE(cudaThreadExchangeStreamCaptureMode) DONE(cudaEventQuery) DONE(cudaEventRecord)
DONE(cudaEventRecordWithFlags) DONE(cudaEventDestroy) DONE(cudaStreamWaitEvent)
