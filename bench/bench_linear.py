"""What does a verify of T rows cost in the linears of the demo model, against the floor and against torch's linear?

    python bench/bench_linear.py                    a table, bench/results/linear_<device>.{json,png}
    pytest bench --benchmark-only                   the kernels alone, to compare before and after a change

For another instruction set set PYSPEC_ISA, and hold torch to it: with ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
MKL_ENABLE_INSTRUCTIONS=AVX2 to AVX2.

One call is every linear of SmolLM2-135M once, each with its own weight, so that weights come from memory as they do
in a real step. The peer is torch's linear in the same dtype; int8 weights (with fp32 rows) have none, so theirs are
fp32 and bf16. On a GPU both are replayed as CUDA graphs. The floor is the larger of the bytes that are read over the
measured read bandwidth and the operations over the measured rate of a large matrix product, in the dtype or in fp32,
whichever is faster here. In the end it prints the roofline: the share of the bandwidth at one row, and how many times
the rate of torch's fp32 product 8, 16 and 32 rows are multiplied at.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from command_line import parse, parser_of

from pyspec import measure
from pyspec.ops import backends
from pyspec.ops.linear import lay_out_weight, linear

LAYERS = 30
LAYER = {"qkv": (960, 576), "output": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}  # outputs, inputs
HEAD = (49152, 576)
ROWS = (1, 2, 4, 8, 16, 32, 64)
ROOFLINE_ROWS = (8, 16, 32)
FORMATS = {  # of the laid out weight, and the dtypes of torch's linear beside it
    torch.bfloat16: (torch.bfloat16,),
    torch.float32: (torch.float32,),
    torch.int8: (torch.float32, torch.bfloat16),
}
FAR_LONGER = 4
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.int8: 5e-2}  # int8 rows are rounded


class Model:
    """The weights of one model's linears in one format, and plainly for the peers."""

    def __init__(self, dtype: torch.dtype, layers: int = LAYERS, head: tuple[int, int] = HEAD, device: str = "cpu"):
        generator = torch.Generator().manual_seed(0)
        self.device = device
        self.dtype, self.x_dtype = dtype, torch.float32 if dtype == torch.int8 else dtype
        self.laid_out, self.plain = [], {peer: [] for peer in FORMATS[dtype]}
        for outputs, inputs in (*LAYER.values(),) * layers + (head,):
            weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).to(device, self.x_dtype)
            self.laid_out.append(lay_out_weight(weight, dtype))
            for peer, weights in self.plain.items():
                weights.append(weight.to(peer))
        self.bytes = sum(weight.nbytes for weight in self.laid_out)
        self.parameters = sum(weight.outputs * weight.inputs for weight in self.laid_out)

    def inputs(self, rows: int, dtype: torch.dtype) -> dict[int, torch.Tensor]:
        """Rows by their width."""
        generator = torch.Generator().manual_seed(rows)
        sizes = sorted({weight.inputs for weight in self.laid_out})
        return {k: torch.randn(rows, k, generator=generator).to(self.device, dtype) for k in sizes}

    def pyspec(self, rows: int) -> Callable[[], None]:
        x = self.inputs(rows, self.x_dtype)

        def call() -> None:
            for weight in self.laid_out:
                linear(x[weight.inputs], weight)

        return call

    def torch(self, rows: int, dtype: torch.dtype) -> Callable[[], None]:
        x = self.inputs(rows, dtype)

        def call() -> None:
            for weight in self.plain[dtype]:
                F.linear(x[weight.shape[1]], weight)

        return call

    def check(self) -> None:
        """Refuses to time a wrong result, or one that breaks the row rule."""
        inputs = self.inputs(ROWS[-1], self.x_dtype)
        for weight in self.laid_out[-len(LAYER) - 1 :]:
            x = inputs[weight.inputs]
            found, expected = linear(x, weight), x.double() @ weight.unpack().double().T
            torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[self.dtype], rtol=TOLERANCE[self.dtype])
            for rows in ROWS[:-1]:
                assert torch.equal(found[-rows:], linear(x[-rows:], weight))


@pytest.fixture(scope="module", params=list(FORMATS), ids=str)
def model(request):
    return Model(request.param)


@pytest.mark.parametrize("rows", ROWS)
def test_linear(benchmark, model, rows):
    model.check()
    benchmark(model.pyspec(rows))


