"""GGUF files of tiny models with recurrent layers, written as llama.cpp's converter writes them."""

from collections.abc import Iterator

import gguf
import torch

from tests.helpers.tiny_models import add_tensor, split_experts

ARCHITECTURES = {
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_next": "qwen3next",
    "mamba": "mamba",
    "falcon_mamba": "mamba",
    "mamba2": "mamba2",
}
# of layers that guess further tokens
_NEXTN = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "shared_head_norm"}


def write_recurrent_gguf(path, model, quantization=gguf.GGMLQuantizationType.F32, further=None, **changed) -> None:
    """Writes a tiny model.

    Args:
        quantization: of all matrices, or a function of a tensor's name in the file that gives its type.
        further: tensors mtp.* of its checkpoint, or None.
        changed: metadata.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    metadata = _metadata(config) | ({"nextn_predict_layers": 1} if further else {}) | changed
    metadata["block_count"] = config.num_hidden_layers + bool(further)
    for key, value in metadata.items():
        key = f"{architecture}.{key.replace('__', '.')}"
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    (known,) = (kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, metadata["block_count"])
    for name, values in _renamed(model.state_dict() | (further or {}), config):
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        for converted, part in _converted(name, values.float(), config):
            stem, _, suffix = converted.rpartition(".")
            if (found := names.get_name(converted)) is not None:  # A_log and D
                stem, suffix = found, ""
            elif not stem.startswith("blk."):
                stem = names.get_name(stem)
            own = f"{stem}.{suffix}".rstrip(".")
            is_small = any(word in own for word in ("ssm_a", "ssm_d", "ssm_conv1d", "norm")) and "alpha" not in own
            kind = quantization(own) if callable(quantization) else quantization
            kind = gguf.GGMLQuantizationType.F32 if is_small else kind
            add_tensor(writer, own, part.contiguous().numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config) -> dict:
    if config.model_type in ("mamba", "falcon_mamba", "mamba2"):
        found = {"attention.layer_norm_rms_epsilon": config.layer_norm_epsilon, "context_length": 2**20}
        found |= {"embedding_length": config.hidden_size, "feed_forward_length": 0, "attention.head_count": 0}
        found |= {"ssm.conv_kernel": config.conv_kernel, "ssm.state_size": config.state_size}
        if config.model_type != "mamba2":
            found |= {"ssm.dt_b_c_rms": config.model_type == "falcon_mamba"}
            return found | {"ssm.inner_size": config.intermediate_size, "ssm.time_step_rank": config.time_step_rank}
        sizes = {"ssm.inner_size": config.num_heads * config.head_dim, "ssm.time_step_rank": config.num_heads}
        return found | sizes | {"ssm.group_count": config.n_groups}
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "rope.dimension_count": int(config.head_dim * config.rope_parameters["partial_rotary_factor"]),
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "full_attention_interval": 4,
    }
    if not hasattr(config, "num_experts"):
        return found | {"feed_forward_length": config.intermediate_size}
    found |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
    found |= {"expert_shared_feed_forward_length": config.shared_expert_intermediate_size}
    return found | {"expert_feed_forward_length": config.moe_intermediate_size}


def _renamed(state: dict, config) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of layers that guess further tokens as those of layers behind the last, and experts apart."""
    for name, values in split_experts(state):
        if name.startswith("mtp."):
            kind, _, rest = name.removeprefix("mtp.").partition(".")
            last = config.num_hidden_layers
            if kind == "layers":
                name = f"model.layers.{last}.{rest.partition('.')[2]}"
            else:
                name = f"blk.{last}.nextn.{_NEXTN[kind]}.{rest}"
        yield name, values


def _converted(name: str, values: torch.Tensor, config) -> Iterator[tuple[str, torch.Tensor]]:
    if name.endswith(".dt_bias"):
        name = name.replace(".dt_bias", ".dt_proj.bias")
    if name.endswith(".A_log"):
        values = -values.exp()
    if "conv1d.weight" in name:
        values = values[:, 0]
    if config.model_type in ("mamba", "falcon_mamba", "mamba2"):
        if config.model_type == "mamba2" and name.endswith(("A_log", ".D")):
            values = values[:, None]
        if name.endswith("mixer.norm.weight"):
            values = values.view(config.n_groups, -1)
        yield name, values
        return
    if "norm" in name and not name.endswith("linear_attn.norm.weight"):
        values = values + 1
    keys, shared = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    if config.model_type == "qwen3_next":
        if "in_proj_qkvz" in name:
            sizes = [config.linear_key_head_dim] * 2 + [shared * config.linear_value_head_dim] * 2
            q, k, v, z = (part.flatten(0, 1) for part in values.unflatten(0, (keys, -1)).split(sizes, 1))
            yield name.replace("qkvz", "qkv"), torch.cat((q, k, v))
            yield name.replace("qkvz", "z"), z
            return
    elif "linear_attn." in name and "linear_attn.norm" not in name:
        values = _with_heads_in_turns(name, values, keys, shared, config)
    yield name, values


def _with_heads_in_turns(name: str, values: torch.Tensor, keys: int, shared: int, config) -> torch.Tensor:
    """Value heads [key head, place] as [place, key head]: along rows, but for the columns of the output."""
    if "out_proj" in name:
        return values.unflatten(1, (keys, shared, -1)).transpose(1, 2).flatten(1)
    others = 2 * keys * config.linear_key_head_dim if "qkv" in name or "conv1d" in name else 0
    return torch.cat((values[:others], values[others:].unflatten(0, (keys, shared, -1)).transpose(0, 1).flatten(0, 2)))
