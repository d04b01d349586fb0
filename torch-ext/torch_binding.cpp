// The ops of the kernel-builder variant (build.toml): schemas only, those of pyspec/ops. The bindings in
// csrc/ register their kernels for them, under the name that the builder gives each build
// (-Dpyspec=TORCH_EXTENSION_NAME).
#include <torch/csrc/stable/library.h>

#include "registration.h"  // made by the builder

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, m) {
  m.def(
      "block_masked_attention(Tensor q, Tensor k, Tensor v, Tensor full_ranges, Tensor full_tiles, "
      "Tensor partial_ranges, Tensor partial_tiles, Tensor bits, Tensor? row_order, Tensor? key_order, "
      "float scale, float? softcap) -> (Tensor, Tensor)");
  m.def(
      "causal_conv(Tensor(a!) window, Tensor(b!) record, Tensor x, Tensor weight, Tensor? bias, Tensor "
      "sequences, Tensor starts, Tensor parents, Tensor paths, Tensor halves, Tensor keeps, Tensor "
      "advances, ScalarType out_dtype) -> Tensor");
  m.def(
      "gear_encode(Tensor k, Tensor v, Tensor channels, int bits, int group, int rank, int outliers, "
      "bool rotate, int key_channels, bool fitted) -> Tensor");
  m.def(
      "gear_packed_attention(Tensor q, Tensor packed, Tensor seen, int bits, int group, int rank, int "
      "outliers, bool rotate, int key_channels, float scale) -> (Tensor, Tensor)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, int outputs, ScalarType out_dtype) -> Tensor");
  m.def("linear_rows(Tensor index, Tensor weight, int outputs, int inputs) -> Tensor");
  m.def(
      "llama_layers(Tensor(a!) hidden, Tensor[] weights, Tensor[] biases, Tensor last_norm, Tensor(b!) "
      "keys_values, Tensor cos_sin, Tensor positions, Tensor[] ancestor_bits, int[] sequences, int[] "
      "lengths, int[] windows, int heads, int intermediate, float epsilon) -> Tensor");
  m.def(
      "mamba_layers(Tensor(a!) hidden, Tensor[] weights, Tensor last_norm, Tensor(b!) states, "
      "Tensor(c!) windows, Tensor(d!) records, Tensor(e!) conv_records, Tensor sequences, Tensor "
      "starts, Tensor parents, Tensor paths, Tensor halves, Tensor keeps, Tensor advances, int dt_rank, "
      "float epsilon, ScalarType dtype) -> Tensor");
  m.def("merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)");
  m.def(
      "residual_vq(Tensor q, Tensor packed, Tensor seen, Tensor codebooks, float scale) -> (Tensor, "
      "Tensor)");
  m.def("residual_vq_encode(Tensor k, Tensor v, Tensor codebooks) -> Tensor");
  m.def(
      "rms_norm(Tensor(a!) hidden, Tensor? delta, Tensor weight, float epsilon, ScalarType out_dtype) "
      "-> Tensor");
  m.def(
      "rotary_write(Tensor qkv, Tensor cos_sin, Tensor positions, Tensor sequences, Tensor slots, "
      "Tensor(a!) keys, Tensor(b!) values, int heads) -> Tensor");
  m.def("row_statistics(Tensor logits, Tensor? tokens) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "selective_state(Tensor(a!) state, Tensor(b!) record, Tensor x, Tensor dt, Tensor A, Tensor B, "
      "Tensor C, Tensor? D, Tensor? dt_bias, Tensor? z, Tensor sequences, Tensor starts, Tensor "
      "parents, Tensor paths, Tensor halves, Tensor keeps, Tensor advances, ScalarType out_dtype) -> "
      "Tensor");
  m.def("swiglu(Tensor gate_up, ScalarType out_dtype) -> Tensor");
  m.def(
      "topk(Tensor x, int k, int buckets, int per_bucket, bool interleaved, bool largest, bool sorted) "
      "-> (Tensor, Tensor)");
  m.def(
      "tree_attention(Tensor q, Tensor k, Tensor v, Tensor ancestor_bits, Tensor prefix_lens, float "
      "scale, float? softcap, int? window, Tensor? block_table) -> (Tensor, Tensor)");
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
