"""vLLM computes the plan: its log-probabilities against the brute force on the source.

`make test-vllm` makes an environment with vLLM and runs these tests; without it they are skipped.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy
import pytest

from converter.checkpoint.reader import open_checkpoint
from converter.engines.support import verdicts
from converter.engines.vllm import held_layers
from converter.model.mask import LINEAR
from tests.brute_force import FULL, SLIDING, EagerModel
from tests.conftest import EVERY_FAMILY, make_model
from tests.hybrids import convert, random_ids

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own")

LAYERS, KEPT, WINDOW = 6, (1, 4), 16
CONTEXT, VOCABULARY, NEW = 512, 320, 24
# Prompts of ten windows and more, read in chunks that end inside a window. The later ones begin
# with the first, so that vLLM takes its blocks from the prefix cache, and run in one batch.
CHUNK, BLOCK = 72, 32
PROMPT = random_ids(170)
PROMPTS = [PROMPT, PROMPT + random_ids(20, seed=1), PROMPT + random_ids(50, seed=2)]
# How far vLLM's float32 may be from float64, in nats; Gemma's logits are large.
LIMIT, LIMIT_OF = 2e-4, {"gemma": 2e-3}
WORKER_SECONDS, SERVER_SECONDS = 900, 420


@dataclass(frozen=True)
class Case:
    """A checkpoint, and how vLLM is started with it."""

    family: str
    trust: bool = False
    mask: str = "plain"
    kept: tuple[int, ...] = KEPT
    window: int = WINDOW
    changes: dict[str, Any] = field(default_factory=dict)


HONOURED = {
    **{family: Case(family) for family in ("qwen3", "qwen2", "llama", "mistral", "smollm3")},
    # Trusted, a native checkpoint is the same.
    "qwen3 trusted": Case("qwen3", trust=True),
    "one sliding layer": Case("qwen2", kept=(0, 1, 2, 4, 5)),
    **{
        family: Case(family, trust=True)
        for family in (
            "qwen3_moe",
            "olmo2",
            "phi3",
            "gemma",
            "granite",
            "seed_oss",
            "ministral3",
            "glm4_moe",
        )
    },
    "llama with biases": Case(
        "llama", trust=True, changes={"attention_bias": True, "mlp_bias": True}
    ),
    "window of one token": Case("qwen3", trust=True, window=1),
}
RECURRENT = [LINEAR, FULL, LINEAR] * 2
OWN = [SLIDING, FULL, SLIDING] * 2
REFUSED = {
    "sinks": (Case("qwen3", trust=True, mask="sinks"), "knows windows, but neither sink tokens"),
    "full decode": (
        Case("llama", trust=True, mask="full decode"),
        "nor full attention in decode. Run it in transformers, or convert",
    ),
    "custom without trust": (Case("olmo2"), "trust_remote_code"),
    # They bring no code for vLLM.
    **{
        family: (
            Case(family, trust=True, kept=(1,), changes={"layer_types": kinds}),
            "Unrecognized configuration class",
        )
        for family, kinds in (("qwen3_5_text", RECURRENT), ("gemma3_text", OWN))
    },
}
CASES = HONOURED | {name: case for name, (case, _) in REFUSED.items()}
# What is asked of the server, at its defaults: native code, and ours.
SERVED = ("qwen3", "olmo2")
Checkpoints = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The source and the checkpoint of a case, of sizes that vLLM's CPU attention takes."""
    root = tmp_path_factory.mktemp("vllm-models")

    @cache
    def made(name: str) -> tuple[Path, Path]:
        case = CASES[name]
        head = {"head_dim": 32} if "head_dim" in EVERY_FAMILY[case.family] else {}
        sizes = {"hidden_size": 128, "num_hidden_layers": LAYERS, **head, **case.changes}
        source = make_model(root / f"{name} source", case.family, **sizes)
        return source, convert(source, root / name, case.mask, case.kept, case.window)

    return made