def timed(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Milliseconds of each call; one that takes far longer than pyspec's is timed once.

    That is torch's bf16 where the processor has no instruction for it, and it would take minutes.
    """
    once = measure.in_turn(calls, repeats=1, warmup=1)
    slow = {who for who, seconds in once.items() if seconds > FAR_LONGER * once["pyspec"]}
    often = measure.in_turn({who: call for who, call in calls.items() if who not in slow}, repeats, warmup=0)
    return {who: 1e3 * (once | often)[who] for who in calls}


def run(repeats: int, layers: int = LAYERS, head: tuple[int, int] = HEAD, device: str = "cpu") -> dict:
    bandwidth, fp32_rate = measure.read_bandwidth(device), measure.multiply_rate(torch.float32, device)
    results = []
    for dtype in FORMATS:
        rate = measure.multiply_rate(dtype, device)
        model = Model(dtype, layers, head, device)
        model.check()
        for rows in ROWS:
            calls = {"pyspec": model.pyspec(rows)}
            calls |= {f"torch {measure.name_of(peer)}": model.torch(rows, peer) for peer in FORMATS[dtype]}
            if device == "cuda":
                calls = {who: measure.replayed([call]) for who, call in calls.items()}
            ms = timed(calls, repeats)
            bytes_floor, rate_floor = 1e3 * model.bytes / bandwidth, 1e3 * 2 * model.parameters * rows / rate
            one_row = results[-1]["one_row_ms"] if rows > 1 else ms["pyspec"]
            results.append(
                {
                    "weights": measure.name_of(dtype),
                    "rows": rows,
                    "ms": ms,
                    "one_row_ms": one_row,
                    "gb_s": model.bytes / ms["pyspec"] / 1e6,
                    "of_bandwidth": 1e3 * model.bytes / ms["pyspec"] / bandwidth,
                    "of_fp32_rate": 1e3 * 2 * model.parameters * rows / ms["pyspec"] / fp32_rate,
                    "floor_ms": max(bytes_floor, rate_floor),
                    "floor": "bytes" if bytes_floor > rate_floor else "operations",
                }
            )
            show(results[-1])
        del model
    return {
        "machine": measure.machine(),
        "device": device,
        "kernels": next(
            f"{row['backend']}, {row['reason']}"
            for row in backends()
            if (row["op"], row["device"]) == ("linear", device)
        ),
        "layers": layers,
        "layer": LAYER,
        "head": head,
        "repeats": repeats,
        "read_gb_s": bandwidth / 1e9,
        "fp32_gflop_s": fp32_rate / 1e9,
        "results": results,
    }


def show(row: dict) -> None:
    ours = row["ms"]["pyspec"]
    peers = "  ".join(f"{who} {t:.1f} ({t / ours:.2f}x)" for who, t in row["ms"].items() if who != "pyspec")
    print(
        f"{row['weights']:>8} T={row['rows']:<3} pyspec {ours:7.2f} ms, {ours / row['one_row_ms']:5.2f} of one row, "
        f"{row['gb_s']:5.1f} GB/s  floor {row['floor_ms']:.2f} ms by {row['floor']} ({row['floor_ms'] / ours:.0%})  "
        f"{peers}",
        flush=True,
    )


def show_roofline(result: dict) -> None:
    machine = result["machine"]
    print(
        f"{machine['cpu']}, {machine['threads']} threads, {result['kernels']}: {result['read_gb_s']:.1f} GB/s, "
        f"{result['fp32_gflop_s']:.0f} GFLOP/s in fp32"
    )
    for weights in dict.fromkeys(row["weights"] for row in result["results"]):
        by_rows = {row["rows"]: row for row in result["results"] if row["weights"] == weights}
        rates = ", ".join(
            f"{by_rows[rows]['of_fp32_rate']:.2f}x at {rows} rows" for rows in ROOFLINE_ROWS if rows in by_rows
        )
        print(f"{weights:>8}  {by_rows[1]['of_bandwidth']:.0%} of the bandwidth at 1 row; of the fp32 rate {rates}")


def plot(result: dict, path) -> None:
    plt = measure.pyplot()
    formats = list(dict.fromkeys(row["weights"] for row in result["results"]))
    figure, axes = plt.subplots(1, len(formats), figsize=(4.2 * len(formats), 4), sharey=True)
    for axis, weights in zip(axes, formats, strict=True):
        rows = [row for row in result["results"] if row["weights"] == weights]
        counts = [row["rows"] for row in rows]
        for who in rows[0]["ms"]:
            width = 2.2 if who == "pyspec" else 1.2
            axis.plot(counts, [row["ms"][who] for row in rows], marker="o", markersize=3, linewidth=width, label=who)
        axis.plot(counts, [row["floor_ms"] for row in rows], color="black", linestyle="--", linewidth=1, label="floor")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(counts, counts)
        axis.grid(alpha=0.3, which="both")
        axis.set_title(f"{weights} weights")
        axis.set_xlabel("rows in one verify")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("ms for all linears of the model")
    measure.save_figure(figure, "all linears of SmolLM2-135M", result, path)


def main() -> None:
    parser = parser_of(__doc__, repeats=15, devices=True)
    options = parse(parser)
    result = run(options.repeats, device=options.device)
    show_roofline(result)
    path = measure.save(f"linear_{options.device}", result)
    plot(result, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
