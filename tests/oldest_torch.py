"""Does every binding compile against the oldest torch that pyproject.toml names? python tests/oldest_torch.py [VERSION]

Takes the headers out of that torch's wheel for aarch64, the smallest that the registry has (150 MB for 2.10), and keeps
them in build/torch-headers. CUDA's own headers are those of tests/cuda_on_host, so that no toolkit is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-fsyntax-only", "-fvisibility=hidden", "-DPYSPEC_X86=1", '-DPYSPEC_CUDA_ARCHITECTURES=""']


def oldest() -> str:
    """The torch of pyproject.toml, as 2.10.0."""
    return re.search(r'"torch>=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text())[1] + ".0"


def headers(version: str) -> Path:
    """The folder of a torch's headers, fetched where it is not there."""
    kept = ROOT / "build/torch-headers" / version
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            options = ["--no-deps", "--only-binary=:all:", "--platform=manylinux_2_28_aarch64", "--python-version=3.11"]
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "-d", folder]
            subprocess.run([*pip, *options, f"torch=={version}"], check=True)
            with zipfile.ZipFile(next(Path(folder).glob("torch-*.whl"))) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("torch/include/")])
            Path(folder, "torch/include").replace(kept)
    return kept


def compiles(source: Path, include: Path) -> bool:
    """Whether one binding does; what the compiler says goes to stderr."""
    target = re.search(r"TORCH_TARGET_VERSION=\w+", (ROOT / "CMakeLists.txt").read_text())[0]
    folders = [f"-I{ROOT / 'kernels'}", f"-I{ROOT / 'tests/cuda_on_host'}", f"-isystem{include}"]
    command = [os.environ.get("CXX", "c++"), *FLAGS, f"-D{target}", *folders, str(source)]
    return subprocess.run(command).returncode == 0


def main() -> int:
    version = sys.argv[1] if len(sys.argv) > 1 else oldest()
    include = headers(version)
    bindings = sorted((ROOT / "csrc").glob("c*/*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        failed = [
            source.relative_to(ROOT).as_posix()
            for source, compiled in zip(
                bindings, threads.map(lambda source: compiles(source, include), bindings), strict=True
            )
            if not compiled
        ]
    print(f"torch {version}: {len(bindings) - len(failed)} of {len(bindings)} bindings compile", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
