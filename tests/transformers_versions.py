"""What each release of transformers computes from the checkpoints that we write.

    python -m tests.transformers_versions

installs every release into a folder of its own, which is removed again, and writes the table of
docs/engines.md: 6 minutes. `tests/templates/test_transformers_versions.py` holds it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.brute_force import FULL, SLIDING, EagerModel
from tests.conftest import FAMILIES, LAYERS, MORE_FAMILIES, make_model
from tests.hybrids import NEW, PLAN, PROMPT, WINDOW, convert, rule

PAGE = Path(__file__).parent.parent / "docs" / "engines.md"
BEGIN, END = "<!-- table: python -m tests.transformers_versions -->\n", "<!-- end of table -->\n"
# The last before and the first after each change, and what lies between and beside them.
RELEASES = ("4.51.3", "4.52.4", "4.53.0", "4.56.2", "4.57.1", "5.0.0", "5.3.0", "5.4.0", "5.5.0")
RELEASES += ("5.12.1", "5.16.1", "5.19.0", "5.23.0")
# Of logits in float32; another plan differs by more than 1.
EQUAL = 1e-3
HONOURED = "honoured"
OTHERS = {"slides in every layer": [SLIDING] * LAYERS, "runs in full": [FULL] * LAYERS}


@dataclass(frozen=True)
class Case:
    """One checkpoint, and whether its code is trusted."""

    family: str
    mask: str = "plain"
    window: int = WINDOW
    trust: bool = True

    def __str__(self) -> str:
        window = "" if self.window == WINDOW else f" window {self.window}"
        return f"{self.family} {self.mask}{window}"


NATIVE = ("qwen2", "qwen3", "llama", "mistral", "smollm3")
CUSTOM = tuple(family for family in FAMILIES | MORE_FAMILIES if family not in NATIVE)
COLUMNS: dict[str, tuple[Case, ...]] = {
    "Qwen2, Qwen3": (Case("qwen2", trust=False), Case("qwen3", trust=False)),
    "Llama, Mistral": (Case("llama", trust=False), Case("mistral", trust=False)),
    "SmolLM3": (Case("smollm3", trust=False),),
    "`trust_remote_code=True`, any form": (
        *(Case(family) for family in (*NATIVE, *CUSTOM)),
        Case("qwen3", "sinks"),
        Case("qwen3", "full decode"),
        Case("qwen3", window=1),
    ),
}


class Bench:
    """The checkpoints of every case, and what each should compute.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cases = tuple(dict.fromkeys(case for cases in COLUMNS.values() for case in cases))
        self.source = cache(lambda family: make_model(root / family, family))
        self.eager = cache(lambda family: EagerModel(self.source(family)))
        self.folder = cache(self._convert)
        self.reference = cache(self._reference)

    def _convert(self, family: str, mask: str, window: int) -> Path:
        out = self.root / f"{family}-{mask}-{window}".replace(" ", "-")
        return convert(self.source(family), out, mask, window=window)

    def _reference(self, case: Case, ids: tuple[int, ...], kinds: tuple[str, ...]) -> torch.Tensor:
        given = rule(case.mask, len(PROMPT)) | {"window": case.window}
        logits: torch.Tensor = self.eager(case.family).logits(ids, kinds, **given)
        return logits

    def answers(self, packages: Path | None = None) -> dict[Case, dict[str, Any]]:
        """What a release computes, in a process of its own.

        Args:
            packages: the folder it is installed in; None for the one that runs the tests.
        """
        jobs, out = self.root / "jobs.json", self.root / "answers.pt"
        asked = [
            {
                "folder": str(self.folder(case.family, case.mask, case.window)),
                "prompt": PROMPT,
                "new_tokens": NEW,
                "trust": case.trust,
            }
            for case in self.cases
        ]
        jobs.write_text(json.dumps(asked), encoding="utf-8")
        places = {} if packages is None else {"PYTHONPATH": str(packages)}
        with tempfile.TemporaryDirectory() as modules:
            subprocess.run(
                [sys.executable, Path(__file__).with_name("load_by_version.py"), jobs, out],
                env=os.environ | places | {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"},
                cwd=self.root,
                capture_output=True,
                timeout=300,
                check=True,
            )
        return dict(zip(self.cases, torch.load(out), strict=True))

    def judge(self, case: Case, answer: dict[str, Any]) -> tuple[str, float]:
        """One word for what was computed, and how far it is from the plan (logits)."""
        if "logits" not in answer:
            return "refused", 0.0
        apart = self._apart(case, answer, PLAN)
        if apart <= EQUAL and "error" not in answer:
            return HONOURED, apart
        same = (word for word, kinds in OTHERS.items() if self._apart(case, answer, kinds) <= EQUAL)
        return next(same, "wrong"), apart

    def _apart(self, case: Case, answer: dict[str, Any], kinds: Sequence[str]) -> float:
        ids, plan = tuple(PROMPT), tuple(kinds)
        apart = [answer["logits"] - self.reference(case, ids, plan)]
        if "decoded" in answer:
            whole = self.reference(case, (*ids, *answer["tokens"]), plan)
            apart.append(answer["decoded"] - whole[len(ids) - 1 : -1])
        return max(float(difference.abs().max()) for difference in apart)

    def row(self, release: str, answers: dict[Case, dict[str, Any]]) -> str:
        """The line of a release: a word for each column, and the largest honoured difference."""
        judged = {case: self.judge(case, answer) for case, answer in answers.items()}
        cells, honoured = [], [apart for word, apart in judged.values() if word == HONOURED]
        for cases in COLUMNS.values():
            words = [judged[case][0] for case in cases]
            usual = max(words, key=words.count)
            unlike = [
                f"; {case}: {word}"
                for case, word in zip(cases, words, strict=True)
                if word != usual
            ]
            cells.append(usual + "".join(unlike))
        return " | ".join([f"| {release}", *cells, f"{max(honoured):.0e} |" if honoured else "|"])


def install(release: str, folder: Path) -> None:
    """Install a release and what it needs; torch is the one that runs the tests."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    # pip compares with packages that are here already and not used by this one.
    subprocess.run([*command, f"transformers=={release}"], capture_output=True, check=True)


def main() -> None:
    """Run every release and rewrite the table."""
    titles = ["transformers", *COLUMNS, "largest difference of a logit"]
    table = f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}\n"
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary))
        for release in RELEASES:
            with tempfile.TemporaryDirectory() as packages:
                install(release, Path(packages))
                line = bench.row(release, bench.answers(Path(packages)))
            print(line, file=sys.stderr)  # noqa: T201
            table += line + "\n"
    text = PAGE.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    PAGE.write_text(text[:begin] + table + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
