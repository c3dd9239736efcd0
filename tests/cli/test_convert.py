"""`hybridize convert` from end to end, and the same by separate commands."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FAMILIES, LAYERS, make_model, run_cli

WINDOW = 16
# The test models read one byte a token, and recall's facts need some 500 of them.
MEASURE = ("--samples", 3, "--holdout", 2, "--window", WINDOW, "--length", 800, "--budget", "1/2")
NATIVE = {"qwen3": "qwen3", "qwen2": "qwen2", "llama": "mistral", "mistral": "mistral"}
# What only a measured checkpoint holds.
PARTS = ("scores", "quality", "curve", "layers")
RESULTS = {f"hybrid/{name}.json" for name in PARTS[:3]} | {f"hybrid/{n}.png" for n in PARTS[1:]}
Measured = dict[str, tuple[Path, dict[str, Any]]]


def run_json(*arguments: object) -> dict[str, Any]:
    """Run a command with --json; the object it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_cli(*arguments, "--json") == 0
    value: dict[str, Any] = json.loads(out.getvalue())
    return value


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models of the fixture `sources` with room for recall's examples."""
    root, room = tmp_path_factory.mktemp("roomy"), {"max_position_embeddings": 1024}
    return {
        name: make_model(root / name, name, shards=name == "qwen2", **room) for name in FAMILIES
    }


