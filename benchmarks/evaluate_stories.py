"""Evaluate hybrids of small story models on texts and on published question sets.

    python benchmarks/evaluate_stories.py DATA

DATA holds `models/`, `texts/` and `qa/`. Prints Markdown. Questions are cut to the models' context
of 512 tokens: the question and the nearest text before it stay, whatever holds the answer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evaluation_record import ANSWERS, TEXT, by_variant, evaluate, hybridize

from converter.evaluation.summary import accuracy_text, difference_text
from converter.inference.tokenizer import Tokenizer, load_tokenizer

MODELS = ("stories260K", "stories3M-qwen3")
TEXTS = (
    "tinystories_sample_2MiB.txt",
    "pride_and_prejudice.md",
    "wikitext2_valid.txt",
)
WINDOW, CONTEXT = 32, 512
# What an item may take, with room for the start of a text and the answer's spare tokens.
ITEM_TOKENS, ANSWER_TOKENS = 470, 120
ROWS = 24
# Longer chunks would run across several stories, which these models never saw at once.
TEXT_TOKENS, TEXT_CHUNKS = 256, 16


def babi(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Text, question and answers of bAbI's tasks, a few of each."""
    for path in sorted(folder.glob("qa*_test.txt")):
        story: list[str] = []
        for line in path.read_text().splitlines()[:60]:
            number, _, rest = line.partition(" ")
            if number == "1":
                story = []
            parts = re.split(r"[\t|]", rest)
            if len(parts) > 1:
                yield " ".join(story), f"{parts[0].strip()} Answer:", [parts[1].strip()]
            else:
                story.append(rest.strip())


def long_bench(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """MiniLongBench's two question sets."""
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text()).values():
            text, _, question = row["origin_prompt"].rpartition("\n\nQuestion:")
            yield text, f"Question:{question}", row["gold"]


def lost_in_the_middle(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """UUID pairs; of the 75 those from the asked one on, so that a few fit."""
    with gzip.open(next(folder.glob("*.gz")), "rt") as file:
        for line in file:
            row = json.loads(line)
            pairs = [f'"{key}": "{value}"' for key, value in row["ordered_kv_records"]]
            at = next(i for i, pair in enumerate(pairs) if row["key"] in pair)
            nearest = pairs[at : at + 2]
            yield ",\n".join(nearest), f'Key: "{row["key"]}"\nValue: "', [row["value"]]


def qmsum(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Meetings, questions and the first sentence of their answers."""
    for line in (folder / "val.jsonl").read_text().splitlines():
        row = json.loads(line)
        talk = [f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"]]
        for query in row["specific_query_list"]:
            first, last = (int(end) for end in query["relevant_text_span"][0])
            answer = re.split(r"(?<=\.) ", query["answer"])[0]
            yield "\n".join(talk[first : last + 1]), f"{query['query']} Answer:", [answer]


SETS: dict[str, Callable[[Path], Iterator[tuple[str, str, list[str]]]]] = {
    "babi": babi,
    "minilongbench": long_bench,
    "lost_in_middle": lost_in_the_middle,
    "qmsum": qmsum,
}


def write_rows(path: Path, rows: Iterator[tuple[str, str, list[str]]], tokenizer: Tokenizer) -> int:
    """Questions cut to the context, as rows; how many had to be cut."""
    cut, lines = 0, []
    for text, question, answers in rows:
        kept, room = text, ITEM_TOKENS - max(len(tokenizer.encode(answer)) for answer in answers)
        if room < ITEM_TOKENS - ANSWER_TOKENS:
            continue
        while kept and len(tokenizer.encode(f"{kept}\n\n{question}")) > room:
            # The end of the text stays: it is what stands before the question.
            kept = kept[max(1, len(kept) // 10) :]
        cut += kept != text
        lines.append(json.dumps({"context": kept, "question": question, "answer": answers}))
    step = max(1, len(lines) // ROWS)
    path.write_text("\n".join(lines[::step][:ROWS]))
    return cut


def record(name: str, data: Path, root: Path) -> None:
    """Convert one model, evaluate it and print."""
    source, checkpoint = data / "models" / name, root / f"{name}-hybrid"
    hybridize(
        *("convert", source, checkpoint, "--window", WINDOW, "--budget", "1/2"),
        *("--data", data / "texts" / TEXTS[0], "--samples", 24, "--no-verify", "-q"),
    )
    tokenizer = load_tokenizer(source)
    rows: list[object] = []
    for key, read in SETS.items():
        path = root / f"{key}.jsonl"
        write_rows(path, read(data / "qa" / key), tokenizer)
        rows += ["--rows", path]
    print(f"# {name}\n")
    summary = evaluate(
        checkpoint,
        root / "report",
        *("--tasks", "none", *rows, "--samples", ROWS, "--lengths", CONTEXT),
        *("--budgets", "1/4", "--speed-runs", 0),
    )
    tasks: dict[str, Callable[[Any], object]] = {
        task: lambda v, task=task: (  # type: ignore[misc]
            f"{accuracy_text(v['tasks'][task])} {difference_text(v['tasks'][task]['difference'])}"
        )
        for task in summary["tasks"]
    }
    print("\nAccuracy, and the paired difference to the original.\n")
    print(by_variant(summary, tasks))
    print("\nOn the answers' tokens.\n")
    print(by_variant(summary, ANSWERS))
    for text in TEXTS:
        print()
        summary = evaluate(
            checkpoint,
            root / "report",
            *("--tasks", "none", "--text", data / "texts" / text, "--text-tokens", TEXT_TOKENS),
            *("--text-chunks", TEXT_CHUNKS, "--budgets", "1/4", "--periodic", "--speed-runs", 0),
        )
        print("\n" + by_variant(summary, TEXT))
    print()


def main() -> None:
    """Every model in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    with tempfile.TemporaryDirectory() as temporary:
        for name in MODELS:
            record(name, data, Path(temporary))


if __name__ == "__main__":
    main()
