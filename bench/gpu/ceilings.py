"""What is this machine, and what can it do: bytes a second of a large copy, operations a second of a large product."""

import platform
import sys

import torch
from where import DEVICE, IS_DRY

from pyspec import measure


def main() -> None:
    result = {"machine": measure.machine(), "python": platform.python_version(), "device": DEVICE}
    try:
        import triton

        result["triton"] = triton.__version__
    except ImportError:
        result["triton"] = None
    if not IS_DRY:
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "capability": torch.cuda.get_device_capability(),
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": properties.total_memory / 1e9,
            "cache_mb": properties.L2_cache_size / 1e6,
        }
    measure.save("ceilings", result)
    result["bytes_per_second"] = measure.read_bandwidth(DEVICE)
    measure.save("ceilings", result)
    for dtype in (torch.bfloat16, torch.float32):
        name = measure.name_of(dtype)
        result[f"operations_per_second_{name}"] = measure.multiply_rate(dtype, DEVICE)
        measure.save("ceilings", result)
    print(result)


if __name__ == "__main__":
    sys.exit(main())
