"""Does a checkpoint compute its plan? Every check, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converter.checkpoint.format import CheckpointFormat, format_of
from converter.checkpoint.private import private_tokenizer, runnable
from converter.checkpoint.reader import open_checkpoint, stale_code
from converter.checkpoint.verify.report import Check, Report, names_check
from converter.checkpoint.verify.request import Answer, Probe, ask, make_probe
from converter.checkpoint.verify.static import static_checks
from converter.checkpoint.verify.weights import WeightHashes
from converter.common.errors import SourceError, refusing
from converter.model.mask import SLIDING
from converter.model.source import Source
from converter.plan.plan import Plan

if TYPE_CHECKING:
    import torch

    from converter.checkpoint.verify.reference import Reference

# Largest logit difference to the reference, as a share of the spread (standard deviation) of the
# reference's logits. Norms and rotary embeddings stay float32 inside a float64 model.
TOLERANCE = {"float64": 1e-5, "float32": 1e-3}
# A plan with sliding layers must differ from the source by this many tolerances past the window.
_CLEAR_DIFFERENCE = 3.0
# Text that tokenizers split differently: cases, digits, spaces, scripts, symbols, code.
SAMPLE = (
    "Hello, WORLD! It's 3.14159 or 12,345,678?  two spaces\n\n\ttabs; naïve café, Straße, "
    "Ελληνικά, Русский текст, 中文字符, 日本語, हिन्दी, עברית, 🙂👍🏽, x**2 + f(y) != {'a': [1]}"
)
# Models up to this many bytes of weights in float64 are verified in float64.
_EXACT_BYTES = 4 << 30
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def verify(
    folder: Path,
    against: Source | None,
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Check a checkpoint against its plan and the source it was made from.

    Args:
        folder: the checkpoint.
        against: the model it was made from; None takes the source inside it.
        dtype: None chooses float64 for small models, else float32.
        trust_remote_code: run the checkpoint's own Python files instead of this version's.

    Raises:
        CheckpointError: the folder is not a checkpoint of ours.
        SourceError: weight files are damaged.
    """
    source, plan = open_checkpoint(folder)
    weights = WeightHashes(source, against)
    checks = list(static_checks(folder, source, plan, against))
    form = format_of(source, plan.mask)
    # What is rendered anew is proved to be the checkpoint's own only where the two are equal.
    trust = trust_remote_code or not stale_code(folder, source, plan)
    if dtype is None:
        exact = source.weights.tensor_bytes * 8 // max(source.shape.kv_bytes_per_value, 1)
        dtype = "float64" if exact <= _EXACT_BYTES else "float32"
    probe = make_probe(source.shape, plan.mask)
    has_tokenizer = any((source.folder / name).is_file() for name in _TOKENIZERS)
    with runnable(folder, source, plan, trust=trust_remote_code) as own:
        answer = ask(
            own,
            probe,
            native=form.native,
            trust=trust,
            dtype=dtype,
            options=source.family.load_exactly,
            text=SAMPLE if has_tokenizer else "",
        )
    checks += _load_checks(answer, form, source, trust)
    if answer.failure is None:
        checks += _token_checks(answer, against or source)
        checks += _logit_checks(answer, plan, against or source, probe, dtype)
    checks += weights.checks()
    return Report(tuple(checks), weights.sampled)


def _load_checks(
    answer: Answer, form: CheckpointFormat, source: Source, trust: bool
) -> Iterator[Check]:
    """How the checkpoint loads, with and without trust."""
    if answer.failure is not None:
        yield Check("runs in a fresh process", False, answer.failure, "no error")
        return
    imported = answer.report["imported"]
    yield names_check("needs nothing of ours", imported, "nothing", "nothing imported")
    untrusted = answer.report.get("untrusted")
    if form.native:
        native_class = f"{form.base_class}ForCausalLM"
        found = untrusted["class"] if untrusted else "refused"
        yield Check("loads without trust", found == native_class, found, native_class)
    else:
        found = "refused" if untrusted is None else f"loaded as {untrusted['class']}"
        yield Check("refuses to load without trust", untrusted is None, found, "refused")
    if not trust:
        yield Check(
            "loads with trust",
            False,
            "not tried: the Python files are not this version's",
            "--trust-remote-code to run them all the same",
        )
    for how in ("untrusted", "trusted"):
        if (load := answer.report.get(how)) is not None:
            kinds = ("missing", "unexpected", "mismatched")
            problems = [f"{kind} {key}" for kind in kinds for key in load[f"{kind}_keys"]]
            yield names_check(f"keys, loaded {how}", problems, "all", "all")
    if (shapes := answer.report.get("shapes")) is not None:
        # Weights that the class holds in another layout have other names; loading them is above.
        held = source.weights.shapes
        wrong = sorted(k for k, shape in shapes.items() if list(held.get(k, shape)) != shape)
        yield names_check("shapes of the class", wrong[:3], f"{len(shapes)} tensors", "as stored")


