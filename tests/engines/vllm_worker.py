"""Run checkpoints in vLLM; started by tests/engines/test_vllm.py in vLLM's own environment.

It imports nothing of ours. The only argument is a folder: its `cases.json` says what to run, and
each case leaves `NAME.npz` (log-probabilities and tokens) or `NAME.txt` (why there are none).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

# Everything stays in the process of the case; nothing is compiled but what the kernels bring.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}

import numpy
import torch

# The last two are what an engine would import, in each process anew.
import vllm.model_executor.models.transformers
import vllm.v1.worker.cpu_worker  # noqa: F401
from vllm import LLM, SamplingParams
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

# A tiny model takes some seconds; more than this is a hang.
LIMIT_SECONDS = 120
DEEPEST = 40


def rows_of(positions: Any, vocabulary: int) -> Any:
    """(positions, vocabulary) from dictionaries by token; NaN where they say nothing."""
    found = numpy.full((len(positions), vocabulary), numpy.nan, numpy.float32)
    for row, by_token in enumerate(positions):
        for token, entry in (by_token or {}).items():
            found[row, token] = entry.logprob
    return found


def run_case(case: dict[str, Any], out: Path) -> None:
    """The prompt in chunks, tokens decoded past the window, then texts that begin with it."""
    vocabulary = case["vocabulary"]
    engine = LLM(
        model=case["folder"],
        trust_remote_code=case["trust"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=case["context_tokens"],
        max_num_batched_tokens=case["chunk_tokens"],
        max_num_seqs=4,
        max_logprobs=vocabulary,
        kv_cache_memory_bytes=64 << 20,
        block_size=32,
        seed=0,
    )

    def generate(prompts: list[list[int]], **options: Any) -> Any:
        sampling = SamplingParams(
            temperature=0,
            max_tokens=case["new_tokens"],
            ignore_eos=True,
            detokenize=False,
            logprobs=vocabulary,
            **options,
        )
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return engine.generate(given, sampling, use_tqdm=False)

    outputs = generate(case["prompts"][:1], prompt_logprobs=vocabulary)
    values = {"prompt": rows_of(outputs[0].prompt_logprobs, vocabulary)}
    for index, output in enumerate([*outputs, *generate(case["prompts"][1:])]):
        values[f"tokens {index}"] = numpy.array(output.outputs[0].token_ids)
        values[f"decoded {index}"] = rows_of(output.outputs[0].logprobs, vocabulary)
        values[f"cached {index}"] = numpy.array(output.num_cached_tokens)
    numpy.savez(out, **values)


def run_groups(out: Path) -> None:
    """For how many full and sliding layers vLLM keeps memory, by "FULL of LAYERS"."""
    sizes = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
    full, sliding = FullAttentionSpec(**sizes), SlidingWindowSpec(**sizes, sliding_window=64)
    held = {}
    for layers in range(2, DEEPEST + 1):
        for count in range(1, layers):
            specs = {str(i): full if i < count else sliding for i in range(layers)}
            groups = kv_cache_utils._get_kv_cache_groups_uniform_page_size(specs)
            size = max(len(group.layer_names) for group in groups)
            kinds = [type(group.kv_cache_spec) for group in groups]
            held[f"{count} of {layers}"] = [
                size * kinds.count(kind) for kind in (FullAttentionSpec, SlidingWindowSpec)
            ]
    out.write_text(json.dumps(held), encoding="utf-8")


def in_a_child(work: Any, failure: Path) -> None:
    """Run in a forked process; what goes wrong there is written down, a hang or a crash too."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - the parent has it read
            failure.write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(0)
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                failure.write_text(f"the process ended with status {status}", encoding="utf-8")
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    failure.write_text(f"no end within {LIMIT_SECONDS} s", encoding="utf-8")


def main(folder: Path) -> None:
    """Run every case of a folder."""
    run_groups(folder / "groups.json")
    for name, case in json.loads((folder / "cases.json").read_text(encoding="utf-8")).items():
        started = time.monotonic()
        in_a_child(partial(run_case, case, folder / f"{name}.npz"), folder / f"{name}.txt")
        sys.stderr.write(f"{name}: {time.monotonic() - started:.1f} s\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
