// Schemas and CUDA implementations of the extension's ops, in torch's stable ABI.
//
// The Python side allocates the outputs, so that this library needs no allocator.
#include "torch.cuh"

namespace autotool {

void logits_forward(
    const Tensor& logits, const Tensor& target, double temperature, const std::optional<Tensor>& row_temperature,
    int64_t ignore_index, Tensor logp, Tensor entropy, Tensor row_max, Tensor log_sum);
void logits_backward(
    const std::optional<Tensor>& grad_logp, const std::optional<Tensor>& grad_entropy, const Tensor& logits,
    const Tensor& target, const Tensor& entropy, const Tensor& row_max, const Tensor& log_sum, double temperature,
    const std::optional<Tensor>& row_temperature, int64_t ignore_index, Tensor out);
void sample(
    const Tensor& logits, double temperature, const std::optional<Tensor>& row_temperature, const Tensor& seed,
    const Tensor& offset, Tensor token, Tensor logp, Tensor entropy, Tensor workspace);
void policy_loss(
    const Tensor& logp, const Tensor& old_logp, const Tensor& entropy, const Tensor& advantages,
    const Tensor& cu_seqlens, const Tensor& mask, const Tensor& is_short, double target_short, double target_long,
    double beta_short, double beta_long, const std::optional<Tensor>& gate, double clip_low, double clip_high,
    int64_t normalize, double constant, Tensor loss, Tensor sequence_entropy, Tensor metrics, Tensor grad_logp,
    Tensor grad_entropy, Tensor workspace);

}  // namespace autotool

// The architectures this library was built for, for the dispatcher.
extern "C" __attribute__((visibility("default"))) const char* autotool_architectures() {
  return AUTOTOOL_ARCHITECTURES;
}

STABLE_TORCH_LIBRARY(autotool_kernels_cuda, m) {
  m.def(
      "logits_forward(Tensor logits, Tensor target, float temperature, Tensor? row_temperature, int ignore_index, "
      "Tensor(a!) logp, Tensor(b!) entropy, Tensor(c!) row_max, Tensor(d!) log_sum) -> ()");
  m.def(
      "logits_backward(Tensor? grad_logp, Tensor? grad_entropy, Tensor logits, Tensor target, Tensor entropy, "
      "Tensor row_max, Tensor log_sum, float temperature, Tensor? row_temperature, int ignore_index, "
      "Tensor(a!) out) -> ()");
  m.def(
      "sample(Tensor logits, float temperature, Tensor? row_temperature, Tensor seed, Tensor offset, "
      "Tensor(a!) token, Tensor(b!) logp, Tensor(c!) entropy, Tensor(d!) workspace) -> ()");
  m.def(
      "policy_loss(Tensor logp, Tensor old_logp, Tensor entropy, Tensor advantages, Tensor cu_seqlens, Tensor mask, "
      "Tensor is_short, float target_short, float target_long, float beta_short, float beta_long, Tensor? gate, "
      "float clip_low, float clip_high, int normalize, float constant, Tensor(a!) loss, "
      "Tensor(b!) sequence_entropy, Tensor(c!) metrics, Tensor(d!) grad_logp, Tensor(e!) grad_entropy, "
      "Tensor(f!) workspace) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(autotool_kernels_cuda, CUDA, m) {
  m.impl("logits_forward", TORCH_BOX(&autotool::logits_forward));
  m.impl("logits_backward", TORCH_BOX(&autotool::logits_backward));
  m.impl("sample", TORCH_BOX(&autotool::sample));
  m.impl("policy_loss", TORCH_BOX(&autotool::policy_loss));
}
