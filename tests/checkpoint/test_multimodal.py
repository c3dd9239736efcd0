"""Multimodal models as they are published: converted whole, images and all.

The reference is the unmodified model in transformers' eager code, its layers handed masks that were
written down pair by pair.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from converter.common.errors import FamilyError, SourceError
from converter.model.source import open_source
from tests.brute_force import FULL, Rule, additive, hand_mask
from tests.cli.test_convert import run_json
from tests.conftest import (
    IMAGE_TOKENS,
    MIXED_FAMILIES,
    MORE_FAMILIES,
    SIZES,
    VISION,
    make_model,
    make_tokenizer,
    run_cli,
)

# A part that sees, of other families.
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
WINDOW, TEXT, PATCHES = 16, 70, 16
# Of 4 layers 1 and 3 attend fully in the model itself, of which the plan keeps 1.
KEPT = 1
Converted = tuple[Path, Path, Rule]
EXACTLY: dict[str, Any] = {"dtype": torch.float64, "local_files_only": True}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def multimodal(folder: Path, family: str) -> Path:
    """A model with what stands beside published ones: a processor, a part that drafts."""
    make_model(folder, family)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.zeros(64, 128)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    named = {"auto_map": {"AutoProcessor": "processing.Mine"}, "patch_size": VISION["patch_size"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(named))
    return folder


@pytest.fixture(scope="module", params=[("qwen3_5", 3), ("qwen3_5_moe", 0)], ids=str)
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    """A source, its checkpoint, and what the latter's sliding layers see."""
    family, sinks = request.param
    root = tmp_path_factory.mktemp("multimodal")
    source, out = multimodal(root / "m", family), root / "out"
    options = ("--layers", KEPT, "--window", WINDOW, "--sinks", sinks, "--no-verify", "-q")
    assert run_cli("convert", source, out, *options) == 0
    return source, out, Rule(WINDOW, sinks)


