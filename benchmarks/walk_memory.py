"""The peak memory of the walk at 16k tokens through 36 layers, against the formula that plans it.

Writes a random narrow Qwen3, runs one example under plans that switch single layers, and once
forward and back for gate gradients, each in a process of its own. What the process holds before the
model is loaded does not count, on either side.

    OMP_NUM_THREADS=2 python benchmarks/walk_memory.py
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from peak_memory import peak_mib
from scoring_memory import CONFIG, write_model

LAYERS, PROMPT, ANSWER, WINDOW = 36, 16384, 4, 2048
# As wide as it runs here in minutes; the MLP as wide beside the rest as Qwen3-4B's.
NARROW = CONFIG | {
    "hidden_size": 192,
    "intermediate_size": 720,
    "num_hidden_layers": LAYERS,
    "max_window_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 32768,
}
# Every twelfth layer, for time: how many plans there are is no matter when few wait at a time.
SWITCHED = range(0, LAYERS, 12)
WAYS = ("plans", "gradients")


def walk(folder: Path, way: str) -> None:
    """The body of a measured process: walk, and print peak and formula, in MiB, and seconds."""
    from converter.common.devices import process_bytes
    from converter.inference.example import Example
    from converter.inference.load import Placement, load_runner
    from converter.inference.memory import RESIDENT, Workload
    from converter.model.mask import SLIDING, Mask
    from converter.model.source import open_source
    from converter.plan.units import Units, switched_plans

    draw = random.Random(0)  # noqa: S311 - reproducible, not a secret
    tokens = [draw.randrange(NARROW["vocab_size"]) for _ in range(PROMPT + ANSWER)]
    example = Example(tuple(tokens[:PROMPT]), tuple(tokens[PROMPT:]), "random")
    source, mask = open_source(str(folder)), Mask(WINDOW)
    plans = switched_plans(SLIDING, Units(LAYERS), SWITCHED)
    runner = load_runner(source, mask, Placement("cpu", "float32"), RESIDENT, folder)
    tiny = Example(example.prompt[:64], example.answer, "random")
    weights = ((0.5,),) * LAYERS

    def run(one: Example) -> None:
        if way == "plans":
            runner.answers([one], plans, lambda _: None)
        else:
            runner.gate_gradients([one], weights, lambda _: None)

    # What libraries load at the first call is not the walk's.
    run(tiny)
    held = process_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    run(example)
    seconds, peak = time.perf_counter() - started, peak_mib() - held / 2**20
    asked = Workload(source, mask, "float32", 1, PROMPT, ANSWER, gradient=way == "gradients")
    formula = max(asked.resident_bytes.values()) / 2**20
    print(json.dumps({"peak": peak, "formula": formula, "seconds": seconds}))


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--child"]:
        walk(Path(sys.argv[2]), sys.argv[3])
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_model(Path(temporary), NARROW)
        # What is freed goes back to the system; by itself glibc begins to keep up to 32 MiB.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        print(
            f"torch {version('torch')}, transformers {version('transformers')}; {LAYERS} layers of "
            f"{NARROW['hidden_size']}, {PROMPT + ANSWER} tokens, window {WINDOW}, float32; weights "
            "and what libraries hold are not counted"
        )
        for way in sys.argv[1:] or WAYS:
            command = [sys.executable, __file__, "--child", temporary, way]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
            found = json.loads(done.stdout)
            print(
                f"  {way:9}: peak {found['peak']:.0f} MiB, by the formula {found['formula']:.0f} "
                f"MiB: {found['formula'] / found['peak']:.2f} of it; {found['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
