"""What holds for every command: help, what it imports, interrupts, streams and odd names."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from converter.cli import hybridize
from tests.conftest import run_cli


def every_command() -> list[tuple[str, ...]]:
    """The words of every command, the groups among them."""
    found: list[tuple[str, ...]] = [()]
    for name, command in sorted(hybridize.commands.items()):
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, inner) for inner in sorted(command.commands)]
    return found


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_help_documents_every_option(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*words, "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: {' '.join(('hybridize', *words))}")
    command: click.Command = hybridize
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[-1] in text
            assert parameter.help, parameter.opts
        else:
            assert str(parameter.metavar or parameter.name).upper() in text


def test_no_command_gets_the_list_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli() == 2
    out, err = capsys.readouterr()
    assert out == "" and all(f"\n  {words[0]} " in err for words in every_command() if words)


def test_help_and_inspect_import_neither_torch_nor_transformers(sources: dict[str, Path]) -> None:
    program = (
        "import sys\n"
        "from converter.cli import run\n"
        f"assert not any(run([*words, '--help']) for words in {every_command()!r})\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'rich', 'filelock'}\n"
        "heavy |= {'converter.model.source', 'converter.calibration.evaluator'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
        f"assert run(['inspect', {str(sources['qwen3'])!r}, '--json']) == 0\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]\n[]\n"


def test_ctrl_c_exits_with_130_and_keeps_what_was_measured(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    rows = [json.dumps({"prompt": f"{i} " + "word " * 80, "answer": "x"}) for i in range(3000)]
    data, out, work = (tmp_path / name for name in ("rows.jsonl", "scores.json", "work"))
    data.write_text("\n".join(rows))
    command = [sys.executable, "-m", "converter", "calibrate", str(sources["qwen3"])]
    options = ["--data", str(data), "--samples", "3000", "--work", str(work), "--out", str(out)]
    # A race might be over before it can be interrupted.
    options += ["--exact", "--method", "nll-restore"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = work / "scores.jsonl"
    for _ in range(1200):
        if process.poll() is not None or (log.exists() and log.read_bytes().count(b"\n") > 2):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    result, talk = process.communicate(timeout=60)
    assert process.returncode == 130
    assert result == ""
    assert "Traceback" not in talk
    assert talk.rstrip().endswith("interrupted: run the same command again to resume")
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert all(json.loads(line) for line in log.read_text().splitlines())


def test_results_reach_a_terminal_that_cannot_show_them(sources: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "converter", "plan", str(sources["qwen3"]), "--layers", "1"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "full attention" in done.stdout


def test_a_reader_that_goes_away_is_no_error(sources: dict[str, Path]) -> None:
    read, write = os.pipe()
    os.close(read)
    # Without the buffer, the first line already meets the closed pipe.
    done = subprocess.run(
        [sys.executable, "-m", "converter", "inspect", str(sources["qwen3"]), "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_whose_name_is_not_unicode_converts(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(sources["qwen3"], source)
    out = tmp_path / "out"
    assert run_cli("convert", source, out, "--layers", "1", "--json") == 0
    assert json.loads((out / "config.json").read_text())["hybrid"]["source"].startswith("caf")


def test_every_setting_has_its_section_of_help() -> None:
    from converter.cli.options import SECTIONS
    from converter.settings import SETTINGS

    named = [name for names in SECTIONS.values() for name in names]
    assert sorted(named) == sorted(set(SETTINGS) - {"source"})


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_help_fits_eighty_columns_and_cuts_nothing(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_cli(*words, "--help") == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "..." not in text.partition("Commands:")[2]


def test_commands_are_listed_in_the_order_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--help") == 0
    listed = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed][:4] == ["inspect", "calibrate", "plan", "convert"]


def test_options_stand_below_what_they_are_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("convert", "--help") == 0
    sections: dict[str, str] = {}
    for block in capsys.readouterr().out.split("\n\n"):
        title, _, options = block.partition("\n")
        sections[title] = options
    titles = [title for title in sections if title.endswith(":")]
    assert titles == ["Source:", "What to keep:", "Choosing:", "Data:", "Machine:", "Output:"]
    assert sections["What to keep:"].split()[0] == "--budget"
    for title, option in (("Choosing", "--method"), ("Data", "--samples"), ("Machine", "--dtype")):
        assert option in sections[f"{title}:"]


@pytest.mark.parametrize(
    ("command", "option", "others"),
    [
        ("export", "kind", {"--type", "--outtype"}),
        ("evaluate", "batch_size", {"--batch", "--batch-size"}),
        ("run", "prompt", {"-p", "--prompt"}),
        ("run", "max_new_tokens", {"-n", "--max-new", "--max-new-tokens"}),
        ("run", "temperature", {"--temp", "--temperature"}),
    ],
)
def test_options_have_the_names_they_have_elsewhere(
    command: str, option: str, others: set[str]
) -> None:
    (found,) = [one for one in hybridize.commands[command].params if one.name == option]
    assert others <= set(found.opts)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("hybridize conv", "plain,convert"),
        ("hybridize export OUT FILE --outtype q8", "plain,q8_0"),
        ("hybridize plan MODEL --targ", "plain,--target"),
        ("hybridize inspect demo", "file,demo"),
    ],
)
def test_a_shell_completes(words: str, completed: str) -> None:
    asked = {"_HYBRIDIZE_COMPLETE": "bash_complete", "COMP_WORDS": words}
    done = subprocess.run(
        [sys.executable, "-m", "converter"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | asked | {"COMP_CWORD": str(len(words.split()) - 1)},
    )
    assert done.stdout.split() == [completed]


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 4294967296 bytes. Error code 12",
            ["got: 4.0 GiB more were asked for at once"],
        ),
        (
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23 GiB",
            ["where: the GPU", "got: 20.00 MiB more were asked for at once"],
        ),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", ["where: the GPU"]),
        (None, []),
    ],
    ids=["cpu", "cuda", "cublas", "python"],
)
def test_a_full_memory_is_one_message_with_what_would_take_less(
    raised: str | None,
    says: list[str],
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever torch or Python notices: here while the model is loaded."""

    def full(*_: object, **__: object) -> None:
        raise MemoryError if raised is None else RuntimeError(raised)

    monkeypatch.setattr("converter.calibration.run.load_runner", full)
    out = tmp_path / "scores.json"
    assert run_cli("calibrate", sources["qwen3"], "--out", out, "--length", 400) == 2
    told = capsys.readouterr().err
    for words in ("error: there is too little memory", *says, "--memory, so that", "--length"):
        assert words in told
    assert "Traceback" not in told and not out.exists()
