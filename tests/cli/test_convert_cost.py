"""Converting by a given plan only links and writes: a model of 8 GB costs no memory and no disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import make_tokenizer

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, VOCABULARY = 4096, 11008, 22, 32, 8, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 4096,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


# A process's peak begins with that of the one it was forked from: measure from a small one.
MEASURED = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
measured = {"seconds": time.perf_counter() - started, "peak_bytes": usage.ru_maxrss * 1024}
print(json.dumps(measured))
sys.exit(process.returncode)
"""


def write_sparse_model(folder: Path) -> int:
    """A Llama whose weights are one big hole after a true header; the file's bytes."""
    head = HIDDEN // HEADS
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * head, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * head, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (MLP, HIDDEN),
            "mlp.up_proj": (MLP, HIDDEN),
            "mlp.down_proj": (HIDDEN, MLP),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    make_tokenizer(folder)
    return 8 + len(text) + offset


def disk_bytes(folder: Path) -> int:
    """Bytes of disk that a folder's files occupy, each file once."""
    blocks = {
        (path.stat().st_ino): path.stat().st_blocks for path in folder.rglob("*") if path.is_file()
    }
    return 512 * sum(blocks.values())


def test_a_model_of_8_gb_is_converted_without_reading_its_weights(tmp_path: Path) -> None:
    source, out = tmp_path / "big", tmp_path / "out"
    assert write_sparse_model(source) > 8e9
    before = disk_bytes(tmp_path)
    arguments = [
        "convert",
        str(source),
        str(out),
        "--layers",
        "3,7,11,15,19",
        "--window",
        "512",
        "--json",
        "-q",
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, sys.executable, "-m", "converter", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed, measured = map(json.loads, done.stdout.splitlines())
    seconds, peak_bytes = measured["seconds"], measured["peak_bytes"]
    assert printed["weights"] == {"model.safetensors": "hard link"}
    assert (out / "model.safetensors").samefile(source / "model.safetensors")
    written = disk_bytes(tmp_path) - before
    line = f"{seconds:.2f} s, peak {peak_bytes >> 20} MiB, {written >> 10} KiB written"
    print(line)  # noqa: T201 - for `pytest -s`; seconds are no ground to fail on
    assert peak_bytes < 400e6
    assert written < 1 << 20
    kinds = json.loads((out / "config.json").read_text())["layer_types"]
    assert kinds.count("full_attention") == 5


def test_help_and_inspect_do_not_import_torch(tmp_path: Path) -> None:
    source = tmp_path / "big"
    write_sparse_model(source)
    code = (
        "import sys\n"
        "from converter.cli import run\n"
        "assert run(sys.argv[1:]) == 0\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)\n"
    )
    for arguments in (["convert", "--help"], ["inspect", str(source), "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