@pytest.fixture(scope="module")
def measured(roomy: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Of each family: the folder that a whole conversion wrote, and what it printed."""
    root, made = tmp_path_factory.mktemp("measured"), {}
    for family in FAMILIES:
        # Measured conversions are verified unless told not to be; once is enough here.
        options = MEASURE if family == "qwen2" else (*MEASURE, "--no-verify")
        made[family] = root / family, run_json("convert", roomy[family], root / family, *options)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_holds_what_the_contract_says(
    family: str, measured: Measured, roomy: dict[str, Path]
) -> None:
    folder, source = measured[family][0], roomy[family]
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert (len(shards) > 1) == (family == "qwen2")
    index = ["model.safetensors.index.json"] if len(shards) > 1 else []
    assert files_of(folder).keys() == {
        *shards,
        *index,
        "config.json",
        "generation_config.json",
        "attention_hybrid.py",
        "modeling_hybrid.py",
        *(["mlx_hybrid.py"] if family.startswith("qwen") else []),
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "hybrid/manifest.json",
        "hybrid/plan.json",
        "hybrid/source_config.json",
        *RESULTS,
    }
    for shard in shards:
        assert (folder / shard).samefile(source / shard)
    for name in (*index, "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
        assert not (folder / name).samefile(source / name), "a tool that saves here must not write"
    assert read(folder / "hybrid" / "source_config.json") == read(source / "config.json")
    assert not list(folder.parent.glob(".*")), "no temporary folder is left"
    assert not list(folder.parent.glob("*.work")), "nor what a resumption would need"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_is_the_sources_with_the_plan_in_it(
    family: str, measured: Measured, roomy: dict[str, Path]
) -> None:
    folder, printed = measured[family]
    config, source = read(folder / "config.json"), read(roomy[family] / "config.json")
    plan = read(folder / "hybrid" / "plan.json")
    assert config["model_type"] == NATIVE[family]
    assert config["layer_types"] == plan["layer_types"] == printed["plan"]["layer_types"]
    assert config["layer_types"].count("full_attention") == LAYERS // 2
    assert config["sliding_window"] == WINDOW
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_hybrid.HybridForCausalLM"}
    plain = {"window_tokens": WINDOW, "sink_tokens": 0, "full_attention_decode": False}
    assert config["hybrid"]["mask"] == plain
    # The default compares methods; whichever won is the one that chose.
    scores = read(folder / "hybrid" / "scores.json")
    entries = {entry["name"]: entry for entry in scores["contest"]["entries"]}
    assert entries.keys() > {"nll-restore", "guided", "periodic, offset 0"}
    assert config["hybrid"]["method"] == scores["contest"]["winner"]
    winner = entries[config["hybrid"]["method"]]
    assert winner["value"] == min(entry["value"] for entry in entries.values())
    assert sorted(winner["full_attention_layers"]) == plan["full_attention_layers"]
    said = {"budget": "1/2", "source": family, "ranking": plan["ranking"]}
    assert config["hybrid"].items() >= said.items()
    assert int(config["transformers_version"].split(".")[0]) >= 5
    if NATIVE[family] == "mistral":
        # Facts 1 and 2: the mistral form, with what Ministral and mlx-lm read.
        assert config["architectures"] == ["MistralForCausalLM"]
        assert config["head_dim"] == source.get("head_dim", 16)
        rope = source["rope_parameters"]
        assert config["rope_theta"] == rope["rope_theta"]
        if family == "llama":
            assert config["rope_scaling"] == {k: v for k, v in rope.items() if k != "rope_theta"}
        assert "rope_parameters" not in config
    else:
        # vLLM must run transformers' code; its own must refuse rather than run full attention.
        assert config["architectures"] == ["TransformersForCausalLM"]
        assert config["use_sliding_window"] is True and config["max_window_layers"] == 0
        assert config["rope_parameters"] == source["rope_parameters"]
    kept = ("hidden_size", "vocab_size", "max_position_embeddings", "dtype", "eos_token_id")
    assert [config[key] for key in kept] == [source[key] for key in kept]
    assert config.get("tie_word_embeddings", False) == FAMILIES[family]["tie_word_embeddings"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_manifest_is_true(family: str, measured: Measured) -> None:
    folder = measured[family][0]
    manifest, files = read(folder / "hybrid" / "manifest.json"), files_of(folder)
    del files["hybrid/manifest.json"]
    assert manifest["files"].keys() == files.keys()
    for name, content in files.items():
        record = manifest["files"][name]
        assert record["bytes"] == len(content)
        if not name.endswith(".safetensors"):
            assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["source"]["name"] == family
    assert {"torch", "transformers", "safetensors"} <= manifest["versions"].keys()
    scores = read(folder / "hybrid" / "scores.json")
    assert manifest["settings"] == scores["fingerprint"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_printed_is_what_is_written(family: str, measured: Measured) -> None:
    folder, printed = measured[family]
    assert printed.keys() >= {"checkpoint", "plan", "quality", "verification", "weights"}
    assert printed["plan"] == read(folder / "hybrid" / "plan.json")
    assert printed["quality"] == read(folder / "hybrid" / "quality.json")
    if family == "qwen2":
        assert printed["verification"]["ok"] is True
    assert set(printed["weights"].values()) == {"hard link"}
    outcomes = {outcome["name"]: outcome for outcome in printed["quality"]["outcomes"]}
    assert outcomes.keys() >= {"original", "hybrid", "all sliding", "periodic, offset 0"}
    assert outcomes["original"]["nll_above_original"]["mean"] == 0
    assert outcomes["hybrid"]["full_attention_layers"] == printed["plan"]["full_attention_layers"]


def test_separate_commands_give_what_one_gives(
    measured: Measured, roomy: dict[str, Path], tmp_path: Path
) -> None:
    source, whole = roomy["qwen3"], measured["qwen3"][0]
    scores, plan, out = tmp_path / "scores.json", tmp_path / "plan.json", tmp_path / "out"
    data = [option for option in MEASURE if option not in ("--holdout", 2)]
    calibrated = run_json("calibrate", source, "--out", scores, *data)
    keys = ("method", "mask", "layers", "examples", "seconds", "layer_forwards", "fingerprint")
    assert calibrated.keys() >= {*keys}
    for index, layer in enumerate(calibrated["layers"]):
        assert layer.keys() == {"index", "score", "stderr", "examples"}
        assert layer["index"] == index < LAYERS == len(calibrated["layers"])
    assert calibrated["examples"] == 3
    # Less than a pass over every layer for each plan there is: searches look where losses lead.
    # The first round of the comparison has 16 examples.
    assert 0 < calibrated["layer_forwards"] < (3 + 16) * 2**LAYERS * LAYERS
    assert calibrated["seconds"] > 0
    assert scores.read_bytes() == (whole / "hybrid" / "scores.json").read_bytes()
    assert not list(tmp_path.glob("*.work"))

    planned = run_json("plan", source, "--scores", scores, "--budget", "1/2", "--out", plan)
    keys = ("layer_types", "full_attention_layers", "mask", "method", "budget", "kv_bytes")
    assert planned.keys() >= {*keys}
    assert planned["kv_bytes"].keys() == {"full", "hybrid", "context_tokens"}
    assert planned == read(plan) == measured["qwen3"][1]["plan"]

    converted = run_json("convert", source, out, "--plan", plan)
    assert converted["verification"] is None and converted["quality"] is None
    ours, theirs = files_of(out), files_of(whole)
    assert theirs.keys() - ours.keys() == RESULTS
    for name in ours.keys() - {"README.md", "hybrid/manifest.json"}:
        assert ours[name] == theirs[name], name


def test_scores_and_layers_give_the_same_model(
    measured: Measured, roomy: dict[str, Path], tmp_path: Path
) -> None:
    source, whole = roomy["llama"], measured["llama"][0]
    scores = whole / "hybrid" / "scores.json"
    run_json("convert", source, tmp_path / "scored", "--scores", scores, "--budget", "1/2")
    kept = ",".join(map(str, read(whole / "hybrid" / "plan.json")["full_attention_layers"]))
    run_json("convert", source, tmp_path / "named", "--layers", kept, "--window", WINDOW)
    expected = read(whole / "config.json")
    assert read(tmp_path / "scored" / "config.json") == expected
    expected["hybrid"] |= {"method": "hand", "budget": None, "ranking": None}
    assert read(tmp_path / "named" / "config.json") == expected
    for name in ("scored", "named"):
        for file in ("modeling_hybrid.py", "tokenizer.json", "generation_config.json"):
            assert (tmp_path / name / file).read_bytes() == (whole / file).read_bytes()


def test_retargeting_changes_the_plan_and_nothing_else(
    roomy: dict[str, Path], measured: Measured, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    scores = measured["mistral"][0] / "hybrid" / "scores.json"
    run_json("convert", roomy["mistral"], out, "--scores", scores, "--budget", 1)
    before, inode = files_of(out), (out / "model.safetensors").stat().st_ino
    ranking = read(out / "hybrid" / "plan.json")["ranking"]

    printed = run_json("retarget", out, "--budget", 3)
    assert printed["plan"]["full_attention_layers"] == sorted(ranking[:3])
    after = files_of(out)
    assert (out / "model.safetensors").stat().st_ino == inode
    assert before.keys() == after.keys()
    ours = {f"hybrid/{name}" for name in ("plan.json", "layers.png", "manifest.json")}
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"config.json", "README.md", *ours}
    assert not list(tmp_path.glob(".*"))
    assert run_cli("verify", out, "--against", roomy["mistral"], "-q") == 0

    run_json("retarget", out, "--layers", "none")
    assert read(out / "config.json")["layer_types"] == ["sliding_attention"] * LAYERS
    run_json("retarget", out, "--budget", 1)
    assert files_of(out) == before


def test_a_card_that_was_edited_is_proved_and_keeps_what_its_author_wrote(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_json("convert", sources["qwen3"], out, "--layers", 0, "--window", WINDOW)
    card = out / "README.md"
    mine = "---\nlicence: mine\n---\n# Mine\n"
    card.write_text(card.read_text().replace("---\n", mine, 1) + "\nWritten by me.\n")
    assert run_cli("verify", out, "-q") == 0

    run_json("retarget", out, "--layers", "1,3")
    told = card.read_text()
    assert told.startswith(mine) and told.endswith("\nWritten by me.\n")
    assert "| full-attention layers | 1, 3 |" in told and "layers | 0 |" not in told

    card.write_text("# All mine\n")
    run_json("retarget", out, "--layers", "2")
    assert card.read_text() == "# All mine\n"


def test_retargeting_by_budget_needs_scores(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run_json("convert", sources["qwen2"], out, "--layers", 0, "--window", WINDOW, "--sinks", 2)
    before = files_of(out)
    assert run_cli("retarget", out, "--budget", "1/2") == 2
    assert "carries no scores to choose layers by" in capsys.readouterr().err
    assert files_of(out) == before
    mask = run_json("retarget", out, "--layers", "1,3")["plan"]["mask"]
    assert (mask["sink_tokens"], mask["window_tokens"]) == (2, WINDOW)


def test_what_a_source_carries_is_taken_or_left(
    copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = copy_of("qwen3"), tmp_path / "out"
    taken = {
        "LICENSE": "free",
        "NOTICE.txt": "note",
        "chat_template.jinja": "{{ messages }}",
        "special_tokens_map.json": "{}",
        "merges.txt": "a b\n",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
    }
    left = {
        "README.md": "the source's own card",
        "pytorch_model.bin": "pickle",
        "original/params.json": "{}",
        "consolidated.safetensors": "other",
        "model.gguf": "other",
        "modeling_custom.py": "raise SystemExit",
        "training_args.json": "{}",
    }
    for name, text in (taken | left).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    generation = read(source / "generation_config.json") | {"cache_implementation": "static"}
    (source / "generation_config.json").write_text(json.dumps(generation))
    config = read(source / "config.json") | {"auto_map": {"AutoModel": "modeling_custom.X"}}
    (source / "config.json").write_text(json.dumps(config))
    run_json("convert", source, out, "--layers", "1", "--window", WINDOW)
    found = files_of(out)
    for name, text in taken.items():
        assert found[name] == text.encode()
    assert not (left.keys() - {"README.md"}) & found.keys()
    assert b"the source's own card" not in found["README.md"]
    del generation["cache_implementation"]
    assert read(out / "generation_config.json") == generation
    assert read(out / "config.json")["auto_map"].keys() == {"AutoModelForCausalLM"}
    assert "modeling_custom" not in (out / "config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", ["plain", "sinks"])
def test_the_tokenizer_reads_as_the_sources_does(
    family: str, mask: str, sources: dict[str, Path], checkpoint: Callable[..., Path]
) -> None:
    """The tokenizer class depends on the config's model_type, which a checkpoint may change."""
    from transformers import AutoTokenizer

    text = "Once upon a time, 12 dogs\n\n  sang: naïve 日本語 <|end|>"
    expected = AutoTokenizer.from_pretrained(sources[family])
    found = AutoTokenizer.from_pretrained(checkpoint(family, mask), trust_remote_code=True)
    assert found.encode(text) == expected.encode(text)
    assert found.decode(found.encode(text)) == text
    assert found.eos_token_id == expected.eos_token_id