def _token_checks(answer: Answer, source: Source) -> Iterator[Check]:
    """The checkpoint's tokenizer is the source's in what it does, whatever class it loads as."""
    found = answer.report["tokens"]
    if found is None:
        return
    from transformers import AutoTokenizer

    with (
        private_tokenizer(source.folder, source.config) as folder,
        refusing("the tokenizer cannot be loaded", source.folder, SourceError, folder),
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        expected = tokenizer.encode(SAMPLE)
    same = found == expected
    told = f"{len(found)} tokens" if same else f"{found[:8]}..."
    yield Check("tokens of a sample text", same, told, "the source's")


def _logit_checks(
    answer: Answer, plan: Plan, source: Source, probe: Probe, dtype: str
) -> Iterator[Check]:
    """Every run of the checkpoint against the brute-force reference on the source."""
    from converter.checkpoint.verify.reference import Reference

    reference, window = Reference(source, dtype, plan), plan.mask.window_tokens
    planned = reference.planned(probe.ids, probe.rows, probe.prompt_tokens)
    original = reference.original(probe.ids, probe.rows)
    limit = TOLERANCE[dtype] * float(planned.double().std())
    within = [i for i, row in enumerate(probe.rows) if row < window]
    past = [i for i, row in enumerate(probe.rows) if row >= window]
    for how in ("untrusted", "trusted"):
        if not (runs := answer.runs(how)):
            continue
        forward = runs["forward"]
        yield _close(f"source up to the window, {how}", forward[within], original[within], limit)
        yield _close(f"plan past the window, {how}", forward[past], planned[past], limit)
        if SLIDING in plan.layer_types:
            apart, least = _difference(forward[past], original[past]), _CLEAR_DIFFERENCE * limit
            name = f"differs from the source past the window, {how}"
            yield Check(name, apart > least, apart, least)
        yield from _decode_checks(runs, reference, probe, limit, how)


def _decode_checks(
    runs: Mapping[str, torch.Tensor], reference: Reference, probe: Probe, limit: float, how: str
) -> Iterator[Check]:
    """Cached, chunked, padded and generated rows against the uncached reference."""
    expected, ids = reference.planned, probe.ids
    prompt, cut = probe.prompt_tokens, probe.padding_tokens
    decoded = list(range(prompt, len(ids)))
    ends = [min(i + probe.chunk_tokens, prompt) - 1 for i in range(0, prompt, probe.chunk_tokens)]
    cached = expected(ids, ends + decoded, prompt)
    yield _close(f"chunked prefill and cached decoding, {how}", runs["cached"], cached, limit)
    rows = [prompt - 1, *decoded]
    padded, whole = runs["padded"]
    short = expected(ids[cut:], [row - cut for row in rows], prompt - cut)
    yield _close(f"left padding, {how}", padded, short, limit)
    yield _close(f"batch, {how}", whole, expected(ids, rows, prompt), limit)

    tokens = runs["generated"]
    same = tokens.equal(runs["generated uncached"])
    yield Check(f"cached generation is uncached generation, {how}", same, len(tokens), "equal")
    logits = expected((*ids[:prompt], *tokens.tolist()), rows[: len(tokens)], prompt)
    chosen = logits.gather(1, tokens[:, None])[:, 0]
    behind = float((logits.max(dim=1).values - chosen).max())
    # A tie within the tolerance may fall either way; anything more is another choice.
    yield Check(f"generation is the reference's, {how}", behind <= 2 * limit, behind, 2 * limit)


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest absolute difference; infinite when a value is not a number."""
    if not left.numel():
        return 0.0
    worst = float((left.double() - right.double()).abs().max())
    return worst if worst == worst else float("inf")


def _close(name: str, found: torch.Tensor, expected: torch.Tensor, limit: float) -> Check:
    worst = _difference(found, expected)
    return Check(name, worst <= limit, worst, limit)
