"""Does llama.cpp compute a checkpoint's plan from a GGUF? Every check, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from converter.checkpoint.reader import open_checkpoint
from converter.checkpoint.verify.checks import SAMPLE, TOLERANCE
from converter.checkpoint.verify.report import Check, Report
from converter.checkpoint.verify.request import Probe, make_probe
from converter.common.progress import quiet_libraries
from converter.engines.gguf.architecture import WINDOW
from converter.engines.gguf.hybrid_file import HONOURED, HybridFile, open_hybrid
from converter.engines.gguf.llama_cpp import BATCH_TOKENS, LlamaCppSettings
from converter.engines.gguf.process import LlamaCppProcess
from converter.engines.gguf.tokenizer import load_fast
from converter.engines.gguf.writer import F32
from converter.inference.load import Placement, load_checkpoint
from converter.inference.tokenizer import load_tokenizer
from converter.model.source import Source
from converter.plan.plan import Plan

_TEXTS = (
    SAMPLE,
    "",
    " ",
    "   three spaces in front, two behind  ",
    "\n\n\nlines\r\nand\ttabs\n",
    "1 12 123 1234 12345 1,234.5 ½ ² Ⅷ ٣٤٥",
    "def f(x):\n    return {k: v for k, v in x.items() if v != '\\n'}",
    "I've they'RE we'Ll don't DON'T",
    "ສະບາຍດີ ជំរាបសួរ ሰላም გამარჯობა 안녕하세요 привет, мир! ¿Qué tal?",
    "🚀🇺🇳👩‍👩‍👧‍👦 ∑∫√ ←→ ﷽ \u200b zero width",
)
# How far a file with rounded weights may be from the hybrid, as a share of how far it is when its
# window is widened to everything; both root mean squares over the rows past the window. Below 1 it
# is nearer to the hybrid than to full attention, however coarse the rounding.
_ROUNDED_LIMIT = 1.0
# A plan with sliding layers must differ from full attention by this many tolerances.
_CLEAR_DIFFERENCE = 3.0


def verify_gguf(
    path: Path, checkpoint: Path, *, trust_remote_code: bool, warn: Callable[[str], None]
) -> Report:
    """Check a file against the checkpoint that it was made from.

    The file runs in a process of its own, in float32 with a float32 cache.

    Args:
        warn: as `LlamaCppProcess` takes it.

    Raises:
        GgufError: it is damaged or not ours, or llama.cpp cannot run it.
        CheckpointError: the folder is not a checkpoint of ours.
    """
    file = open_hybrid(path)
    source, plan = open_checkpoint(checkpoint)
    checks = list(_plan_checks(file, plan))
    if not all(check.ok for check in checks):
        return Report(tuple(checks))
    probe = make_probe(source.shape, plan.mask)
    answer, logits = _ask(file, probe, warn)
    checks += _engine_checks(file, answer, probe)
    quiet_libraries()
    placement = Placement("cpu", "float32")
    hybrid = load_checkpoint(checkpoint, source, plan, placement, trust=trust_remote_code)
    checks += _logit_checks(file, hybrid, probe, answer["generated"], logits)
    checks.append(_token_check(source, answer["tokens"]))
    return Report(tuple(checks))


def _plan_checks(file: HybridFile, plan: Plan) -> Iterator[Check]:
    """The file says what the checkpoint says, and by a name that llama.cpp heeds."""
    same = file.plan.layer_types == plan.layer_types and file.plan.mask == plan.mask
    yield Check("the plan is the checkpoint's", same, file.plan.strip, plan.strip)
    yield Check(
        "the architecture honours it",
        file.honoured,
        file.container.arch,
        "honoured" if file.honoured else "an architecture that does; this one ignores the plan",
    )
    said = file.container.metadata.get(HONOURED)
    claim = None if said is None else bool(said.value)
    yield Check("what the file claims", claim == file.honoured, str(claim), str(file.honoured))


def _ask(
    file: HybridFile, probe: Probe, warn: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What llama.cpp says, and its logits as planned and with the window widened."""
    ids, prompt = probe.ids, probe.prompt_tokens
    new_tokens = len(ids) - prompt
    settings = LlamaCppSettings(len(ids) + new_tokens, True, None, _batch_tokens(probe))
    with LlamaCppProcess(file.path, settings, warn) as model:
        planned = model.feed(ids, probe.rows)
        answer = {
            "window_tokens": model.window_tokens,
            "caches": model.caches,
            "generated": list(model.generate(ids[:prompt], new_tokens)),
            "tokens": [model.tokenize(text, around=True) for text in _TEXTS],
        }
    widened = planned
    if file.sliding_layers:
        # Turns every layer back into full attention.
        overrides = {f"{file.container.arch}.{WINDOW}": 1 << 20}
        settings = replace(model.settings, overrides=overrides)
        with LlamaCppProcess(file.path, settings, warn) as model:
            widened = model.feed(ids, probe.rows)
    return answer, {"planned": planned, "widened": widened}