def environment(folder: Path) -> dict[str, str]:
    """What vLLM's processes get: no network, no caches of other runs, as many threads as here."""
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    caches = {"HF_MODULES_CACHE": str(folder / "modules"), "VLLM_CACHE_ROOT": str(folder / "cache")}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    return os.environ | threads | caches | quiet | {"VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="module")
def ran(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what vLLM found for every case."""
    folder = tmp_path_factory.mktemp("vllm")
    cases = {
        name: {
            "folder": str(checkpoints(name)[1]),
            "trust": case.trust,
            "vocabulary": VOCABULARY,
            "context_tokens": CONTEXT,
            "chunk_tokens": CHUNK,
            "new_tokens": NEW,
            "prompts": PROMPTS,
        }
        for name, case in CASES.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = Path(__file__).with_name("vllm_worker.py")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [PYTHON, str(worker), str(folder)],
            env=environment(folder),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            status = process.wait(WORKER_SECONDS)
        finally:
            stop(process)
    assert status == 0, (folder / "log").read_text()[-3000:]
    return folder


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


class Reference:
    """Log-probabilities (tokens, vocabulary) of texts under a case's plan, or under another."""

    def __init__(self, source: Path, case: Case) -> None:
        self._model, self._case = EagerModel(source), case

    def __call__(self, ids: list[int], *, full: bool = False, wider: int = 0) -> Any:
        """Those of every position: of all layers full, or of a window so much wider, if asked."""
        kept = range(LAYERS) if full else self._case.kept
        kinds = [FULL if layer in kept else SLIDING for layer in range(LAYERS)]
        logits = self._model.logits(ids, kinds, self._case.window + wider)
        return logits.log_softmax(dim=-1).numpy()


def apart(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape and not numpy.isnan(found).any()
    return float(abs(found - expected).max())


def say(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        sys.stdout.write(f"{text}\n")


@pytest.mark.parametrize("name", HONOURED)
def test_vllm_computes_the_plan(
    name: str, ran: Path, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chunked prefill, decoding past the window, the prefix cache and batches, every token's."""
    failure = ran / f"{name}.txt"
    assert not failure.exists(), failure.read_text()[-3000:]
    source, out = checkpoints(name)
    case, found = HONOURED[name], numpy.load(ran / f"{name}.npz")
    expected, limit = Reference(source, case), LIMIT_OF.get(case.family, LIMIT)
    worst, from_full = 0.0, 0.0
    for index, prompt in enumerate(PROMPTS):
        tokens, decoded = found[f"tokens {index}"].tolist(), found[f"decoded {index}"]
        assert len(tokens) == NEW > WINDOW
        ids, rows = [*prompt, *tokens], slice(len(prompt) - 1, len(prompt) + NEW - 1)
        ours, full = expected(ids), expected(ids, full=True)
        worst = max(worst, apart(decoded, ours[rows]))
        from_full = max(from_full, apart(decoded, full[rows]))
        assert tokens == ours[rows].argmax(axis=1).tolist()
        # Under a window of one token vLLM finds no prefix again.
        cached = len(PROMPT) // BLOCK * BLOCK if index and case.window > 1 else 0
        assert int(found[f"cached {index}"]) == cached
        if index == 0:
            # The first token has no log-probability.
            worst = max(worst, apart(found["prompt"][1:], ours[: len(prompt) - 1]))
            for wider in (-1, 1) if case.window > 1 else (1,):
                other = expected(ids, wider=wider)[: len(prompt) - 1]
                assert apart(found["prompt"][1:], other) > 100 * limit
    say(f"{name}: {worst:.1e} to the brute force, {from_full:.1f} to full attention", capsys)
    assert worst < limit and from_full > 1
    read, plan = open_checkpoint(out)
    verdict = next(v for v in verdicts(read, plan.mask) if v.target == "vllm")
    assert ("--trust-remote-code" in str(verdict.command)) is (
        case.trust and name != "qwen3 trusted"
    )


@pytest.mark.parametrize("name", REFUSED)
def test_vllm_refuses_what_it_cannot_compute(name: str, ran: Path) -> None:
    assert not (ran / f"{name}.npz").exists()
    assert REFUSED[name][1] in (ran / f"{name}.txt").read_text()


def test_groups_of_layers_are_vllms(ran: Path) -> None:
    told = json.loads((ran / "groups.json").read_text())
    ours = {name: list(held_layers(*map(int, name.split(" of ")))) for name in told}
    assert len(told) == 780 and ours == told


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """The address of an OpenAI server with the flags of the support table."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--trust-remote-code", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env=environment(log.parent),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)


def ask(address: str, body: dict[str, Any], log: Path) -> Any:
    """The server's completion, once it answers at all."""
    deadline = time.monotonic() + SERVER_SECONDS
    while True:
        try:
            with urlopen(f"{address}/health", timeout=10):  # noqa: S310 - loopback
                break
        except OSError:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
    request = Request(  # noqa: S310 - loopback
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=120) as reply:  # noqa: S310 - loopback
        return json.load(reply)["choices"][0]


def test_the_openai_server_computes_the_plan_with_no_flag_but_trust(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At vLLM's defaults: compiled, and bfloat16, as it loads float32 on a CPU."""
    body = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    body |= {"logprobs": 20, "prompt_logprobs": 20, "return_tokens_as_token_ids": True}
    answers = {}
    with ExitStack() as servers:
        # Together, because most of their start is waiting for one core.
        logs = {name: tmp_path / f"{name}.log" for name in SERVED}
        folders = {name: checkpoints(name)[1] for name in SERVED}
        addresses = {
            name: servers.enter_context(served(folders[name], log)) for name, log in logs.items()
        }
        for name, address in addresses.items():
            answers[name] = ask(address, body | {"model": str(folders[name])}, logs[name])
    for name, answer in answers.items():
        decoded = [
            {int(token.removeprefix("token_id:")): logprob for token, logprob in row.items()}
            for row in answer["logprobs"]["top_logprobs"]
        ]
        prompt = [
            {int(token): entry["logprob"] for token, entry in row.items()}
            for row in answer["prompt_logprobs"][1:]
        ]
        tokens = [int(t.removeprefix("token_id:")) for t in answer["logprobs"]["tokens"]]
        assert len(tokens) == NEW
        expected, worst = Reference(checkpoints(name)[0], CASES[name]), []
        for full in (False, True):
            rows = expected([*PROMPT, *tokens], full=full)
            told = zip(rows[:-1], [*prompt, *decoded], strict=True)
            worst.append(max(abs(row[t] - found[t]) for row, found in told for t in found))
        say(f"server, {name}: {worst[0]:.2f} to the brute force, {worst[1]:.1f} to full", capsys)
        assert worst[0] < worst[1] / 10 and worst[1] > 1
