"""A family of models as a contributor would add one: Llama's layers, with entries and tensors of other names."""

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.llama import LlamaConfig, LlamaWeights
from pyspec.runners.attention import AttentionRunner

SHAPE = {"intermediate_size": 160, "heads": 4, "kv_heads": 2, "head_dim": 64, "context_length": 3000}


class ToyWeights(LlamaWeights):
    """All weights, by the names of toys; the forward is Llama's."""

    LAYERS = "toy.blocks."
    EMBEDDING = "toy.tokens.weight"
    NORM = "toy.norm.weight"


class ToyRunner(AttentionRunner):
    """A toy; see AttentionRunner."""

    takes_flash_attn = False


def read(source, entries, architecture) -> LlamaConfig:
    if entries.flag("has_wheels"):
        raise Unsupported(f"{source} has wheels, ToyRunner has none")
    sizes = {"vocab_size": entries.whole("tokens"), "hidden_size": entries.whole("width")}
    layers = entries.whole("blocks")
    return LlamaConfig("toy", layers=layers, norm_epsilon=1e-5, rope_base=10000.0, **sizes, **SHAPE)


def read_gguf(file, entries) -> LlamaConfig:
    return read(file.path, entries, "toy")


TENSORS = {
    "token_embd": "toy.tokens",
    "output_norm": "toy.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
DEFAULTS = {"ToyForCausalLM": {"blocks": 2, "has_wheels": False}}
FAMILIES.register(
    "toy", Family(DEFAULTS, read, ToyWeights, ToyRunner, GGUF(("toy",), read_gguf, TENSORS)), "Toy, of the tests"
)
