"""Whether what arXiv 2606.27791 reports for one model holds on those measured here.

Qwen3-4B on LongMemEval: choosing a quarter of the layers by NLL keeps 64.6, close to every second
layer (65.0), far above every fourth (54.2 and 53.2, two offsets) and above a quarter chosen as in
LightTransfer (38.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from evaluation_record import table
from selectors_results import (
    Advantage,
    Budget,
    Model,
    Results,
    Run,
    accuracy_advantage,
    loss_advantage,
)
from selectors_text import interval

from converter.calibration.selectors import BEST
from converter.calibration.selectors.one_layer import NLL_RESTORE

# A plan is close to another if it is worse by less than this share of what sliding in every layer
# costs. The paper's 0.4 of 65 points are far within; about what so many questions can resolve.
CLOSE_SHARE = 0.05
BUDGET = "1/4"

Verdict = Literal["holds", "reversed", "not clear"]


@dataclass(frozen=True)
class Claim:
    """That the quarter chosen by NLL does better than other plans, or comes close to them.

    Attributes:
        against: what the other plans are.
        paper: the paper's accuracies, ours first.
        close: it is enough not to be much worse.
        budget: the other plans' budget.
        runs: the other plans; of several, the mean.
    """

    against: str
    paper: str
    close: bool
    budget: str
    runs: Callable[[Budget], list[Run]]


CLAIMS = (
    Claim("periodic 1/2, best offset", "64.6, 65.0", True, "1/2", lambda b: [b.best_periodic]),
    Claim("periodic 1/2, mean of offsets", "not reported", True, "1/2", lambda b: b.periodic),
    Claim("periodic 1/4, best offset", "64.6, 54.2", False, "1/4", lambda b: [b.best_periodic]),
    Claim("periodic 1/4, mean of offsets", "64.6, 53.7", False, "1/4", lambda b: b.periodic),
    Claim("lazy 1/4", "64.6, 38.2", False, "1/4", lambda b: [b.run("lazy")]),
)


@dataclass(frozen=True)
class Finding:
    """How one claim fares on one model.

    Attributes:
        advantage: of the plan over the others.
        same: they are one plan.
        verdict: whether that is what the paper reports.
    """

    advantage: Advantage
    same: bool
    verdict: Verdict


@dataclass(frozen=True)
class Measure:
    """What is compared: the difference of two plans, and what sliding in every layer costs."""

    name: str
    advantage: Callable[[Run, Sequence[Run]], Advantage]

    def find(self, claim: Claim, model: Model, name: str) -> Finding:
        """Put a claim to a model.

        Args:
            claim: what the paper reports.
            model: where it is looked for.
            name: the selector that stands for the paper's.
        """
        budget = model.budgets[BUDGET]
        run, others = budget.run(name), claim.runs(model.budgets[claim.budget])
        found = self.advantage(run, others)
        margin = 0.0
        if claim.close:
            sliding = budget.run("all sliding")
            margin = CLOSE_SHARE * self.advantage(budget.original, [sliding]).mean
        same = all(other.layers == run.layers for other in others)
        return Finding(found, same, judge(found, margin))


MEASURES = (
    Measure("accuracy", accuracy_advantage),
    Measure("NLL", loss_advantage),
)


def judge(found: Advantage, margin: float) -> Verdict:
    """Whether an advantage is above `-margin` with its whole interval, or below, or neither."""
    if found.low > -margin:
        return "holds"
    return "reversed" if found.high < -margin else "not clear"


def ordering(results: Results) -> list[str]:
    """The section on the paper's ordering."""
    parts = [
        "## Does the paper's ordering hold here?",
        "[arXiv 2606.27791](https://arxiv.org/abs/2606.27791) reports for Qwen3-4B on LongMemEval "
        "that a quarter of the layers chosen by NLL (64.6) comes close to every second layer "
        "(65.0) and is far above every fourth (54.2 and 53.2, two offsets) and a quarter chosen "
        f"as in LightTransfer (38.2). Its selector is `{NLL_RESTORE.name}` here; `{BEST}` is "
        "ours. Below is how much better either does at 1/4 than the plans on the left (positive: "
        "better; mean over test examples with the 95% interval of the paired difference). Against "
        "1/4, the ordering *holds* if the whole interval is above zero and is *reversed* if it is "
        "below. Against 1/2, where the paper says close, zero is replaced by a loss of "
        f"{CLOSE_SHARE:.0%} of what sliding in every layer costs. In between it is *not clear*.",
    ]
    budgets = results.models[0].budgets
    claims = [claim for claim in CLAIMS if claim.budget in budgets and BUDGET in budgets]
    if not claims:
        return []
    counts = []
    for measure in MEASURES:
        rows = []
        for name in (NLL_RESTORE.name, BEST):
            findings = [
                [measure.find(claim, model, name) for model in results.models] for claim in claims
            ]
            rows += [
                (f"`{name}` {BUDGET}", claim.against, claim.paper, *map(_verdict, found))
                for claim, found in zip(claims, findings, strict=True)
            ]
            counts.append(_count(name, measure, [one for found in findings for one in found]))
        models = [model.name for model in results.models]
        parts.append(f"{measure.name[0].upper()}{measure.name[1:]}:")
        parts.append(table(("plan", "against", "paper", *models), rows))
    return [*parts, "In all: " + "; ".join(counts) + "."]


def _verdict(finding: Finding) -> str:
    advantage = "same layers" if finding.same else interval(finding.advantage)
    return f"{advantage}: **{finding.verdict}**"


def _count(name: str, measure: Measure, findings: Sequence[Finding]) -> str:
    """How many hold, in words."""
    count = Counter(finding.verdict for finding in findings)
    return (
        f"by {measure.name}, `{name}`: {count['holds']} of {len(findings)} comparisons hold, "
        f"{count['reversed']} reversed, {count['not clear']} not clear"
    )