def _batch_tokens(probe: Probe) -> int:
    """Chunks that do not divide the window, so that its edge falls everywhere."""
    return min(BATCH_TOKENS, max(probe.chunk_tokens, 32))


def _engine_checks(file: HybridFile, answer: dict[str, Any], probe: Probe) -> Iterator[Check]:
    """The window and the caches that llama.cpp made of the plan."""
    wanted = file.plan.mask.window_tokens if file.sliding_layers else 0
    found = answer["window_tokens"]
    yield Check("window that llama.cpp works with", found == wanted, found, wanted)
    context, batch = 2 * len(probe.ids) - probe.prompt_tokens, _batch_tokens(probe)
    settings = LlamaCppSettings(context, exact=True, batch_tokens=batch)
    caches = sorted(tuple(cache) for cache in answer["caches"])
    promised = sorted(file.expected_caches(settings))
    spelled = [
        ", ".join(f"{layers} layers of {cells} tokens" for cells, layers in group)
        for group in (caches, promised)
    ]
    yield Check("KV cache has the plan's size", caches == promised, *spelled)


def _hybrid_logits(hybrid: Any, ids: Sequence[int], rows: Sequence[int]) -> NDArray[Any]:
    """The checkpoint's logits (rows, vocabulary) in transformers, from one pass over a text."""
    with torch.inference_mode():
        kept = torch.tensor(list(rows))
        output = hybrid(torch.tensor([list(ids)]), logits_to_keep=kept, use_cache=False)
    logits: NDArray[Any] = output.logits[0].numpy()
    return logits


def _logit_checks(
    file: HybridFile,
    hybrid: Any,
    probe: Probe,
    generated: list[int],
    logits: dict[str, NDArray[Any]],
) -> Iterator[Check]:
    """llama.cpp's logits against transformers' and against its own with the window widened."""
    expected = _hybrid_logits(hybrid, probe.ids, probe.rows)
    planned, widened = logits["planned"], logits["widened"]
    window = file.plan.mask.window_tokens
    past = [i for i, row in enumerate(probe.rows) if row >= window]
    within = [i for i, row in enumerate(probe.rows) if row < window]
    limit = TOLERANCE["float32"] * float(expected.std())
    worst = _largest(planned - expected)
    if all(tensor.type_number == F32 for tensor in file.container.tensors):
        yield Check("logits are the hybrid's", worst <= limit, worst, limit)
        yield _generation_check(hybrid, probe, generated, limit)
    elif file.sliding_layers and past:
        from_full = max(_mean_square(widened[past] - expected[past]), 1e-30)
        share = (_mean_square(planned[past] - expected[past]) / from_full) ** 0.5
        name = "rounded weights stay nearer to the hybrid than full attention"
        yield Check(name, share <= _ROUNDED_LIMIT, share, _ROUNDED_LIMIT)
    else:
        # Nothing to tell apart: how much rounding changed is told, not judged.
        yield Check("logits are numbers", worst < float("inf"), worst, "finite")
    if file.sliding_layers:
        same = _largest(planned[within] - widened[within])
        yield Check("up to the window, widening it changes nothing", same <= limit, same, limit)
        apart, least = _largest(planned[past] - widened[past]), _CLEAR_DIFFERENCE * limit
        yield Check("past the window, widening it changes the logits", apart > least, apart, least)


def _generation_check(hybrid: Any, probe: Probe, generated: list[int], limit: float) -> Check:
    """Greedy decoding chose what the hybrid chooses; a tie within the limit may fall either way."""
    prompt = probe.prompt_tokens
    text = (*probe.ids[:prompt], *generated)
    logits = _hybrid_logits(hybrid, text, range(prompt - 1, len(text) - 1))
    chosen = logits[range(len(generated)), generated]
    behind = _largest(logits.max(axis=1) - chosen)
    return Check("greedy decoding is the hybrid's", behind <= 2 * limit, behind, 2 * limit)


def _largest(difference: NDArray[Any]) -> float:
    """Largest magnitude; infinite when a value is not a number."""
    worst = float(numpy.abs(difference).max(initial=0.0))
    return worst if worst == worst else float("inf")


def _mean_square(difference: NDArray[Any]) -> float:
    found = float(numpy.square(difference, dtype=numpy.float64).mean())
    return found if found == found else float("inf")


def _token_check(source: Source, found: list[list[int]]) -> Check:
    """llama.cpp tokenizes the sample texts as the checkpoint's tokenizer does."""
    path = source.folder / "tokenizer.json"
    # Itself where it is there: transformers may read it in the manner of the model's type instead.
    if path.is_file():
        tokenizer = load_fast(path)
        expected = [tokenizer.encode(text).ids for text in _TEXTS]
    else:
        slow = load_tokenizer(source.folder, source.config)
        expected = [slow.encode(text) for text in _TEXTS]
    pairs = zip(_TEXTS, found, expected, strict=True)
    different = [repr(text[:20]) for text, left, right in pairs if left != right]
    same = f"{sum(map(len, expected))} tokens"
    value = f"otherwise in {', '.join(different)}" if different else same
    return Check("tokens of sample texts", not different, value, "the checkpoint's tokenizer")
