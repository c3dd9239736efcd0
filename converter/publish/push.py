"""Publishing a checkpoint on the Hub: checked here first, then only what changed, in one commit.

A push is one commit, so that a branch holds the old checkpoint or the new one. What was uploaded
before a push broke is on the Hub already and is not sent again; a commit whose answer got lost is
found by comparing hashes. Both come from doing the same thing again: compare, send, commit.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.checkpoint.format import MANIFEST_FILE
from converter.checkpoint.verify.checks import open_checkpoint
from converter.checkpoint.writer import file_record, present_files, recorded_files
from converter.common.errors import CheckpointError, HubError, UsageError
from converter.common.files import read_json_object, sha256_of, to_text
from converter.common.hub import RetryPolicy, hub_errors, with_patience
from converter.common.units import human_bytes
from converter.publish.metadata import is_hub_id, is_licence_id, read_metadata, with_metadata

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
Say = Callable[[str], None]
# Where a card's commands say PATH, the published one says what to load.
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_MAIN = "main"


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint goes.

    Attributes:
        repository: OWNER/NAME.
        private: only its owner sees it.
        revision: a branch, or the reference of an open pull request (`refs/pr/1`).
        pull_request: propose it instead of changing the branch.
    """

    repository: str
    private: bool = False
    revision: str = _MAIN
    pull_request: bool = False


