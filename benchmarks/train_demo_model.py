"""Train the bundled demonstration model from nothing and write `benchmarks/demo-model/`.

    python benchmarks/train_demo_model.py

A small Qwen3 with full attention in every layer learns the text and the questions of
`converter.recall`, so that turning layers to sliding windows visibly costs answers. The curriculum
starts with facts asked again at once, without filler: looking up is learnt there first, and started
in the examples' own layout training would stay on guessing among the values it has seen.

State is kept under `--work` every few hundred steps; the same command continues after an
interruption.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import demo_data
import demo_quality  # noqa: F401 (registers the attention trained with)
import demo_record
import torch
from demo_data import ANSWER_KINDS, Stage, Vocabulary
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

CONTEXT_TOKENS = 288
STAGES = (
    Stage("4 chains", 100, 4, 0.0, 0.0, (0, 0), 0.2, 1500),
    Stage("8 chains", 200, 8, 0.0, 0.0, (0, 0), 0.1, 500),
    Stage("all kinds", 160, 0, 0.0, 0.0, (3, 0), 0.05, 1000),
    Stage("all kinds, filler", CONTEXT_TOKENS, 0, 0.3, 0.3, (3, 0), 0.05, 500),
    Stage("far questions", CONTEXT_TOKENS, 0, 0.8, 0.3, (3, 0), 0.03, 500),
    Stage("a link to a link", CONTEXT_TOKENS, 0, 0.6, 0.1, (3, 1), 0.0, 250),
    Stage("three links to links", CONTEXT_TOKENS, 0, 0.6, 0.1, (6, 3), 0.0, 0),
)


@dataclass(frozen=True)
class Settings:
    """What determines the model, besides the code."""

    seed: int = 1
    batch_tokens: int = 4608
    learning_rate: float = 4e-3
    warmup_steps: int = 100
    final_steps: int = 600
    text_weight: float = 0.2
    layers: int = 8


def build_model(vocabulary_size: int, layers: int) -> Qwen3ForCausalLM:
    """Make the untrained model.

    Projections start at 1/sqrt(inputs), those that write to the residual stream a further
    0.5/sqrt(2 x layers) smaller. With transformers' own 0.02 the lookup never forms.
    """
    config = Qwen3Config(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation("demo_training")
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
                scale = module.in_features**-0.5
                if name.endswith(("o_proj", "down_proj")):
                    scale *= 0.5 / math.sqrt(2 * layers)
                module.weight.normal_(0.0, scale)
            elif name.endswith(("q_norm", "k_norm")):
                module.weight.fill_(
                    1.7
                )  # at 1 no attention score can pass 5.7: too flat to look up
        model.model.embed_tokens.weight.normal_(0.0, 0.1)
    return model


def answer_and_text_loss(
    model: Qwen3ForCausalLM, tokens: Tensor, answers: Tensor, text_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss over answer tokens plus `text_weight` times the loss over a sixth of the other tokens.

    Args:
        model: the model.
        tokens: (sequences, length).
        answers: (sequences, length), kinds of answer tokens, 0 elsewhere.
        text_weight: what text counts for beside answers.

    Returns:
        The loss to train on, the mean answer loss, and for each answer token its kind and whether
        it is the most likely token.

    """
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    targets, kinds = tokens[:, 1:], answers[:, 1:]
    asked = kinds > 0
    other = ~asked & (torch.rand(targets.shape) < 1 / 6)
    logits = model.lm_head(torch.cat([hidden[asked], hidden[other]])).float()
    count = int(asked.sum())
    answer_loss = nn.functional.cross_entropy(logits[:count], targets[asked])
    text_loss = nn.functional.cross_entropy(logits[count:], targets[other])
    right = logits[:count].argmax(-1) == targets[asked]
    return answer_loss + text_weight * text_loss, answer_loss.detach(), kinds[asked], right


