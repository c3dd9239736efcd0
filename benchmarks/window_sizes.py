"""What the window costs and saves on the bundled model: the same plan under windows of many sizes.

The plan keeps the two layers that the demonstration chooses. Prints the table of window-sizes.md:

    python benchmarks/window_sizes.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers

from converter.calibration.comparison import QUALITY, Candidate, evaluate_plans
from converter.calibration.run import RunContext
from converter.cli.console import Console
from converter.model.source import open_source
from converter.pipeline import calibration_run
from converter.plan.plan import cache_bytes
from converter.settings import Settings

MODEL = Path(__file__).parent / "demo-model"
KEPT = (2, 5)
WINDOWS = (4, 8, 16, 32, 64, 128)
EXAMPLES = 64
QUIET = Console(json_output=False, verbosity=-1)


def main() -> None:
    """Measure and print."""
    source = open_source(str(MODEL))
    shape, context = source.shape, source.shape.context_tokens
    whole = tuple(range(shape.layers))
    candidates = [Candidate("original", whole), Candidate("plan", KEPT), Candidate("sliding", ())]
    rows = []
    for window in WINDOWS:
        settings = Settings(
            window=window,
            length=256,
            samples=1,
            holdout=EXAMPLES,
            method="nll-restore",
            device="cpu",
        )
        with tempfile.TemporaryDirectory() as work:
            where = RunContext(Path(work), False, QUIET.progress, lambda _: None, QUIET.say)
            run = calibration_run(source, settings, where, comparing=False)
            found = evaluate_plans(run, run.examples.held_out, QUALITY, candidates, where.progress)
        original, plan, sliding = found
        share = cache_bytes(len(KEPT), run.mask, shape, context) / cache_bytes(
            shape.layers, run.mask, shape, context
        )
        above = [str(one.loss_above(original)) for one in (plan, sliding)]
        rows.append((window, f"{share:.0%}", above[0], plan.accuracy, above[1]))
    QUIET.print(
        f"{EXAMPLES} generated examples of 256 tokens; torch {torch.__version__}, transformers "
        f"{transformers.__version__}\n"
    )
    QUIET.print(
        "| window | KV cache | loss above, layers 2 and 5 full | answers right | all sliding |"
    )
    QUIET.print("|---|---|---|---|---|")
    for row in rows:
        QUIET.print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