@dataclass(frozen=True)
class Upload:
    """What a checkpoint looks like when it is published.

    Attributes:
        files: a path, or the bytes that stand for it on the Hub, by name in the repository.
        digest: of the manifest, which lists the hashes of all the others.
    """

    files: Mapping[str, Path | bytes]
    digest: str


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repository: OWNER/NAME.
        revision: the branch or pull request that holds the checkpoint now.
        commit: its commit.
        pull_request: its address, when it is one.
        sent, deleted: names of files that this push changed.
        sent_bytes: of the files sent; what the Hub had already crossed no line.
        unchanged: how many files were there already.
    """

    repository: str
    revision: str
    commit: str
    pull_request: str | None
    sent: tuple[str, ...]
    deleted: tuple[str, ...]
    sent_bytes: int
    unchanged: int


def check_destination(destination: Destination) -> None:
    """Refuse a destination that cannot be, before anything else is done.

    Raises:
        UsageError: it is no Hub id, or a pull request is asked for beside a revision.
    """
    if not is_hub_id(destination.repository):
        raise UsageError(
            "this is no name for a repository on the Hub",
            where="OWNER/NAME",
            expected="an owner and a name of letters, digits, -, _ and .",
            got=repr(destination.repository),
        )
    if destination.pull_request and destination.revision != _MAIN:
        raise UsageError(
            "a pull request is made against main",
            where="--pull-request",
            got=f"also --revision {destination.revision}",
            next_step="leave one out; to go on with an open one, pass --revision refs/pr/N",
        )


def prepare(
    folder: Path, repository: str, *, base_model: str | None = None, licence: str | None = None
) -> Upload:
    """What would be published of a checkpoint, refused when it should not be.

    The card names the repository in its commands, and `base_model` and `licence` where they are
    given; the folder itself is left as it is.

    Raises:
        CheckpointError: files that the manifest does not know, or lacks; a symbolic link; a card
            without provenance or licence.
        UsageError: `base_model` is no Hub id, or `licence` no identifier.
    """
    source, _ = open_checkpoint(folder)
    manifest = read_json_object(folder / MANIFEST_FILE, CheckpointError)
    recorded = recorded_files(manifest, folder / MANIFEST_FILE)
    _check_files(folder, set(recorded))
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    card = _published_card(text, repository, base_model, licence)
    _check_card(card, folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in sorted(recorded)}
    # A card that was edited by hand is not the manifest's; its author answers for it.
    ours = file_record(folder / CARD, source.weights.shards) == recorded.get(CARD)
    if ours:
        content = card.encode()
        digest = hashlib.sha256(content).hexdigest()
        record = {"bytes": len(content), "sha256": digest}
        manifest = {**manifest, "files": {**recorded, CARD: record}}
        files[CARD] = content
    listing = to_text(manifest).encode()
    files[MANIFEST_FILE.as_posix()] = listing
    return Upload(files, hashlib.sha256(listing).hexdigest())


def _check_files(folder: Path, recorded: set[str]) -> None:
    present = present_files(folder)
    for what, names in (
        ("the folder holds files that its manifest does not know", present - recorded),
        ("files of the checkpoint are missing", recorded - present),
        (
            "the checkpoint holds symbolic links, which may lead anywhere",
            {name for name in present if _leads_elsewhere(folder, name)},
        ),
    ):
        if names:
            raise CheckpointError(
                what,
                where=folder,
                got=", ".join(sorted(names)),
                next_step="push only what hybridize wrote: convert again, or remove what is not "
                "part of the checkpoint",
            )


def _leads_elsewhere(folder: Path, name: str) -> bool:
    path = folder / name
    inside = [path, *path.parents][: len(Path(name).parts)]
    return any(part.is_symlink() for part in inside)


def _published_card(text: str, repository: str, base_model: str | None, licence: str | None) -> str:
    if base_model is not None and not is_hub_id(base_model):
        raise UsageError(
            "this is no Hub id", where="--base-model", expected="OWNER/NAME", got=base_model
        )
    if licence is not None and not is_licence_id(licence):
        raise UsageError(
            "this is no licence identifier",
            where="--license",
            expected="one of the Hub's, such as apache-2.0",
            got=repr(licence),
        )
    given = {"base_model": base_model, "license": licence}
    changes = {key: value for key, value in given.items() if value is not None}
    if changes:
        text = with_metadata(text, changes)
    return _CODE.sub(lambda code: re.sub(r"\bPATH\b", repository, code[0]), text)


def _check_card(card: str, folder: Path) -> None:
    """A card must say what the model was made from and under what licence it may be used."""
    metadata = read_metadata(card)
    base = metadata.get("base_model")
    if not isinstance(base, str) or not is_hub_id(base):
        raise CheckpointError(
            "the model card does not say which model on the Hub this was made from",
            where=folder / CARD,
            expected="base_model: OWNER/NAME",
            got=repr(base),
            next_step="say it with: --base-model OWNER/NAME",
        )
    if not metadata.get("license"):
        raise CheckpointError(
            "the model card has no licence",
            where=folder / CARD,
            expected="license: the original's",
            next_step="say it with: --license IDENTIFIER, such as apache-2.0",
        )


@dataclass(frozen=True)
class _Remote:
    """One revision on the Hub: its commit, and a hash of every file."""

    commit: str
    git_hashes: Mapping[str, str]
    sha256s: Mapping[str, str]

    @property
    def names(self) -> set[str]:
        return set(self.git_hashes)


@dataclass
class _Hashes:
    """Hashes of what is to be published, each computed once."""

    upload: Upload
    _known: dict[tuple[str, str], str] = field(default_factory=dict)

    def same(self, name: str, remote: _Remote) -> bool:
        """Whether the Hub has this file with these bytes."""
        if name in remote.sha256s:
            return self._of(name, "sha256") == remote.sha256s[name]
        return name in remote.git_hashes and self._of(name, "git") == remote.git_hashes[name]

    def _of(self, name: str, kind: str) -> str:
        if (name, kind) not in self._known:
            content = self.upload.files[name]
            hashed = _git_hash if kind == "git" else _sha256
            self._known[name, kind] = hashed(content)
        return self._known[name, kind]


def _sha256(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of(content)


def _git_hash(content: Path | bytes) -> str:
    """As git names a blob: SHA-1 over its length and its bytes."""
    content = content if isinstance(content, bytes) else content.read_bytes()
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def push(
    upload: Upload,
    destination: Destination,
    say: Say,
    patience: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
) -> Pushed:
    """Bring a repository on the Hub to what is to be published.

    Raises:
        HubError: the Hub refuses, fails or cannot be reached; the same push again goes on.
    """
    from huggingface_hub import HfApi

    where, hashes = destination.repository, _Hashes(upload)
    api = HfApi(library_name="hybridize")
    with hub_errors(where):
        with_patience(lambda: _make_repository(api, destination), patience, say)

        def attempt() -> Pushed:
            return _attempt(api, upload, destination, hashes, say)

        pushed = with_patience(attempt, patience, say)
        arrived = with_patience(lambda: _remote(api, where, pushed.revision), patience, say)
    wrong = sorted(name for name in upload.files if not hashes.same(name, arrived))
    if wrong:
        raise HubError(
            "the Hub does not hold what was sent",
            where=f"{where} at {pushed.revision}",
            got=", ".join(wrong),
            next_step="run the same command again",
        )
    return pushed


def _make_repository(api: HfApi, destination: Destination) -> None:
    """Create what does not exist; never make a private push public."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(destination.repository)
    except RepositoryNotFoundError:
        api.create_repo(destination.repository, private=destination.private, exist_ok=True)
    else:
        if destination.private and not info.private:
            raise HubError(
                "the repository is there already, and everybody can see it",
                where=destination.repository,
                expected="a private repository (--private)",
                next_step="choose another name, or make it private in its settings",
            )
    branch = destination.revision
    if branch != _MAIN and not branch.startswith("refs/"):
        api.create_branch(destination.repository, branch=branch, exist_ok=True)


