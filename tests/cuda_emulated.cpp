// The kernels of csrc/ on a CPU, for test_kernels_cuda.py (ctypes): what the launchers do, without torch or a device.
#define AUTOTOOL_DEVICE "cuda_emulator.h"

#include "logits.cuh"
#include "policy.cuh"
#include "sample.cuh"

using namespace autotool;

namespace {

template <typename F>
void for_type(int item, F&& f) {
  if (item == 4) return f(static_cast<float*>(nullptr));
  f(static_cast<__nv_bfloat16*>(nullptr));
}

Scale scale(float value, const float* rows) { return {rows, 1, value}; }

}  // namespace

extern "C" {

const char* emulate_failure() { return emulator::failure; }

// cluster > 0: the ring in `clusters` clusters of so many blocks; 0: streamed, `wide` or not.
void emulate_logits_forward(
    int item, const void* logits, int64_t rows, int64_t vocab, int64_t stride_n, int64_t stride_v,
    const int64_t* target, int64_t ignore_index, float temperature, const float* row_temperature, float* out,
    int wide, int cluster, int clusters) {
  for_type(item, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const LogitsForward<T> p = {
        static_cast<const T*>(logits), rows, vocab, stride_n, stride_v, {target, 1, 8}, ignore_index,
        scale(temperature, row_temperature), {out, out + rows, out + 2 * rows, out + 3 * rows}};
    const int64_t part = cluster > 0 ? ring_part(vocab, cluster, kVector<T>) : 0;
    if (cluster > 0)
      emulator::launch(
          clusters * cluster, kThreads, sizeof(RingShared), cluster, [&] { ring_forward<T>(p, part); });
    else
      emulator::launch(rows, kThreads, kWarps * sizeof(Stats), 1, [&] {
        wide ? stream_forward<T, true>(p) : stream_forward<T, false>(p);
      });
  });
}

int emulate_fits_ring(int item, const void* logits, int64_t vocab, int64_t stride_n, int64_t stride_v) {
  int fits = 0;
  for_type(item, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    fits = fits_ring(static_cast<const T*>(logits), vocab, stride_n, stride_v);
  });
  return fits;
}

void emulate_logits_backward(
    int item, const float* grad_logp, const float* grad_entropy, const void* logits, int64_t rows, int64_t vocab,
    int64_t stride_n, int64_t stride_v, const int64_t* target, int64_t ignore_index, float temperature,
    const float* row_temperature, const float* stats, void* out, int64_t out_stride_n, int wide) {
  for_type(item, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const LogitsBackward<T> p = {
        static_cast<const T*>(logits), rows, vocab, stride_n, stride_v, {target, 1, 8}, ignore_index,
        scale(temperature, row_temperature), scale(0.f, grad_logp), scale(0.f, grad_entropy), stats + rows,
        stats + 2 * rows, stats + 3 * rows, static_cast<T*>(out), out_stride_n, stride_v};
    emulator::launch(rows * backward_blocks(vocab), kBackwardThreads, 128, 1, [&] {
      wide ? backward<T, true>(p) : backward<T, false>(p);
    });
  });
}

int emulate_sample(
    int item, const void* logits, int64_t rows, int64_t vocab, int64_t stride_n, int64_t stride_v, float temperature,
    const float* row_temperature, const int64_t* seed, const int64_t* offset, int64_t* token, float* out, int wide,
    int cluster) {
  const int parts = sample_parts(vocab);
  std::vector<Partial> partials(rows * parts);
  const Sampling p = {
      rows, vocab, stride_n, stride_v, scale(temperature, row_temperature), seed, offset, 1, 1, token, out,
      out + rows, partials.data(), wide != 0, cluster != 0};
  for_type(item, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* const start = static_cast<const T*>(logits);
    emulator::launch(
        rows * parts, kThreads, kSampleShared, cluster ? parts : 1, [&] { sample<T>(p, start, parts); });
    if (!cluster && parts > 1)
      emulator::launch(
          (rows + kMergeThreads - 1) / kMergeThreads, kMergeThreads, 128, 1,
          [&] { sample_merge<T>(p, start, parts); });
  });
  return parts;
}

int64_t emulate_policy_workspace(int64_t sequences) { return policy_workspace(sequences); }

void emulate_policy(
    const float* logp, const float* old_logp, const float* entropy, const float* advantages, const void* cu_seqlens,
    int cu_bytes, const bool* mask, const void* is_short, int short_bytes, int tokens, int sequences,
    const float* gate, int gate_on_device, float clip_low, float clip_high, int normalize, double constant,
    float* loss, float* sequence_entropy, float* metrics, float* grad_logp, float* grad_entropy, double* workspace,
    int cluster) {
  const PolicyLoss p = {
      logp, old_logp, entropy, advantages, {cu_seqlens, 1, cu_bytes}, {is_short, 1, short_bytes}, mask, tokens,
      sequences, gate[0], gate[1], gate[2], gate[3], gate_on_device ? gate : nullptr, clip_low, clip_high, normalize,
      constant, loss, sequence_entropy, metrics, grad_logp, grad_entropy, workspace};
  emulator::launch(kPolicyBlocks, kPolicyThreads, kPolicyShared, kPolicyBlocks, [&] {
    cluster ? policy_loss<true>(p) : policy_loss<false>(p);
  });
}

}  // extern "C"
