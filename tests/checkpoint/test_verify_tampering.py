"""Whatever is changed in a checkpoint, `hybridize verify` says so, and which check saw it.

Files alone are guarded by the manifest. What changes the computation must be caught by running it
as well: those tests make the manifest fit the change again, so that only behaviour is left to tell.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.checkpoint.format import MANIFEST_FILE
from converter.checkpoint.reader import file_record, present_files
from tests.checkpoint.test_verify import RUNS, verdict
from tests.conftest import make_model, run_cli
from tests.hybrids import KEPT, SINKS, WINDOW, convert

FILES, CONFIG = "sizes and hashes", "config.json says the plan"
CODE = "Python files are this version's"
PLAN_UNTRUSTED, PLAN_TRUSTED = (f"plan past the window, {how}" for how in ("untrusted", "trusted"))

Capture = pytest.CaptureFixture[str]
Copied = Callable[[str, str], Path]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def copied(checkpoint: Callable[..., Path], tmp_path: Path) -> Copied:
    return lambda family, mask: Path(shutil.copytree(checkpoint(family, mask), tmp_path / family))


def edit(path: Path, change: Change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=2))


def make_manifest_fit(folder: Path) -> None:
    """Record the sizes and hashes that the files have now."""
    shards = tuple(path.name for path in folder.glob("*.safetensors"))
    records = {name: file_record(folder / name, shards) for name in present_files(folder)}
    edit(folder / MANIFEST_FILE, lambda manifest: manifest.update(files=records))


def swap_layers(config: dict[str, Any]) -> None:
    first, second, *others = config["layer_types"]
    config["layer_types"] = [second, first, *others]


def all_full(config: dict[str, Any]) -> None:
    config["layer_types"] = ["full_attention"] * len(config["layer_types"])


def window(tokens: int) -> Change:
    """The window so many tokens wider."""

    def change(config: dict[str, Any]) -> None:
        config["sliding_window"] += tokens
        config["hybrid"]["mask"]["window_tokens"] += tokens

    return change


def mask(**changes: Any) -> Change:
    return lambda config: config["hybrid"]["mask"].update(changes)


CONFIG_CHANGES = [
    ("qwen3", "plain", swap_layers, {"layer_types"}),
    ("llama", "plain", window(1), {"sliding_window", "hybrid"}),
    ("mistral", "plain", all_full, {"layer_types"}),
    ("qwen2", "sinks", mask(sink_tokens=0), {"hybrid"}),
    ("llama", "sinks", mask(sink_tokens=SINKS - 1), {"hybrid"}),
    ("qwen3", "full decode", mask(full_attention_decode=False), {"hybrid"}),
    ("mistral", "sinks", swap_layers, {"layer_types"}),
]


def test_a_changed_config_is_caught_by_its_hash(copied: Copied, capsys: Capture) -> None:
    folder = copied("qwen3", "plain")
    edit(folder / "config.json", swap_layers)
    _, failed = verdict(capsys, folder)
    assert {FILES, CONFIG, PLAN_TRUSTED, PLAN_UNTRUSTED} <= failed.keys()
    assert failed[FILES]["value"] == "config.json"


@pytest.mark.parametrize(("family", "mask", "change", "keys"), CONFIG_CHANGES)
def test_a_changed_config_under_a_fitting_manifest_is_caught_by_running_it(
    family: str, mask: str, change: Change, keys: set[str], copied: Copied, capsys: Capture
) -> None:
    folder = copied(family, mask)
    edit(folder / "config.json", change)
    make_manifest_fit(folder)
    _, failed = verdict(capsys, folder)
    assert FILES not in failed
    assert CONFIG in failed
    assert set(failed[CONFIG]["value"].split(", ")) == keys
    computed = {PLAN_TRUSTED, PLAN_UNTRUSTED} if mask == "plain" else {PLAN_TRUSTED}
    assert computed <= failed.keys()
    for name in computed:
        assert failed[name]["value"] > 1000 * failed[name]["limit"]


def test_a_window_one_short_is_caught_in_every_run(copied: Copied, capsys: Capture) -> None:
    folder = copied("qwen3", "plain")
    edit(folder / "config.json", window(-1))
    make_manifest_fit(folder)
    _, failed = verdict(capsys, folder)
    # All but what must differ from the source, and what follows from the tokens alone.
    wrong = {run for run in RUNS if not run.startswith(("differs", "cached", "generation"))}
    assert {f"{run}, {how}" for run in wrong for how in ("trusted", "untrusted")} <= failed.keys()
    assert "differs from the source past the window, trusted" not in failed


def test_a_shard_of_another_model_is_caught(
    copied: Copied, sources: dict[str, Path], capsys: Capture
) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied("llama", "plain")
    shard = folder / "model.safetensors"
    tensors = {name: tensor.flip(0) for name, tensor in load_file(shard).items()}
    shard.unlink()
    save_file(tensors, shard, metadata={"format": "pt"})
    _, failed = verdict(capsys, folder)
    assert failed.keys() == {FILES}, "without the source, only the hash can know"
    make_manifest_fit(folder)
    _, failed = verdict(capsys, folder, "--against", sources["llama"])
    assert FILES not in failed
    assert {"weights are the source's", PLAN_TRUSTED, PLAN_UNTRUSTED} <= failed.keys()


def exchange(first: Path, second: Path) -> None:
    first.rename(first.with_name("aside"))
    second.rename(first)
    first.with_name("aside").rename(second)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (exchange, "the index and the shards disagree about tensor"),
        (lambda _, second: second.unlink(), "a file of the model is missing"),
    ],
    ids=["exchanged", "missing"],
)
def test_shards_that_do_not_fit_the_index_are_bad_input(
    damage: Callable[[Path, Path], None], said: str, copied: Copied, capsys: Capture
) -> None:
    folder = copied("qwen2", "plain")
    damage(*sorted(folder.glob("*.safetensors"))[:2])
    capsys.readouterr()
    assert run_cli("verify", folder) == 2
    assert said in capsys.readouterr().err


SUBTLE = ("(p > q - window)", "(p > q - window - 1)")


@pytest.mark.parametrize(("family", "mask"), [("qwen3", "sinks"), ("llama", "plain")])
def test_changed_code_is_never_run_without_trust_and_is_caught_when_it_is(
    family: str, mask: str, copied: Copied, tmp_path: Path, capsys: Capture
) -> None:
    folder, ran = copied(family, mask), tmp_path / "ran"
    code = folder / ("modeling_masks.py" if mask == "sinks" else "attention_hybrid.py")
    text = code.read_text()
    assert text.count(SUBTLE[0]) == 1
    code.write_text(text.replace(*SUBTLE) + f"\nopen({str(ran)!r}, 'w').close()\n")

    _, failed = verdict(capsys, folder)
    assert not ran.exists()
    assert {FILES, CODE, "loads with trust"} <= failed.keys()
    assert failed[CODE]["value"] == code.name
    # The native form is proved all the same, by transformers' own code.
    assert not [name for name in failed if name.endswith("untrusted")]

    make_manifest_fit(folder)
    _, failed = verdict(capsys, folder, "--trust-remote-code")
    assert ran.exists()
    assert {CODE, PLAN_TRUSTED} <= failed.keys()
    assert FILES not in failed
    assert failed[PLAN_TRUSTED]["value"] > 1000 * failed[PLAN_TRUSTED]["limit"]


@pytest.mark.parametrize(
    ("file", "failing"),
    [
        ("configuration_hybrid.py", {CODE, "loads with trust"}),
        ("modeling_other.py", {CODE, CONFIG, "loads with trust"}),
        ("inner/modeling_hybrid.py", {CODE, CONFIG, "loads with trust"}),
    ],
)
def test_code_anywhere_is_not_run_without_trust(
    file: str, failing: set[str], copied: Copied, tmp_path: Path, capsys: Capture
) -> None:
    """auto_map may point anywhere: at a file of another name, into a folder, at a repository."""
    folder, ran = copied("qwen3", "sinks"), tmp_path / "ran"
    target = folder / file
    code = (target if target.is_file() else folder / "modeling_hybrid.py").read_text()
    if target.parent != folder:
        target.parent.mkdir()
        code = code.replace("from .configuration", "from ..configuration")
    target.write_text(code + f"\nopen({str(ran)!r}, 'w').close()\n")
    if "modeling" in file:
        named = f"{file.removesuffix('.py').replace('/', '.')}.HybridForCausalLM"
        points = {"AutoModelForCausalLM": named}
        edit(folder / "config.json", lambda config: config["auto_map"].update(points))
    make_manifest_fit(folder)
    status, failed = verdict(capsys, folder)
    assert status == 1
    assert not ran.exists()
    assert failing <= failed.keys()
    assert file in failed[CODE]["value"]


def test_a_custom_form_under_the_native_model_type_fails(copied: Copied, capsys: Capture) -> None:
    """Transformers would load it without a question and drop the sinks."""
    folder = copied("qwen3", "sinks")
    edit(folder / "config.json", lambda config: config.update(model_type="qwen3"))
    make_manifest_fit(folder)
    _, failed = verdict(capsys, folder)
    assert failed[CONFIG]["value"] == "model_type"
    assert failed["refuses to load without trust"]["value"] == "loaded as Qwen3ForCausalLM"


def test_every_file_is_guarded(copied: Copied, capsys: Capture) -> None:
    folder = copied("mistral", "plain")
    (folder / "notes.txt").write_text("mine")
    (folder / "hybrid" / "extra.json").write_text("{}")
    (folder / "README.md").unlink()
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"!":', '"\\u0021":'))
    edit(folder / "generation_config.json", lambda config: config.update(eos_token_id=5))
    _, failed = verdict(capsys, folder)
    assert failed.keys() == {"files present", "no other files", FILES}
    assert failed["files present"]["value"] == "README.md"
    assert failed["no other files"]["value"] == "hybrid/extra.json, notes.txt"
    assert failed[FILES]["value"] == "generation_config.json, tokenizer.json"


def test_a_changed_plan_is_caught_by_what_the_checkpoint_computes(
    copied: Copied, capsys: Capture
) -> None:
    folder = copied("qwen3", "plain")
    assert KEPT == (1, 2)
    edit(folder / "hybrid" / "plan.json", swap_layers)
    edit(folder / "hybrid" / "plan.json", lambda plan: plan.update(full_attention_layers=[0, 2]))
    make_manifest_fit(folder)
    _, failed = verdict(capsys, folder)
    assert {CONFIG, PLAN_TRUSTED, PLAN_UNTRUSTED} <= failed.keys()
    assert FILES not in failed


def test_a_changed_source_config_is_caught(
    copied: Copied, sources: dict[str, Path], capsys: Capture
) -> None:
    folder, path = copied("llama", "plain"), "hybrid/source_config.json"
    edit(folder / path, lambda config: config["rope_parameters"].update(rope_theta=10000.0))
    make_manifest_fit(folder)
    _, failed = verdict(capsys, folder, "--against", sources["llama"])
    assert {"made from the given source's config", CONFIG} <= failed.keys()


def test_a_plan_that_slides_nowhere_it_matters_is_still_held_to_the_plan(
    tmp_path: Path, capsys: Capture
) -> None:
    """Weights that ignore attention: the plan changes nothing, and the report says so."""
    import torch
    from safetensors.torch import load_file, save_file

    source = make_model(tmp_path / "deaf", "qwen3")
    tensors = load_file(source / "model.safetensors")
    for name in (name for name in tensors if name.endswith("o_proj.weight")):
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    folder = convert(source, tmp_path / "out", "sinks")
    _, failed = verdict(capsys, folder)
    assert failed.keys() == {"differs from the source past the window, trusted"}
    assert (WINDOW, SINKS) == (24, 3)
