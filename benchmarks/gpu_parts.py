"""The parts of `bench_gpu.py`: each yields rows of figures as they come."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_model import write_random_model, write_rows
from sparse_model import QWEN3_4B
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from converter.calibration.selectors import MEASURING
from converter.cli import run as hybridize

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
FULL, SDPA = "full attention", "native sdpa"
# Searches come last: they take the longest.
METHODS = sorted(MEASURING, key=lambda name: name in ("search", "guided"))


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        shapes: config.json of each model, by its name.
        window: window_tokens of the plan, in which every fourth layer is full.
        lengths: of the prompts that are timed.
        sdpa_up_to: transformers' own sdpa writes a mask of the length squared.
        calibration_tokens: of the example that layers are scored on.
    """

    shapes: Mapping[str, dict[str, Any]]
    window: int
    lengths: tuple[int, ...]
    sdpa_up_to: int
    calibration_tokens: int
    runs: int = 3
    decoded: int = 16


_LONG = QWEN3_4B | {"max_position_embeddings": 1 << 18}
_WIDER = {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
_TOY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
_TOY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
REAL = Sizes(
    {"Qwen3-4B": _LONG, "Qwen3-8B": _LONG | _WIDER}, 2048, (1 << 14, 1 << 15, 1 << 16, 1 << 17),
    1 << 15, 1 << 14,
)  # fmt: skip
TOY = Sizes({"toy": QWEN3_4B | _TOY}, 16, (64, 128), 64, 96, runs=1, decoded=2)


@dataclass(frozen=True)
class Bench:
    """Where and how long a part runs.

    Attributes:
        root: where the models are, `NAME` and `NAME-hybrid`.
        ends: when it is to be done, by `time.monotonic`.
    """

    sizes: Sizes
    root: Path
    device: str
    ends: float

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self.ends - time.monotonic()

    def source(self, name: str) -> Path:
        """The folder of a random model."""
        return self.root / name

    def hybrid(self, name: str) -> Path:
        """The folder of its checkpoint."""
        return self.root / f"{name}-hybrid"

    def peak_gb(self) -> float | None:
        """The most that the device has held since `forget`; None on a CPU."""
        if self.device == "cpu":
            return None
        return round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)

    def forget(self) -> None:
        """Free what nothing holds, and begin to count anew."""
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def now(self) -> float:
        """The time, once the device has finished."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def command(*arguments: object) -> tuple[float, dict[str, Any]]:
    """Seconds of a command of ours, run in this process, and the JSON that it prints."""
    said, errors = io.StringIO(), io.StringIO()
    started = time.perf_counter()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        status = hybridize([str(one) for one in (*arguments, "--json", "-q")])
    if not said.getvalue().strip():
        raise RuntimeError(f"exit status {status}: {errors.getvalue().strip()}")
    return time.perf_counter() - started, json.loads(said.getvalue())


def models(bench: Bench) -> Iterator[Row]:
    """Random models, and checkpoints made of them."""
    for name, config in bench.sizes.shapes.items():
        bench.source(name).mkdir()
        started = time.perf_counter()
        size = write_random_model(bench.source(name), config, bench.device)
        wrote = time.perf_counter() - started
        layers = ",".join(map(str, range(3, config["num_hidden_layers"], 4)))
        plan = ("--layers", layers, "--window", bench.sizes.window, "--no-verify")
        seconds, _ = command("convert", bench.source(name), bench.hybrid(name), *plan)
        yield {"what": name, "GB": size / 1e9, "write s": wrote, "convert s": seconds}


def tests(bench: Bench) -> Iterator[Row]:
    """The tests that only run where CUDA is."""
    workers = () if bench.device == "cpu" else ("--numprocesses", "4")
    files = ("tests/test_cuda.py", "tests/templates/test_modeling_flash.py")
    asked = ("-q", "-m", "cuda", "-p", "no:cacheprovider", *workers, *files)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield {"what": "masks, gradients, proofs", "ok": done.returncode == 0, "said": lines[-1]} | (
        {"failed": failed} if failed else {}
    )


def speed(bench: Bench) -> Iterator[Row]:
    """Prefill and decoding in every way, over the same weights."""
    for index, name in enumerate(bench.sizes.shapes):
        share = bench.left / (len(bench.sizes.shapes) - index)
        ends, last_round = time.monotonic() + share, 0.0
        ways = _ways(bench, name)
        for number, length in enumerate(bench.sizes.lengths):
            what = f"{name}, {length} tokens"
            if number and 4 * last_round > ends - time.monotonic():
                yield {"what": what, "not done": "no time was left"}
                continue
            taken = {k: v for k, v in ways.items() if k != SDPA or length <= bench.sizes.sdpa_up_to}
            if not number:
                _rounds(bench, taken, length, 0.0)
            found, last_round = _rounds(bench, taken, length, ends)
            for way, runs in found.items():
                yield {"what": f"{what}, {way}"} | _against(runs, found[FULL])
        ways.clear()
        bench.forget()


def _ways(bench: Bench, name: str) -> dict[str, Any]:
    """Loaded models by what they are called; they share the weights of the first."""
    dtype = torch.float32 if bench.device == "cpu" else torch.bfloat16

    def load(folder: Path, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()

    ways = {FULL: load(bench.source(name), attn_implementation="sdpa").to(bench.device)}
    hybrid = bench.hybrid(name)
    ways["hybrid"] = load(hybrid, trust_remote_code=True)
    ways[SDPA] = load(hybrid, attn_implementation="sdpa")
    if is_flash_attn_2_available():
        ways["native flash"] = load(hybrid, attn_implementation="flash_attention_2")
    for model in ways.values():
        # What was loaded is mapped from the files; here it makes way for what is on the device.
        model.load_state_dict(ways[FULL].state_dict(), assign=True)
        model.to(bench.device)
    return ways


Runs = list[tuple[float, float, float | None]]


def _rounds(
    bench: Bench, ways: dict[str, Any], length: int, ends: float
) -> tuple[dict[str, Runs | str], float]:
    """Runs of every way in turn, and the seconds of a round; a text says why there are none.

    The first round is always done; another one if there is time for it.
    """
    found: dict[str, Runs | str] = {name: [] for name in ways}
    seconds = 0.0
    for number in range(bench.sizes.runs):
        if number and seconds > ends - time.monotonic():
            break
        started = time.perf_counter()
        for name, model in ways.items():
            runs = found[name]
            if isinstance(runs, str):
                continue
            bench.forget()
            try:
                runs.append(_timed(bench, model, length))
            except torch.OutOfMemoryError:
                found[name] = "out of memory"
        seconds = time.perf_counter() - started
    return found, seconds


def _timed(bench: Bench, model: Any, length: int) -> tuple[float, float, float | None]:
    """Seconds of a prefill, and of a token decoded behind it; the peak in GB."""
    ids = torch.randint(model.config.vocab_size, (1, length), device=bench.device)
    with torch.inference_mode():
        started = bench.now()
        output = model(ids, use_cache=True, logits_to_keep=1)
        filled = bench.now()
        for _ in range(bench.sizes.decoded):
            token = output.logits[:, -1:].argmax(dim=-1)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
        done = bench.now()
    return filled - started, (done - filled) / bench.sizes.decoded, bench.peak_gb()


def _against(runs: Runs | str, full: Runs | str) -> Row:
    """Medians of a way, and how much faster it is than full attention."""
    if isinstance(runs, str):
        return {"not done": runs}
    prefill, token = _medians(runs)
    row = {"prefill s": prefill, "decode ms": 1000 * token, "peak GB": runs[-1][2]}
    if not isinstance(full, str):
        full_prefill, full_token = _medians(full)
        row |= {"prefill x": full_prefill / prefill, "decode x": full_token / token}
    return row | {"runs": len(runs)}


def _medians(runs: Runs) -> tuple[float, float]:
    return statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs)


def calibration(bench: Bench) -> Iterator[Row]:
    """Layers scored by each method on one example."""
    name, sizes = next(iter(bench.sizes.shapes)), bench.sizes
    rows = bench.root / "rows.jsonl"
    write_rows(rows, 1, sizes.calibration_tokens)
    asked: tuple[Any, ...] = (
        "--data",
        rows,
        "--samples",
        1,
        "--length",
        sizes.calibration_tokens + 64,
    )
    asked += ("--window", sizes.window, "--budget", "1/4", "--device", bench.device, "--fresh")
    for method in METHODS:
        bench.forget()
        out = bench.root / f"scores-{method}.json"
        row: Row = {"what": f"{name}, {sizes.calibration_tokens} tokens, {method}"}
        try:
            _, found = command(
                "calibrate", bench.source(name), "--out", out, "--method", method, *asked
            )
        except RuntimeError as error:
            yield row | {"not done": str(error)}
            continue
        forwards = found["layer_forwards"] / bench.sizes.shapes[name]["num_hidden_layers"]
        yield row | {"s": found["seconds"], "peak GB": bench.peak_gb(), "model passes": forwards}


def verify(bench: Bench) -> Iterator[Row]:
    """The checkpoints proved against their sources."""
    for name in bench.sizes.shapes:
        against = ("--against", bench.source(name), "--device", bench.device)
        try:
            seconds, report = command("verify", bench.hybrid(name), *against)
        except RuntimeError as error:
            yield {"what": name, "not done": str(error)}
            continue
        failed = [check["name"] for check in report["checks"] if not check["ok"]]
        row = {"what": name, "s": seconds, "ok": report["ok"]}
        yield row | ({"failed": failed} if failed else {})


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    part.__name__: part for part in (models, tests, speed, calibration, verify)
}
