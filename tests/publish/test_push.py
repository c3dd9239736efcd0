"""Pushing to a Hub on loopback, with the real client."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.common.errors import HubError, UsageError
from converter.common.hub import RetryPolicy, reason_of
from converter.publish.push import Destination, Pushed, check_destination, prepare, push
from tests.cli.test_convert import files_of
from tests.conftest import run_cli
from tests.loopback_hub import TOKEN, Blob, Fault, LoopbackHub, Repository

# The Hub's client sends large files in a way that its HTTP library has come to dislike.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME, BASE = "me/hyb", "owner/original"
SOON = RetryPolicy(attempts=3, first_wait_seconds=0.01)
OPTIONS = ("--base-model", BASE, "--license", "mit", "--no-verify")


@pytest.fixture
def out(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint in several shards."""
    return Path(shutil.copytree(checkpoint("qwen2", "plain"), tmp_path / "out"))


def send(folder: Path, **where: Any) -> Pushed:
    upload = prepare(folder, NAME, base_model=BASE, licence="mit")
    return push(upload, Destination(NAME, **where), lambda _: None, SOON)


def shards_of(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    assert len(found) > 2
    return found


def use_xet(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client use xet; the hub learns which xet hash belongs to which SHA-256."""
    hf_xet = pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    for shard in shards_of(folder):
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        hub.xet_hashes[digest] = hf_xet.hash_files([str(shard)])[0].hash


@pytest.mark.parametrize("way", ["lfs in one part", "lfs in several parts", "xet"])
def test_what_is_pushed_loads_as_what_was_converted(
    way: str, hub: LoopbackHub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    hub.multipart = way == "lfs in several parts"
    if way == "xet":
        use_xet(hub, out, monkeypatch)
    assert run_cli("push", out, NAME, *OPTIONS, "-q") == 0
    assert set(hub.tree(NAME)) == files_of(out).keys() | {".gitattributes"}
    assert (hub.asked("PUT", "^/objects/") > 0) is (way != "xet")
    assert (hub.asked("GET", "xet-write-token") > 0) is (way == "xet")
    if way == "lfs in several parts":
        assert hub.asked("PUT", "^/objects/.*/2$") == len(shards_of(out))

    there = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.float64)
    assert (hub.asked("GET", "xet-read-token") > 0) is (way == "xet")
    here = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    ids = torch.arange(200)[None] % 256
    with torch.inference_mode():
        assert torch.equal(there(ids).logits, here(ids).logits)


@pytest.mark.usefixtures("hub")
def test_what_is_downloaded_verifies(out: Path, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    send(out)
    got = Path(snapshot_download(NAME, local_dir=tmp_path / "got"))
    assert run_cli("verify", got, "-q") == 0
    card = (got / "README.md").read_text()
    assert f'from_pretrained("{NAME}")' in card and '"PATH"' not in card
    assert f"vllm serve {NAME}\n" in card
    assert f"base_model: {BASE}\n" in card and "license: mit\n" in card


def test_a_second_push_sends_nothing_and_neither_changes_the_folder(
    hub: LoopbackHub, out: Path
) -> None:
    before = files_of(out)
    first = send(out)
    hub.requests.clear()
    second = send(out)
    assert files_of(out) == before
    assert (second.sent, second.deleted, second.sent_bytes) == ((), (), 0)
    assert second.commit == first.commit
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}


def test_another_plan_sends_no_weights(hub: LoopbackHub, out: Path) -> None:
    send(out)
    hub.requests.clear()
    assert run_cli("retarget", out, "--layers", "0,3", "-q") == 0
    pushed = send(out)
    plan = {"hybrid/plan.json", "hybrid/manifest.json"}
    assert set(pushed.sent) == {"README.md", "config.json", *plan}
    assert hub.asked("PUT", "^/objects/") == 0
    assert hub.content(NAME, "config.json") == (out / "config.json").read_bytes()


def test_files_of_an_earlier_push_go_and_others_stay(
    hub: LoopbackHub, checkpoint: Callable[..., Path], out: Path
) -> None:
    send(checkpoint("qwen2", "sinks"))
    assert "configuration_hybrid.py" in hub.tree(NAME)
    repository = hub.repositories[NAME]
    repository.add("main", {**hub.tree(NAME), "notes.txt": Blob(b"mine")})
    pushed = send(out)
    more = ("configuration_hybrid.py", "modeling_masks.py", "vllm_hybrid.py")
    assert pushed.deleted == more
    assert set(hub.tree(NAME)) == files_of(out).keys() | {".gitattributes", "notes.txt"}


@pytest.mark.parametrize("manifest", [b"{", b"[]", b'{"files": 3}', b"\xff", b"{}"])
def test_a_manifest_that_is_not_ours_deletes_nothing(
    manifest: bytes, hub: LoopbackHub, out: Path
) -> None:
    hub.create(NAME, {"hybrid/manifest.json": manifest, "theirs.py": b"x = 1\n"})
    assert send(out).deleted == ()
    assert "theirs.py" in hub.tree(NAME)


@pytest.fixture
def theirs(hub: LoopbackHub) -> str:
    """The commit of a public repository that is there already."""
    return hub.create(NAME, {"README.md": b"# theirs\n"})


@pytest.mark.usefixtures("theirs")
def test_a_branch_is_made_and_main_left_alone(hub: LoopbackHub, out: Path) -> None:
    pushed = send(out, revision="hybrid-1of4")
    assert pushed.revision == "hybrid-1of4"
    assert set(hub.tree(NAME)) == {"README.md"}
    assert files_of(out).keys() <= set(hub.tree(NAME, "hybrid-1of4"))
    assert send(out, revision="hybrid-1of4").sent == ()


@pytest.mark.usefixtures("theirs")
def test_a_pull_request_proposes_once(hub: LoopbackHub, out: Path) -> None:
    first, where = send(out, pull_request=True), ("refs/pr/1", f"{hub.url}/{NAME}/discussions/1")
    assert (first.revision, first.pull_request) == where
    assert set(hub.tree(NAME)) == {"README.md"}
    assert files_of(out).keys() <= set(hub.tree(NAME, "refs/pr/1"))
    second = send(out, pull_request=True)
    assert (second.revision, second.pull_request, second.sent) == (*where, ())
    # Another checkpoint is another proposal; an open one can be gone on with.
    assert run_cli("retarget", out, "--layers", "0,3", "-q") == 0
    assert send(out, pull_request=True).revision == "refs/pr/2"
    assert send(out, revision="refs/pr/1").sent_bytes > 0
    assert len(hub.repositories[NAME].pull_requests) == 2


@pytest.mark.parametrize("how", ["main", "pull request"])
def test_an_interrupted_push_goes_on_where_it_was(
    how: str, hub: LoopbackHub, out: Path, theirs: str
) -> None:
    """The third shard never arrives; then the line is mended."""
    third = hashlib.sha256(shards_of(out)[2].read_bytes()).hexdigest()
    hub.faults = [Fault("PUT", f"^/objects/{third}", 403)]
    where = {"pull_request": how == "pull request"}
    with pytest.raises(HubError) as caught:
        send(out, **where)
    said = ("run the same command", "log in with a token")
    assert caught.value.details["next step"].startswith(said)
    assert hub.repositories[NAME].references == {"main": theirs}
    digests = {hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards_of(out)}
    missing = digests - hub.objects.keys()
    assert third in missing
    hub.requests.clear()
    pushed = send(out, **where)
    assert hub.asked("PUT", "^/objects/") == len(missing), "only what had not arrived is sent"
    assert files_of(out).keys() <= set(hub.tree(NAME, pushed.revision))
    assert len(hub.repositories[NAME].pull_requests) == (how == "pull request")


@pytest.mark.parametrize("at", ["xet-write-token", "/commit/"])
def test_an_interrupted_push_through_xet_goes_on(
    at: str, hub: LoopbackHub, out: Path, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local store cannot drop a line in the middle; the requests around it can fail."""
    use_xet(hub, out, monkeypatch)
    hub.faults = [Fault("POST" if "commit" in at else "GET", at, 403) for _ in range(9)]
    with pytest.raises(HubError):
        send(out)
    assert hub.repositories[NAME].references == {"main": theirs}
    hub.faults = []
    pushed = send(out)
    assert hub.asked("PUT", "^/objects/") == 0
    assert files_of(out).keys() <= set(hub.tree(NAME, pushed.revision))


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize("how", ["main", "pull request"])
def test_a_commit_whose_answer_got_lost_is_not_made_twice(
    how: str, hub: LoopbackHub, out: Path
) -> None:
    hub.faults = [Fault("POST", "/commit/", 1)]
    pushed = send(out, pull_request=how == "pull request")
    assert pushed.sent == ()
    assert len(hub.repositories[NAME].messages) == 1
    assert len(hub.repositories[NAME].pull_requests) == (how == "pull request")
    assert files_of(out).keys() <= set(hub.tree(NAME, pushed.revision))


@pytest.mark.usefixtures("theirs")
def test_a_branch_that_moves_meanwhile_is_compared_again(hub: LoopbackHub, out: Path) -> None:
    hub.faults = [Fault("POST", "/commit/", 412)]
    assert "README.md" in send(out).sent


@pytest.mark.usefixtures("hub")
def test_a_hub_that_lost_a_file_is_found_out(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit succeeds, and a file in it is another one."""
    add = Repository.add

    def forgetful(self: Repository, reference: str, tree: dict[str, Blob]) -> str:
        changed = {name: Blob(b"x") if name == "config.json" else b for name, b in tree.items()}
        return add(self, reference, changed)

    monkeypatch.setattr(Repository, "add", forgetful)
    with pytest.raises(HubError, match="does not hold what was sent") as caught:
        send(out)
    assert caught.value.details["got"] == "config.json"


def test_a_private_push_is_private(hub: LoopbackHub, out: Path) -> None:
    send(out, private=True)
    assert hub.repositories[NAME].private
    assert send(out, private=True).sent == ()


@pytest.mark.usefixtures("theirs")
def test_a_private_push_into_a_public_repository_is_refused(hub: LoopbackHub, out: Path) -> None:
    with pytest.raises(HubError, match="everybody can see it"):
        send(out, private=True)
    assert hub.repositories[NAME].messages == []


def link_a_shard(folder: Path) -> None:
    shard = shards_of(folder)[0]
    shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to(folder.parent / "elsewhere.safetensors")


def link_the_folder(folder: Path) -> None:
    (folder / "hybrid").rename(folder / "other")
    (folder / "hybrid").symlink_to("other")


def lose_the_card(folder: Path) -> None:
    (folder / "README.md").unlink()
    manifest = json.loads((folder / "hybrid" / "manifest.json").read_text())
    del manifest["files"]["README.md"]
    (folder / "hybrid" / "manifest.json").write_text(json.dumps(manifest))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "one file more": (lambda folder: (folder / "notes.txt").write_text("mine"), "does not know"),
    "one file less": (lambda folder: (folder / "tokenizer.json").unlink(), "missing"),
    "a linked shard": (link_a_shard, "symbolic link"),
    "a linked folder": (link_the_folder, "does not know"),
    "no card": (lose_the_card, "missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_not_what_we_wrote_is_refused(
    name: str, hub: LoopbackHub, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = REFUSED[name]
    change(out)
    assert run_cli("push", out, NAME, *OPTIONS) == 2
    assert said in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--license mit", "which model on the Hub"),
        (f"--base-model {BASE}", "no licence"),
        ("--base-model not/an/id --license mit", "no Hub id"),
        (f"--base-model {BASE} --license a/b", "no licence identifier"),
        (f"--base-model {BASE} --license mit --offline", "needs the network"),
        (f"--base-model {BASE} --license mit --pull-request --branch x", "made against main"),
    ],
)
def test_a_push_that_says_too_little_is_refused(
    options: str, said: str, hub: LoopbackHub, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("push", out, NAME, "--no-verify", *options.split()) == 2
    assert said in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize("name", ["hyb", "a/b/c", "../x", "me/", "me/a--b", "é/b"])
def test_a_name_that_the_hub_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no name for a repository"):
        check_destination(Destination(name))


def test_a_checkpoint_that_does_not_verify_is_not_pushed(
    hub: LoopbackHub, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"sliding_window": 25}))
    assert run_cli("push", out, NAME, *OPTIONS[:-1]) == 1
    said = capsys.readouterr()
    assert "FAILED, nothing was sent" in said.err
    assert hub.requests == []
    # Overridden, it is sent as it is.
    assert run_cli("push", out, NAME, *OPTIONS, "--json", "-q") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["repository"] == NAME and "config.json" in told["sent"]


def test_a_card_edited_by_hand_is_sent_as_it_is(hub: LoopbackHub, out: Path) -> None:
    text = "---\nbase_model: a/b\nlicense: mit\n---\nMy own words about PATH.\n"
    (out / "README.md").write_text(text)
    push(prepare(out, NAME), Destination(NAME), lambda _: None, SOON)
    assert hub.content(NAME, "README.md").decode() == text


@pytest.mark.usefixtures("hub")
def test_without_a_token_the_next_step_is_to_log_in(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="the Hub refuses") as caught:
        send(out)
    assert "hf auth login" in caught.value.details["next step"]


@pytest.mark.parametrize(("method", "path"), [("POST", "create"), ("PUT", "^/objects/")])
def test_no_message_holds_a_token(
    method: str, path: str, hub: LoopbackHub, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = [Fault(method, path, 403) for _ in range(20)]
    assert run_cli("push", out, NAME, *OPTIONS, "-v") == 2
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err
    assert "Bearer" not in said.out + said.err


@pytest.mark.parametrize(
    "text",
    [
        "403 for url https://x/y?X-Amz-Signature=abc&X-Amz-Credential=def",
        "sent Authorization: Bearer abc.def-ghi",
        f"bad token {TOKEN}",
    ],
)
def test_secrets_are_struck_out(text: str) -> None:
    told = reason_of(RuntimeError(text))
    assert "***" in told
    assert not any(secret in told for secret in ("abc", "def", TOKEN))
