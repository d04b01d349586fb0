"""Writes quantised folders by the public definitions of their methods, and says what every matrix is, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SHAPE = {"hidden_size": 128, "intermediate_size": 256}
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Rounded:
    """A matrix in integers: float64 `values` = scales[:, group] * (integers - zeros[:, group]), of random scales."""

    def __init__(
        self, weight: np.ndarray, bits: int, group_size: int, *, symmetric=False, group=None, dtype=np.float16
    ):
        outputs, inputs = weight.shape
        size = inputs if group_size == -1 else group_size
        self.bits, self.groups = bits, -(-inputs // size)
        self.group = np.arange(inputs) // size if group is None else group
        numbers = np.random.default_rng(outputs)
        self.zeros = numbers.integers(1, 2**bits, (outputs, self.groups))
        if symmetric:
            self.zeros[:] = 2 ** (bits - 1)
        spread = np.abs(weight).max() / 2 ** (bits - 1) * numbers.uniform(0.5, 1.5, self.zeros.shape)
        scales = torch.from_numpy(spread).to(dtype if isinstance(dtype, torch.dtype) else torch.float16)
        self.tensor_scales, self.scales = scales, scales.double().numpy()
        levels = np.round(weight / self.scales[:, self.group]) + self.zeros[:, self.group]
        self.integers = np.clip(levels, 0, 2**bits - 1).astype(np.int64)
        self.values = self.scales[:, self.group] * (self.integers - self.zeros[:, self.group])


def words(integers: np.ndarray, bits: int, axis: int) -> torch.Tensor:
    """int32 words along an axis that hold the integers' bits one after another, the lowest first."""
    rows = np.moveaxis(integers, axis, -1)
    found = np.zeros((*rows.shape[:-1], -(-rows.shape[-1] * bits // 32)), np.int64)
    for place in range(rows.shape[-1]):
        for bit in range(bits):
            at = place * bits + bit
            found[..., at // 32] |= (rows[..., place] >> bit & 1) << at % 32
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(found, -1, axis)).astype(np.uint32).view(np.int32))


def gptq(weight, *, bits=4, group_size=128, desc_act=False, symmetric=False, version="gptq"):
    group = None
    if desc_act:
        group = np.random.default_rng(1).permutation(np.arange(weight.shape[1]) // group_size)
    rounded = Rounded(weight, bits, group_size, symmetric=symmetric, group=group)
    zeros = rounded.zeros - (version == "gptq")
    parts = {
        "qweight": words(rounded.integers.T, bits, 0),
        "qzeros": words(zeros.T, bits, 1),
        "scales": rounded.tensor_scales.T.contiguous(),
        "g_idx": torch.from_numpy(rounded.group.astype(np.int32)),
        "bias": torch.zeros(len(weight), dtype=torch.float16),  # as AutoGPTQ gives to every matrix
    }
    settings = {"bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": symmetric}
    return parts, rounded.values, {"quant_method": "gptq", "checkpoint_format": version, **settings}


def awq(weight, *, group_size=128, version="gemm"):
    rounded = Rounded(weight, 4, group_size)
    if version == "gemm":
        order = np.arange(len(weight)).reshape(-1, 8)[:, AWQ_ORDER].reshape(-1)
        parts = {
            "qweight": words(rounded.integers.T[:, order], 4, 1),
            "qzeros": words(rounded.zeros.T[:, order], 4, 1),
            "scales": rounded.tensor_scales.T.contiguous(),
        }
    else:
        fill = ((0, 0), (0, -rounded.groups % 8))
        parts = {
            "qweight": words(rounded.integers, 4, 1),
            "qzeros": words(np.pad(rounded.zeros, fill), 4, 1),
            "scales": torch.from_numpy(np.pad(rounded.scales, fill)).half(),
        }
    settings = {"bits": 4, "group_size": group_size, "zero_point": True, "version": version}
    return parts, rounded.values, {"quant_method": "awq", **settings}


def compressed_tensors(weight, *, bits=4, group_size=128, symmetric=True, packed=True, actorder=False):
    group = None
    if actorder:
        group = np.random.default_rng(1).permutation(np.arange(weight.shape[1]) // group_size)
    rounded = Rounded(weight, bits, group_size, symmetric=symmetric, group=group, dtype=torch.bfloat16)
    parts = {"weight_scale": rounded.tensor_scales}
    if packed:
        parts |= {"weight_packed": words(rounded.integers, bits, 1), "weight_shape": torch.tensor(weight.shape)}
    else:
        parts |= {"weight": torch.from_numpy((rounded.integers - 2 ** (bits - 1)).astype(np.int8))}
    if not symmetric:
        parts |= {"weight_zero_point": words(rounded.zeros, bits, 0)}
    if actorder:
        parts |= {"weight_g_idx": torch.from_numpy(rounded.group)}
    scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group_size}
    settings = {"format": "pack-quantized" if packed else "int-quantized", "ignore": ["lm_head"]}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}}
    return parts, rounded.values, {"quant_method": "compressed-tensors", "config_groups": groups, **settings}


def fp8(weight, *, block=None):
    """Of compressed-tensors with a scale an output, or of fp8 with one a block."""
    outputs, inputs = weight.shape
    if block is None:
        scales = torch.from_numpy(np.abs(weight).max(1, keepdims=True) / 448).bfloat16()
        wide, name = scales.double(), "weight_scale"
        settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    else:
        counts = -(-outputs // block), -(-inputs // block)
        scales = torch.from_numpy(np.random.default_rng(0).uniform(1e-3, 2e-3, counts)).float()
        wide = torch.from_numpy(np.kron(scales.double().numpy(), np.ones((block, block)))[:outputs, :inputs])
        name, settings = "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [block, block]}
    floats = (torch.from_numpy(weight) / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    parts = {"weight": floats, name: scales}
    return parts, (floats.double() * wide).numpy(), settings


def mxfp4_bytes(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Random codes uint8 [..., K / 2], exponents uint8 [..., K / 32], and the values, float64."""
    numbers = np.random.default_rng(seed)
    codes = numbers.integers(0, 256, (*shape[:-1], shape[-1] // 2), dtype=np.uint8)
    exponents = numbers.integers(115, 125, (*shape[:-1], shape[-1] // 32), dtype=np.uint8)
    table = np.array([*E2M1, *(-value for value in E2M1)])
    levels = np.stack((table[codes & 15], table[codes >> 4]), -1).reshape(shape)
    scales = 2.0 ** (exponents.astype(np.float64) - 127)
    return torch.from_numpy(codes), torch.from_numpy(exponents), levels * np.repeat(scales, 32, -1)


def mxfp4(weight):
    codes, exponents, values = mxfp4_bytes(weight.shape, len(weight))
    settings = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    return {"weight_packed": codes, "weight_scale": exponents}, values, settings


def write_folder(folder: Path, model, quantise, leave=("lm_head",)) -> None:
    """Saves a model whose linear layers, but for those named in `leave`, are quantised; its own weights follow.

    quantise: a function of the layer's name and its weight, float64, that gives (tensors, values, settings).
    """
    model.save_pretrained(folder)
    tensors, settings = {}, {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    for name, values in model.state_dict().items():
        if not any(name.startswith(f"{layer}.") for layer in layers if not layer.endswith(leave)):
            tensors[name] = values.half() if values.dim() > 1 else values
            values.copy_(tensors[name])
    for name, layer in layers.items():
        if name.endswith(leave):
            continue
        parts, values, settings = quantise(name, layer.weight.detach().double().numpy())
        layer.weight.data = torch.from_numpy(values).float()
        if layer.bias is not None:
            parts["bias"] = layer.bias.detach()
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    (folder / "model.safetensors").unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
