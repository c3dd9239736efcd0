"""What the fresh process is asked to compute, and starting it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from converter.checkpoint.verify.place import Place
from converter.common.errors import UsageError
from converter.model.dimensions import ModelDimensions
from converter.model.mask import Mask

if TYPE_CHECKING:
    import torch

# Tokens decoded one at a time after the prompt.
_DECODED = 8
# The prompt's length: the window of its last row begins where that of its first rows ends.
_WINDOWS = 2
# At least this long where the context allows: several blocks of the modeling file's attention.
_LEAST_TOKENS = 400
# What each code of a candidate runs: so many times the whole text (once whole, in chunks, for
# generation, twice in a batch and for what has no cache), and in so many calls.
CANDIDATE_PASSES = 7
CANDIDATE_CALLS = 8 + 3 * _DECODED
# Logits kept in memory at most, per run.
_LOGIT_VALUES = 1 << 24
_SEED = 20270101
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_KEPT_PREFIXES = ("LC_", "OMP_", "MKL_", "KMP_", "GOMP_", "CUDA_", "HIP_", "ROCR_")


@dataclass(frozen=True)
class Probe:
    """The text a checkpoint is tried on: random tokens, two windows long and some.

    Attributes:
        prompt_tokens: how many of the ids are the prompt; the rest is decoded.
        chunk_tokens: size of the prefill chunks; it does not divide the window.
        padding_tokens: how much of the front is cut in the padded run.
        rows: positions whose logits are compared, on both sides of the window's edge.
    """

    ids: tuple[int, ...]
    prompt_tokens: int
    chunk_tokens: int
    padding_tokens: int
    rows: tuple[int, ...]


def make_probe(shape: ModelDimensions, mask: Mask) -> Probe:
    """A probe for a model and a mask; the same one every time."""
    generator = random.Random(_SEED)  # noqa: S311 - a reproducible text, not a secret
    reach = mask.window_tokens + mask.sink_tokens
    length = min(shape.context_tokens, max(_WINDOWS * reach + 3 + _DECODED, _LEAST_TOKENS))
    # The last tokens of the vocabulary are often special or unused.
    ids = tuple(generator.randrange(shape.vocabulary * 9 // 10) for _ in range(length))
    prompt = max(length - _DECODED, length // 2, 1)
    most = max(64, _LOGIT_VALUES // shape.vocabulary)
    rows = set(range(length))
    if length > most:
        edge = {mask.window_tokens + i for i in (-2, -1, 0, 1, 2)} | {prompt - 1, length - 1}
        rows &= edge | {i * (length - 1) // (most - 1) for i in range(most)}
    return Probe(
        ids=ids,
        prompt_tokens=prompt,
        chunk_tokens=max(1, mask.window_tokens * 3 // 4 + 1),
        # A prompt of padding alone has no last token to go on from.
        padding_tokens=min(mask.window_tokens // 2 + 1, prompt // 2),
        rows=tuple(sorted(rows)),
    )


@dataclass(frozen=True)
class Answer:
    """What the fresh process found: how the loads went, logits and generated tokens by run.

    `failure` is the end of its error output when it crashed.
    """

    report: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    failure: str | None

    def runs(self, how: str) -> dict[str, torch.Tensor]:
        """The tensors of what was loaded `untrusted` or `trusted`, by run."""
        found = self.tensors.items()
        return {k.removeprefix(f"{how} "): v for k, v in found if k.startswith(f"{how} ")}


def ask(
    folder: Path,
    probe: Probe,
    *,
    native: bool,
    trust: bool,
    place: Place,
    auto_class: str,
    options: Mapping[str, Any],
    text: str,
) -> Answer:
    """Run the checkpoint on the probe in a fresh process, offline.

    Args:
        folder, probe: the checkpoint, and what to run.
        native: whether it must also compute the plan without its own code.
        trust: whether its own code may be run.
        place: where it runs.
        auto_class: the class of transformers to load it by.
        options: further options of `from_pretrained`.
        text: what its tokenizer is tried on; empty when it has none.

    Raises:
        UsageError: the device has too little memory.
    """
    from safetensors.torch import load_file

    with TemporaryDirectory(prefix="hybridize-verify-") as temporary:
        out, request = Path(temporary) / "logits.safetensors", Path(temporary) / "request.json"
        asked = asdict(probe) | asdict(place)
        asked |= {"folder": str(folder.resolve()), "native": native, "trust": trust}
        asked |= {"auto_class": auto_class, "options": dict(options), "text": text, "out": str(out)}
        request.write_text(json.dumps(asked), encoding="utf-8")
        # Of the caller's environment only what is needed: no secrets, no network.
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in _KEPT_VARIABLES or name.startswith(_KEPT_PREFIXES)
        }
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).with_name("candidate.py")), str(request)],
            # transformers would ask there whether to run code.
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=kept | offline | {"HF_MODULES_CACHE": f"{temporary}/modules"},
        )
        if done.returncode != 0 or not out.exists():
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            if "out of memory" in lines[-1].lower():
                raise UsageError(
                    "there is too little memory to run the checkpoint",
                    where=place.device,
                    got=lines[-1],
                    next_step="close other programs, or prove it on the CPU: --device cpu",
                )
            return Answer({}, {}, lines[-1])
        return Answer(json.loads(done.stdout.splitlines()[-1]), load_file(out), None)
