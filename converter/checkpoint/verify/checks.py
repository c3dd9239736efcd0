"""Does a checkpoint compute its plan? Every check, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converter.checkpoint.format import CheckpointFormat, format_of_plan
from converter.checkpoint.private import private_tokenizer, runnable
from converter.checkpoint.reader import open_checkpoint, stale_code
from converter.checkpoint.verify.place import Place, give_back_memory, place_proof
from converter.checkpoint.verify.report import Check, Report, names_check
from converter.checkpoint.verify.request import Answer, Probe, ask, make_probe
from converter.checkpoint.verify.static import static_checks
from converter.checkpoint.verify.weights import WeightHashes
from converter.common.errors import SourceError, refusing
from converter.common.units import human_time
from converter.model.mask import LINEAR, SLIDING
from converter.model.source import Source
from converter.plan.plan import Plan

if TYPE_CHECKING:
    import torch

    from converter.checkpoint.verify.reference import Reference

# Largest logit difference to the reference, as a share of the spread (standard deviation) of the
# reference's logits. Norms and rotary embeddings stay float32 inside a float64 model, and the whole
# of recurrent layers, which go in other steps with a cache: that model is as exact as in float32.
TOLERANCE = {"float64": 1e-5, "float32": 1e-3}
# A plan with sliding layers must differ from the source by this many tolerances past the window.
_CLEAR_DIFFERENCE = 3.0
# Text that tokenizers split differently: cases, digits, spaces, scripts, symbols, code.
SAMPLE = (
    "Hello, WORLD! It's 3.14159 or 12,345,678?  two spaces\n\n\ttabs; naïve café, Straße, "
    "Ελληνικά, Русский текст, 中文字符, 日本語, हिन्दी, עברית, 🙂👍🏽, x**2 + f(y) != {'a': [1]}"
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def verify(
    folder: Path,
    against: Source | None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Check a checkpoint against its plan and the source it was made from.

    Args:
        folder: the checkpoint.
        against: the model it was made from; None takes the source inside it.
        device, dtype: where to run it, as `place_proof` takes them.
        trust_remote_code: run the checkpoint's own Python files instead of this version's.
        say: is told how long it will take, where that is not moments.

    Raises:
        CheckpointError: the folder is not a checkpoint of ours.
        SourceError: weight files are damaged.
        UsageError: the device cannot be used, or has too little memory.
    """
    from converter.checkpoint.verify.duration import expected_seconds

    source, plan = open_checkpoint(folder)
    weights = WeightHashes(source, against)
    checks = list(static_checks(folder, source, plan, against))
    form = format_of_plan(source, plan)
    # What is rendered anew is proved to be the checkpoint's own only where the two are equal.
    trust = trust_remote_code or not stale_code(folder, source, plan)
    probe = make_probe(source.shape, plan.mask)
    place = place_proof(source, len(probe.ids), device, dtype)
    seconds = expected_seconds(source, plan, probe, place, form.native + trust)
    if seconds is not None:
        turns = ", one layer at a time" if place.in_turn else ""
        say(f"proving takes about {human_time(seconds)} here ({place.device}{turns})")
    has_tokenizer = any((source.folder / name).is_file() for name in _TOKENIZERS)
    give_back_memory()
    with runnable(folder, source, plan, trust=trust_remote_code) as own:
        answer = ask(
            own,
            probe,
            native=form.native,
            trust=trust,
            place=place,
            auto_class=source.family.auto_class,
            options=source.family.load_exactly,
            text=SAMPLE if has_tokenizer else "",
        )
    checks += _load_checks(answer, form, source, trust)
    if answer.failure is None:
        checks += _token_checks(answer, against or source)
        checks += _logit_checks(answer, plan, against or source, probe, place)
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
        native_class = form.model_class
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
    answer: Answer, plan: Plan, source: Source, probe: Probe, place: Place
) -> Iterator[Check]:
    """Every run of the checkpoint against the brute-force reference on the source."""
    from converter.checkpoint.verify.reference import Reference

    reference = Reference(source, place, plan)
    expected = _Expected(reference, probe)
    found = {how: runs for how in ("untrusted", "trusted") if (runs := answer.runs(how))}
    original = reference.original(probe.ids, probe.rows)
    planned = expected.whole(probe.rows)
    precision = "float32" if LINEAR in plan.layer_types else place.dtype
    limit, window = TOLERANCE[precision] * float(planned.double().std()), plan.mask.window_tokens
    within = [i for i, row in enumerate(probe.rows) if row < window]
    past = [i for i, row in enumerate(probe.rows) if row >= window]
    for how, runs in found.items():
        forward = runs["forward"]
        yield _close(f"source up to the window, {how}", forward[within], original[within], limit)
        yield _close(f"plan past the window, {how}", forward[past], planned[past], limit)
        if SLIDING in plan.layer_types or plan.is_mixed:
            apart, least = _difference(forward[past], original[past]), _CLEAR_DIFFERENCE * limit
            name = f"differs from the source past the window, {how}"
            yield Check(name, apart > least, apart, least)
        yield from _decode_checks(runs, expected, limit, how)


class _Expected:
    """The reference's logits for the candidate's runs, each pass over a text done once."""

    def __init__(self, reference: Reference, probe: Probe) -> None:
        self._reference, self._probe = reference, probe
        ids, prompt, chunk = probe.ids, probe.prompt_tokens, probe.chunk_tokens
        decoded = range(prompt, len(ids))
        self.chunked_rows = [min(i + chunk, prompt) - 1 for i in range(0, prompt, chunk)]
        self.chunked_rows += decoded
        self.last_rows = [prompt - 1, *decoded]
        rows = sorted({*probe.rows, *self.chunked_rows, *self.last_rows})
        self._place = {row: i for i, row in enumerate(rows)}
        self._whole = reference.planned(ids, rows, prompt)
        self._after: dict[tuple[int, ...], torch.Tensor] = {}
        cut = probe.padding_tokens
        self.cut = reference.planned(ids[cut:], [r - cut for r in self.last_rows], prompt - cut)

    def whole(self, rows: Sequence[int]) -> torch.Tensor:
        """Rows of the text, out of those that any run has."""
        return self._whole[[self._place[row] for row in rows]]

    def after(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """What is predicted for the tokens that follow the prompt: a row for each."""
        if tokens not in self._after:
            prompt = self._probe.prompt_tokens
            text, rows = (*self._probe.ids[:prompt], *tokens), self.last_rows[: len(tokens)]
            self._after[tokens] = self._reference.planned(text, rows, prompt)
        return self._after[tokens]


def _decode_checks(
    runs: Mapping[str, torch.Tensor], expected: _Expected, limit: float, how: str
) -> Iterator[Check]:
    """Cached, chunked, padded and generated rows against the uncached reference."""
    cached = expected.whole(expected.chunked_rows)
    yield _close(f"chunked prefill and cached decoding, {how}", runs["cached"], cached, limit)
    padded, whole = runs["padded"]
    yield _close(f"left padding, {how}", padded, expected.cut, limit)
    yield _close(f"batch, {how}", whole, expected.whole(expected.last_rows), limit)

    tokens, uncached = runs["generated"], runs["generated uncached"]
    same = tokens[: len(uncached)].equal(uncached)
    name = f"cached generation is uncached generation, {how}"
    yield Check(name, same, len(uncached), "equal")
    logits = expected.after(tuple(tokens.tolist()))
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
