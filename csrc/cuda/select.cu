// Launcher of select.cuh, without torch: contiguous arrays on the device of the current context.
#include <cuda_runtime.h>

#include "select.cuh"

// Returns a cudaError_t. The caller has checked shapes, and that there is a row; every number to keep is at most the
// tokens of its row. kv_lens: null if all rows have max_kv_len tokens.
extern "C" __attribute__((visibility("default"))) int32_t kvevict_cuda_select(
    const float* scores, const int64_t* num_kept, const int64_t* kv_lens, bool* kept,
    int64_t num_rows, int64_t max_kv_len, int64_t num_sink, int64_t num_recent, cudaStream_t stream) {
  kvevict::select_kernel<<<static_cast<unsigned>(num_rows), kvevict::SELECT_THREADS, 0, stream>>>(
      scores, num_kept, kv_lens, kept, max_kv_len, num_sink, num_recent);
  return static_cast<int32_t>(cudaGetLastError());
}