class Training:
    """Model, optimizers and position in the curriculum: all that a checkpoint holds."""

    def __init__(self, settings: Settings, vocabulary: Vocabulary, work: Path) -> None:
        self.settings, self.vocabulary, self.work = settings, vocabulary, work
        torch.manual_seed(settings.seed)
        self.rng = random.Random(settings.seed)  # noqa: S311
        self.model = build_model(vocabulary.size, settings.layers)
        blocks = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if all(p is not block for block in blocks)]
        # Orthogonalised steps for the matrices pass the plateaus in a fraction of AdamW's steps.
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                blocks, lr=settings.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(
                others, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
            ),
        ]
        self.step = self.stage = self.stage_step = 0
        self.running_loss = 9.0
        self.seconds = 0.0
        self.history: list[str] = []

    def save(self) -> None:
        """Replace the checkpoint in one move, so that a kill leaves the old one or the new one."""
        state: dict[str, Any] = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": self.rng.getstate(),
            "torch_random": torch.get_rng_state(),
            "history": self.history,
            "position": (self.step, self.stage, self.stage_step, self.running_loss, self.seconds),
        }
        self.work.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.work / "state.new")
        (self.work / "state.new").replace(self.work / "state.pt")

    def load(self) -> None:
        """Continue from the checkpoint when there is one."""
        path = self.work / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=False)
        if state["settings"] != asdict(self.settings):
            log(f"note: {path} was started with {state['settings']}")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.setstate(state["random"])
        torch.set_rng_state(state["torch_random"])
        self.step, self.stage, self.stage_step, self.running_loss, self.seconds = state["position"]
        self.history = state["history"]
        log(f"continuing at step {self.step}")

    def learning_rate(self) -> float:
        """Warm-up, constant through the curriculum, half a cosine over the last stage."""
        settings = self.settings
        peak = settings.learning_rate * min(1.0, (self.step + 1) / settings.warmup_steps)
        if self.stage < len(STAGES) - 1:
            return peak
        done = min(1.0, self.stage_step / settings.final_steps)
        return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def advance(self) -> None:
        """Go to the next stage when this one is learnt or has had its steps."""
        stage = STAGES[self.stage]
        self.stage_step += 1
        if self.stage == len(STAGES) - 1:
            return
        if self.running_loss < stage.until_loss or self.stage_step >= stage.most_steps:
            self.history.append(f"{stage.name}: {self.stage_step} steps")
            log(f"step {self.step}: '{stage.name}' left at loss {self.running_loss:.3f}")
            self.stage, self.stage_step, self.running_loss = self.stage + 1, 0, 9.0
            self.save()

    def run(self) -> None:
        """Train to the end of the last stage."""
        right, count = torch.zeros(len(ANSWER_KINDS) + 1), torch.zeros(len(ANSWER_KINDS) + 1)
        while self.stage < len(STAGES) - 1 or self.stage_step < self.settings.final_steps:
            started = time.perf_counter()
            stage = STAGES[self.stage]
            drawn = demo_data.batch(stage, self.vocabulary, self.rng, self.settings.batch_tokens)
            tokens, answers = (torch.from_numpy(array) for array in drawn)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, answer_loss, kinds, hits = answer_and_text_loss(
                    self.model, tokens, answers, self.settings.text_weight
                )
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            share = max(0.1, 1 / (self.stage_step + 1))
            self.running_loss += share * (float(answer_loss) - self.running_loss)
            right.index_add_(0, kinds, hits.float())
            count.index_add_(0, kinds, torch.ones(len(kinds)))
            self.step += 1
            self.seconds += time.perf_counter() - started
            if self.step % 50 == 0:
                shares = " ".join(
                    f"{kind} {float(right[i] / count[i]):.3f}"
                    for i, kind in enumerate(ANSWER_KINDS, 1)
                    if count[i]
                )
                log(
                    f"step {self.step} [{stage.name} {self.stage_step}] "
                    f"{self.seconds / 60:.1f} min loss {self.running_loss:.3f} {shares}"
                )
                right.zero_()
                count.zero_()
            if self.step % 100 == 0:
                self.save()
            self.advance()
        self.history.append(f"{STAGES[-1].name}: {self.stage_step} steps")


def log(message: str) -> None:
    """Report progress."""
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    """Train, write the folder, measure it, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here / "demo-model")
    parser.add_argument("--record", type=Path, default=here / "demo-model.md")
    parser.add_argument("--work", type=Path, default=here.parent / "build" / "demo-model")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--final-steps", type=int, default=Settings.final_steps)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings(seed=options.seed, final_steps=options.final_steps)
    tokenizer = demo_data.build_tokenizer()
    vocabulary = demo_data.vocabulary(tokenizer)
    demo_data.prove(tokenizer, vocabulary, STAGES)
    training = Training(settings, vocabulary, options.work)
    training.load()
    training.run()
    stored = demo_record.write_folder(training.model, tokenizer, options.out)
    run = demo_record.Run(
        seed=settings.seed,
        settings=asdict(settings),
        steps=training.step,
        minutes=training.seconds / 60,
        threads=options.threads,
        stages=tuple(training.history),
    )
    print(demo_record.write_record(stored, tokenizer, run, options.out, options.record))


if __name__ == "__main__":
    main()