def _attempt(
    api: HfApi, upload: Upload, destination: Destination, hashes: _Hashes, say: Say
) -> Pushed:
    """Compare, send and commit; safe to repeat."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repository = destination.repository
    title = f"Hybrid checkpoint {upload.digest[:12]}"
    proposed = _open_pull_request(api, repository, title) if destination.pull_request else None
    revision = proposed or destination.revision
    opening = destination.pull_request and proposed is None
    remote = _remote(api, repository, revision)
    sent = sorted(name for name in upload.files if not hashes.same(name, remote))
    deleted = sorted(_ours(api, repository, remote) & remote.names - upload.files.keys())
    size = sum(map(_bytes_of, (upload.files[name] for name in sent)))
    commit, address = remote.commit, _address(api, repository, revision) if proposed else None
    if sent or deleted:
        say(
            f"sending {len(sent)} of {len(upload.files)} files ({human_bytes(size)}) to "
            f"{repository}, {'a new pull request' if opening else revision}"
        )
        contents = {name: upload.files[name] for name in sent}
        made = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, content) for name, content in contents.items()),
                *(CommitOperationDelete(name) for name in deleted),
            ],
            commit_message=title,
            revision=revision,
            create_pr=opening,
            parent_commit=remote.commit,
        )
        commit = made.oid
        if opening:
            revision, address = str(made.pr_revision), made.pr_url
    return Pushed(
        repository=repository,
        revision=revision,
        commit=commit,
        pull_request=address,
        sent=tuple(sent),
        deleted=tuple(deleted),
        sent_bytes=size,
        unchanged=len(upload.files) - len(sent),
    )


def _open_pull_request(api: HfApi, repository: str, title: str) -> str | None:
    """The reference of an open pull request for the same checkpoint, which is not opened twice."""
    for found in api.get_repo_discussions(
        repository, discussion_type="pull_request", discussion_status="open"
    ):
        if found.title == title:
            return found.git_reference
    return None


def _address(api: HfApi, repository: str, reference: str) -> str:
    return f"{api.endpoint}/{repository}/discussions/{reference.rpartition('/')[2]}"


def _remote(api: HfApi, repository: str, revision: str) -> _Remote:
    from huggingface_hub.hf_api import RepoFile

    commit = api.model_info(repository, revision=revision).sha or ""
    tree = api.list_repo_tree(repository, recursive=True, revision=commit)
    files = [entry for entry in tree if isinstance(entry, RepoFile)]
    return _Remote(
        commit=commit,
        git_hashes={file.path: file.blob_id for file in files},
        sha256s={file.path: file.lfs.sha256 for file in files if file.lfs is not None},
    )


def _ours(api: HfApi, repository: str, remote: _Remote) -> set[str]:
    """Files that an earlier push of ours put there, by the manifest it left."""
    name = MANIFEST_FILE.as_posix()
    if name not in remote.names:
        return set()
    path = api.hf_hub_download(repository, name, revision=remote.commit)
    try:
        manifest: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        files = manifest["files"]
        return {str(file) for file in files} if isinstance(files, dict) else set()
    except (ValueError, KeyError, TypeError, RecursionError):
        # Not one of ours: nothing there is ours to delete.
        return set()


def _bytes_of(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
