"""Outputs that stand in the way, or cannot be written: what stands there stays as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.bad_input.conftest import Refused, tree
from tests.conftest import run_cli

CopyOf = Callable[[str], Path]
MakeDisk = Callable[[str], Path]

PLAN, CONVERT = "plan $SOURCE --layers 1 --out", "convert $SOURCE"
CALIBRATE = "calibrate $SOURCE --out"
OURS_ONLY = "--force replaces checkpoints of ours only"


@pytest.mark.usefixtures("hybrid")
# A measured conversion is refused before it measures.
@pytest.mark.parametrize("options", ["--layers 2", ""])
def test_an_existing_checkpoint_is_not_replaced_without_force(
    options: str, refused: Refused
) -> None:
    refused(f"{CONVERT} $HERE/out {options}", "exists already", "$HERE/out", "--force")


def test_an_existing_file_is_not_replaced_without_force(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("precious")
    for command in (f"{PLAN} $HERE/kept", f"{CALIBRATE} $HERE/kept", f"{CONVERT} $HERE/kept"):
        refused(command, "exists already", "$HERE/kept", "--force")
    assert (tmp_path / "kept").read_text() == "precious"


def test_a_folder_is_no_place_for_a_file_even_with_force(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "folder" / "kept").mkdir(parents=True)
    for command in (PLAN, CALIBRATE):
        refused(f"{command} $HERE/folder --force", "folder", "$HERE/folder")


def test_force_replaces_only_checkpoints_of_ours(
    copy_of: CopyOf, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    for out in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.txt", copy_of("llama")):
        refused(f"{CONVERT} $OUT --layers 1 --force", OURS_ONLY, "$OUT", OUT=out)


@pytest.mark.parametrize(("force", "says"), [("", "exists already"), ("--force", OURS_ONLY)])
def test_a_model_is_not_converted_over_itself(
    force: str, says: str, copy_of: CopyOf, refused: Refused
) -> None:
    model = copy_of("qwen3")
    refused(f"convert $MODEL $MODEL --layers 1 {force}", says, "$MODEL", MODEL=model)


@pytest.mark.parametrize("force", ["", "--force"])
def test_an_output_that_contains_the_source_is_refused(
    force: str, sources: dict[str, Path], refused: Refused, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(sources["qwen3"], tmp_path / "models" / "deep" / "source"))
    says = ("output folder contains the source", "$HERE/models", "$MODEL")
    refused(f"convert $MODEL $HERE/models --layers 1 {force}", *says, MODEL=source)


def test_an_output_inside_the_source_is_refused(copy_of: CopyOf, refused: Refused) -> None:
    says = ("output folder lies inside the source", "$MODEL/out")
    refused("convert $MODEL $MODEL/out --layers 1", *says, MODEL=copy_of("qwen3"))


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_an_output_without_a_name_is_refused(name: str, refused: Refused) -> None:
    for command in (f"{CONVERT} {name} --layers 1 --force", f"{PLAN} {name} --force"):
        refused(command, "needs a name of its own", f"where: {name}")
    refused(f"retarget {name} --layers 1", "needs a name of its own", f"where: {name}")


@pytest.mark.parametrize("file", [False, True], ids=["missing", "file"])
def test_an_output_without_a_parent_folder_is_refused(
    file: bool, refused: Refused, tmp_path: Path
) -> None:
    if file:
        (tmp_path / "parent").touch()
    for command in (f"{CONVERT} $HERE/parent/out --layers 1", f"{PLAN} $HERE/parent/plan.json"):
        refused(command, "does not exist", "$HERE/parent", "create it: mkdir -p $HERE/parent")
    refused(f"{CALIBRATE} $HERE/parent/scores.json", "does not exist", "$HERE/parent")


@pytest.mark.parametrize("force", ["", "--force"])
def test_an_output_that_is_a_dangling_link_is_refused(
    force: str, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    refused(f"{CONVERT} $HERE/out --layers 1 {force}", "$HERE/out")


def test_a_work_folder_that_is_a_file_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("precious")
    command = f"{CALIBRATE} $HERE/scores.json --work $HERE/work -q"
    refused(command, "cannot be written", "$HERE/work")


# --- disks ------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeDisk]:
    """Mount a tiny disk with the given options; unmounted at the end."""
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    mounted: list[Path] = []

    def make(options: str) -> Path:
        if os.geteuid() != 0 or mount is None or unmount is None:
            pytest.skip("only root can mount a tiny disk")
        folder = tmp_path_factory.mktemp("disk")
        command = [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting is not permitted here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run([str(unmount), str(folder)], check=True)


@pytest.fixture
def full_disk(disk: MakeDisk) -> Path:
    """A disk on which nothing more can be written, with a file `kept.json`."""
    full = disk("size=64k")
    (full / "kept.json").write_text("precious")
    with (full / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(b"\0" * 4096)
    return full


def test_weights_that_do_not_fit_on_the_disk_are_refused(disk: MakeDisk, refused: Refused) -> None:
    small = disk("size=1m")
    says = ("too little free space", "expected", "bytes", "free some space")
    refused(f"{CONVERT} $DISK/out --layers 1", *says, DISK=small)
    assert list(small.iterdir()) == []


def test_a_full_disk_is_told_as_such(full_disk: Path, refused: Refused) -> None:
    before = tree(full_disk)
    says = ("cannot be written", "$DISK", "No space left on device", "free some space")
    for out in ("plan.json", "kept.json --force"):
        refused(f"{PLAN} $DISK/{out}", *says, DISK=full_disk)
    refused(f"{CONVERT} $DISK/out --layers 1", "space", "next step", DISK=full_disk)
    assert tree(full_disk) == before
    assert (full_disk / "kept.json").read_text() == "precious"


def test_a_disk_that_is_full_when_measuring_starts_is_told_as_such(
    full_disk: Path, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.json"
    command = ("calibrate", sources["qwen3"], "--out", out, "--work", full_disk / "work", "-q")
    assert run_cli(*command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the output cannot be written")
    assert "No space left on device" in error
    assert not out.exists()


def test_a_place_that_may_not_be_written_to_is_told_as_such(
    disk: MakeDisk, refused: Refused
) -> None:
    locked = disk("ro,size=1m")
    for command in (
        f"{PLAN} $DISK/plan.json",
        f"{CONVERT} $DISK/out --layers 1",
        f"{CALIBRATE} $DISK/scores.json -q",
        f"{CALIBRATE} $HERE/scores.json --work $DISK -q",
    ):
        says = ("cannot be written", "$DISK", "Read-only file system", "you may write to")
        refused(command, *says, DISK=locked)


@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores permissions")
def test_a_folder_without_permission_is_told_as_such(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    says = ("cannot be written", "$HERE/locked", "Permission denied", "you may write to")
    for command in (f"{PLAN} $HERE/locked/plan.json", f"{CONVERT} $HERE/locked/out --layers 1"):
        refused(command, *says)