def with_images() -> dict[str, torch.Tensor]:
    """A text with two images of four tokens each, the second out of sight of the first."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 256, (1, TEXT), generator=generator)
    for start in (5, 45):
        ids[0, start] = IMAGE_TOKENS["vision_start_token_id"]
        ids[0, start + 1 : start + 5] = IMAGE_TOKENS["image_token_id"]
        ids[0, start + 5] = IMAGE_TOKENS["vision_end_token_id"]
    values = 3 * VISION["temporal_patch_size"] * VISION["patch_size"] ** 2
    pixels = torch.randn(2 * PATCHES, values, dtype=torch.float64, generator=generator)
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == IMAGE_TOKENS["image_token_id"]).int(),
    }


def load(folder: Path, its_class: Any = AutoModelForImageTextToText, **options: Any) -> Any:
    options = {"experts_implementation": "eager", **EXACTLY, **options}
    return its_class.from_pretrained(folder, **options).eval()


@pytest.mark.usefixtures("exactly")
@torch.inference_mode()
def test_images_are_seen_through_the_plan(converted: Converted) -> None:
    source, out, rule = converted
    original = load(source, attn_implementation="eager")
    hybrid = load(out, trust_remote_code=True)
    given = with_images()
    layers = original.get_decoder().layers
    masks = {1: additive(Rule(None), TEXT, torch.float64), 3: additive(rule, TEXT, torch.float64)}
    hooks = [hand_mask(layers[index], mask) for index, mask in masks.items()]
    expected = original(**given, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    assert (hybrid(**given, use_cache=False).logits - expected).abs().max() < 1e-10
    blank = given | {"pixel_values": torch.zeros_like(given["pixel_values"])}
    assert (hybrid(**blank, use_cache=False).logits - expected).abs().max() > 1e-3
    whole = original(**given, use_cache=False).logits
    assert (whole - expected).abs().max() > 1e-3
    hybrid.set_full_attention_layers([1, 3])
    assert (hybrid(**given, use_cache=False).logits - whole).abs().max() < 1e-10


@torch.inference_mode()
def test_an_answer_about_images_is_the_same_with_a_cache(converted: Converted) -> None:
    hybrid = load(converted[1], trust_remote_code=True)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    answers = [
        hybrid.generate(**with_images(), **options, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*answers)


def test_it_loads_by_both_classes_and_by_neither_without_trust(
    converted: Converted,
) -> None:
    for its_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model = load(converted[1], its_class, trust_remote_code=True)
        assert hasattr(model.model, "visual")
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(converted[1], its_class, trust_remote_code=False)


def failed_checks(folder: Path, *options: object) -> set[str]:
    with redirect_stdout(StringIO()) as told:
        status = run_cli("verify", folder, "--json", "-q", *options)
    report = json.loads(told.getvalue())
    assert report["ok"] is (status == 0)
    return {check["name"] for check in report["checks"] if not check["ok"]}


def test_it_is_proved_and_carries_its_processor_without_code(
    converted: Converted,
) -> None:
    source, out, _ = converted
    assert failed_checks(out, "--against", source) == set()
    written = json.loads((out / "config.json").read_text())
    assert "layer_types" not in written
    assert written["text_config"] == json.loads((source / "config.json").read_text())["text_config"]
    assert written["hybrid"]["layer_types"].count(FULL) == 1
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"patch_size": 4}
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText" in card


@pytest.mark.parametrize("damage", ["image part", "plan", "language model"])
def test_tampering_is_caught(damage: str, converted: Converted, tmp_path: Path) -> None:
    out = Path(shutil.copytree(converted[1], tmp_path / "out"))
    config = json.loads((out / "config.json").read_text())
    shard, wanted = out / "model.safetensors", {"config.json says the plan"}
    if damage == "plan":
        kinds = config["hybrid"]["layer_types"]
        kinds[1], kinds[3] = kinds[3], kinds[1]
    elif damage == "language model":
        config["text_config"]["rope_parameters"]["rope_theta"] *= 2
    else:
        tensors = load_file(shard)
        del tensors["model.visual.patch_embed.proj.weight"]
        shard.unlink()
        save_file(tensors, shard, metadata={"format": "pt"})
        wanted = {"keys, loaded trusted", "sizes and hashes"}
    (out / "config.json").write_text(json.dumps(config))
    failed = failed_checks(out)
    assert wanted <= failed
    assert damage == "image part" or "plan past the window, trusted" in failed


def test_text_is_measured_and_run(tmp_path: Path) -> None:
    source, out = multimodal(tmp_path / "m", "qwen3_5"), tmp_path / "out"
    options = ("--samples", 4, "--holdout", 2, "--validation", 2, "--length", 400)
    measure = ("--method", "nll-restore", "--window", WINDOW, "--budget", "1/2", "-q")
    assert run_cli("convert", source, out, *options, *measure) == 0
    scores = json.loads((out / "hybrid" / "scores.json").read_text())
    assert [layer["index"] for layer in scores["layers"]] == [1, 3]
    prompt = ("--prompt", "The quick brown fox jumps over the lazy dog", "--max-new", 5)
    told = run_json("run", out, *prompt, "--original", "-q")
    assert told["new_tokens"] == told["original"]["new_tokens"] == 5
    # Speed is timed on one text after answers to several at once.
    few = ("--lengths", 400, "--depths", 2, "--samples", 4, "--speed-runs", 1, "-q")
    report = run_json("evaluate", out, "--against", source, *few, "--out", tmp_path / "report")
    assert report["tasks"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text_config": None}, "text_config"),
        ({"text_config": {"hidden_size": 64}}, "num_attention_heads"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ],
    ids=str,
)
def test_a_damaged_configuration_is_refused(
    changes: dict[str, Any], reason: str, converted: Converted, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((converted[0] / "config.json").read_bytes())
    edit(tmp_path / "config.json", **changes)
    with pytest.raises((SourceError, FamilyError), match=reason):
        open_source(str(tmp_path))


WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": SIZES | MIXED_FAMILIES["gemma3_text"],
        "vision_config": {"image_size": 28, "patch_size": 14, **TOWER},
    },
    "gemma4": {
        "text_config": SIZES | MIXED_FAMILIES["gemma4_text"],
        "vision_config": {"head_dim": 16, "num_key_value_heads": 2, **TOWER},
        "audio_config": None,
    },
    "mistral3": {
        "text_config": {"model_type": "ministral3", **SIZES, **MORE_FAMILIES["ministral3"]},
        "vision_config": {"model_type": "pixtral", "head_dim": 16, **TOWER},
    },
}


@pytest.mark.parametrize("family", WRAPPERS)
def test_another_s_language_model_is_saved_as_documented(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, tie_word_embeddings=False, **WRAPPERS[family])
    whole = AutoModelForImageTextToText.from_config(config)
    whole.save_pretrained(tmp_path / "whole")
    make_tokenizer(tmp_path / "whole")
    page = (Path(__file__).parents[2] / "docs" / "checkpoint.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import torch.*?)```", page, flags=re.DOTALL)
    text = tmp_path / "text-only"
    for name, folder in (("google/gemma-3-4b-it", tmp_path / "whole"), ("text-only", text)):
        assert name in code
        code = code.replace(name, str(folder))
    exec(code, {})  # noqa: S102 - our own page's
    ids = torch.arange(40)[None]
    alone = AutoModelForCausalLM.from_pretrained(text).eval()
    assert torch.equal(alone(ids).logits, whole.eval()(input_ids=ids).logits)
    options = ("--layers", KEPT, "--window", WINDOW, "--no-verify", "-q")
    assert run_cli("convert", text, tmp_path / "out", *options) == 0
