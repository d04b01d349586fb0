"""Does the wheel for aarch64 work? python release/try_on_arm.py

Runs what lies in dist/ under qemu, in Debian's Python of that processor and the oldest torch that is promised: imports
it and compares ops with their references. All is unpacked into build/arm; 200 MB are fetched once. It takes minutes,
most of them for importing torch.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build/arm"
SYSTEM = WORK / "system"
PACKAGES = (
    "python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g "
    "libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libcrypt1"
).split()
TORCH = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1] + ".0"
# What importing torch takes; the rest that its wheel asks for is CUDA's, by a mark that pip reads for this machine.
BESIDE = "numpy typing_extensions sympy networkx jinja2 fsspec filelock".split()
PROGRAM = """
import torch, pyspec
from pyspec import host, ops

assert host.compiled() is not None
torch.manual_seed(0)
q, k, v = torch.randn(1, 4, 2, 64), *torch.randn(2, 1, 2, 40, 64)
calls = {
    "linear": (torch.randn(3, 64), torch.randn(48, 64)),
    "tree_attention": (q, k, v, torch.tensor([[[1], [3]]], dtype=torch.int32), torch.tensor([38], dtype=torch.int32)),
}
for name, arguments in calls.items():
    results = []
    for backend in ("compiled", "reference"):
        with pyspec.backend(backend):
            results.append(getattr(ops, name)(*arguments))
    torch.testing.assert_close(*results, msg=name)
    print(name, *(row["reason"] for row in ops.backends() if (row["op"], row["device"]) == (name, "cpu")))
"""


def unpack_system() -> None:
    """Debian's Python for aarch64, without installing it."""
    packages = WORK / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-qq", *(f"{name}:arm64" for name in PACKAGES)], cwd=packages, check=True)
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, SYSTEM], check=True)


def install(*arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-compile", "--upgrade"]
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)]
    target = ["--target", WORK / "site", "--python-version=3.11", "--only-binary=:all:", *platforms]
    subprocess.run([*pip, *target, *arguments], check=True)


def main() -> None:
    if shutil.which("qemu-aarch64") is None or shutil.which("dpkg-deb") is None:
        sys.exit("takes Debian and its package qemu-user")
    if not (WORK / "site/torch").exists():
        unpack_system()
        install("--no-deps", f"torch=={TORCH}")
        install(*BESIDE)
    install("--no-deps", "--no-index", f"--find-links={ROOT / 'dist'}", "pyspec-kernels")
    program = [SYSTEM / "usr/bin/python3.11", "-c", PROGRAM]
    where = ["-L", SYSTEM, "-E", f"PYTHONPATH={WORK / 'site'}", "-E", "OMP_NUM_THREADS=1"]
    subprocess.run(["qemu-aarch64", *where, *program], cwd=WORK, check=True)
    print(f"the wheel for aarch64 works beside torch {TORCH}")


if __name__ == "__main__":
    main()
