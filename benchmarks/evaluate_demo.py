"""Evaluate the demonstration model's hybrids: budgets, evenly spaced layers, another selector.

Prints Markdown. The text is of the kind that the model was trained on, freshly drawn: filler with
facts in it, and one of them at the end.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from evaluation_record import TEXT, by_variant, estimates, evaluate, heatmap, hybridize, table

from converter.calibration.data.recall import base_prompt, recall_examples
from converter.common.statistics import Estimate
from converter.evaluation.summary import accuracy_text, difference_text
from converter.inference.tokenizer import load_tokenizer

DEMO = Path(__file__).parent / "demo-model"
EXAMPLES, EXAMPLE_TOKENS, SEED = 120, 256, 4711


def recall_text() -> str:
    """Recall examples with their answers, one after the other."""
    tokenizer = load_tokenizer(DEMO)
    examples = recall_examples(
        lambda text: len(tokenizer.encode(text)),
        samples=EXAMPLES,
        length_tokens=EXAMPLE_TOKENS,
        reach_tokens=0,
        seed=SEED,
    )
    return " ".join(f"{base_prompt(example)} {example.answer}." for example in examples)


def main() -> None:
    """Convert, evaluate and print."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        checkpoint, scores = root / "demo-hybrid", root / "remove.json"
        hybridize("convert", DEMO, checkpoint, "--recipe", "demo", "--no-verify", "-q")
        calibration = ("--recipe", "demo", "--method", "nll-remove", "--out", scores, "-q")
        hybridize("calibrate", DEMO, *calibration)
        for budget, name in (("1/8", "remove-1-8"), ("1/4", "remove-1-4"), ("1/2", "remove-1-2")):
            plan = ("--scores", scores, "--budget", budget, "--out", root / f"{name}.json")
            hybridize("plan", DEMO, *plan, "-q")
        text = root / "recall.txt"
        text.write_text(recall_text())
        summary = evaluate(
            checkpoint,
            root / "report",
            *("--lengths", "96,160,224,288", "--samples", 80, "--batch", 16),
            *("--budgets", "1/8,1/2", "--periodic", "--text", text, "--speed-runs", 5),
            *("--text-tokens", EXAMPLE_TOKENS),
            *(
                part
                for name in ("remove-1-8", "remove-1-4", "remove-1-2")
                for part in ("--plan", root / f"{name}.json")
            ),
        )
    print("\n## Recall\n")
    print(
        by_variant(
            summary,
            {
                "accuracy": lambda v: accuracy_text(v["tasks"]["recall"]),
                "difference to the original": lambda v: difference_text(
                    v["tasks"]["recall"]["difference"]
                ),
                **estimates("answers", kl="KL on answers"),
                "lost, won": lambda v: (
                    f"{v['answers']['flips']['lost']}, {v['answers']['flips']['won']} "
                    f"of {v['answers']['flips']['tokens']}"
                ),
                "KV cache": lambda v: f"{v['cost'][-1]['kv_bytes'] / 1024:.0f} KiB",
            },
        )
    )
    print("\n## Where in the text\n\nRight answers by length and depth of the evidence.\n")
    for name, baseline in (
        ("original", None),
        ("hybrid", None),
        ("hybrid", "original"),
        ("nll-restore 1/8", "original"),
        ("nll-restore 1/2", "original"),
        ("periodic 2 of 8, offset 2", "original"),
    ):
        print(f"{name}{f' less {baseline}' if baseline else ''}\n")
        print(heatmap(summary, name, "recall", baseline) + "\n")
    print("## By distance from the evidence\n\nLoss on answers, nats per token.\n")
    named = ("original", "nll-restore 1/8", "hybrid", "nll-restore 1/2")
    rows = summary["variants"]["original"]["by_distance"]
    print(
        table(
            ("tokens", "n", *named),
            [
                (
                    f"{row['above_tokens'] + 1} to {row['up_to_tokens']}",
                    row["n"],
                    *(Estimate(**summary["variants"][n]["by_distance"][i]["nll"]) for n in named),
                )
                for i, row in enumerate(rows)
            ],
        )
    )
    print("\n## Language\n\nText of the kind it was trained on.\n")
    print(by_variant(summary, TEXT))


if __name__ == "__main__":
    main()
