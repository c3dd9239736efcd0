"""Publishing a checkpoint on the Hub: checked here first, then only what changed, in one commit.

A branch holds the old checkpoint or the new one. After a fault the same is done again: compare
hashes, send what is not there, commit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converter.checkpoint.format import CARD_FILE, MANIFEST_FILE
from converter.checkpoint.reader import file_record, open_checkpoint, present_files, read_manifest
from converter.common.errors import CheckpointError, HubError, UsageError
from converter.common.files import to_text
from converter.common.hub import RetryPolicy, hub_errors, with_retries
from converter.common.units import human_bytes
from converter.publish.metadata import is_hub_id, is_licence_id, read_metadata, with_metadata

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

_CARD, _MANIFEST = CARD_FILE.as_posix(), MANIFEST_FILE.as_posix()
Say = Callable[[str], None]
# By name in the repository: a path, or the bytes that stand for it on the Hub.
Upload = dict[str, Path | bytes]
# Where a card's commands say PATH, the published one says what to load.
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_MAIN = "main"


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint goes, OWNER/NAME.

    Attributes:
        revision: a branch, or the reference of an open pull request (`refs/pr/1`).
        pull_request: propose it instead of changing the branch.
    """

    repository: str
    private: bool = False
    revision: str = _MAIN
    pull_request: bool = False


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        revision: the branch or pull request that holds the checkpoint now.
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
    manifest = read_manifest(folder)
    recorded = manifest["files"]
    _check_files(folder, set(recorded))
    card = _published_card(folder / _CARD, repository, base_model, licence)
    files: Upload = {name: folder / name for name in sorted(recorded)}
    # A card that was edited by hand is not the manifest's; its author answers for it.
    if file_record(folder / _CARD, source.weights.shards) == recorded[_CARD]:
        files[_CARD] = content = card.encode()
        record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = {**manifest, "files": {**recorded, _CARD: record}}
    return files | {_MANIFEST: to_text(manifest).encode()}


def _check_files(folder: Path, recorded: set[str]) -> None:
    present, real = present_files(folder), folder.resolve()
    links = {name for name in present if (real / name).resolve() != real / name}
    for what, names in (
        ("the folder holds files that its manifest does not know", present - recorded),
        ("files of the checkpoint are missing", (recorded | {_CARD}) - present),
        ("the checkpoint holds symbolic links, which may lead anywhere", links),
    ):
        if names:
            raise CheckpointError(
                what,
                where=folder,
                got=", ".join(sorted(names)),
                next_step="push only what hybridize wrote: convert again, or remove what is not "
                "part of the checkpoint",
            )


def _published_card(
    path: Path, repository: str, base_model: str | None, licence: str | None
) -> str:
    """The card with what is given put in; it must say what the model is from, and its licence."""
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
    text = path.read_text(encoding="utf-8", errors="replace")
    given = {"base_model": base_model, "license": licence}
    if changes := {key: value for key, value in given.items() if value is not None}:
        text = with_metadata(text, changes)
    metadata = read_metadata(text)
    base = metadata.get("base_model")
    if not isinstance(base, str) or not is_hub_id(base):
        raise CheckpointError(
            "the model card does not say which model on the Hub this was made from",
            where=path,
            expected="base_model: OWNER/NAME",
            got=repr(base),
            next_step="say it with: --base-model OWNER/NAME",
        )
    if not metadata.get("license"):
        raise CheckpointError(
            "the model card has no licence",
            where=path,
            expected="license: the original's",
            next_step="say it with: --license IDENTIFIER, such as apache-2.0",
        )
    return _CODE.sub(lambda code: re.sub(r"\bPATH\b", repository, code[0]), text)


def push(
    upload: Upload,
    destination: Destination,
    say: Say,
    policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
) -> Pushed:
    """Bring a repository on the Hub to what is to be published.

    Raises:
        HubError: the Hub refuses, fails or cannot be reached; the same push again goes on.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with hub_errors(destination.repository):
        # This computes each file's hash, once.
        files = {name: CommitOperationAdd(name, file) for name, file in upload.items()}
        # The manifest lists the hashes of all the others.
        title = f"Hybrid checkpoint {files[_MANIFEST].upload_info.sha256.hex()[:12]}"
        work = _Push(HfApi(library_name="hybridize"), title, files, destination, say)
        with_retries(work.make_repository, policy, say)
        pushed = with_retries(work.attempt, policy, say)
        _, arrived = with_retries(lambda: work.tree(pushed.revision), policy, say)
    if wrong := work.differing(arrived):
        raise HubError(
            "the Hub does not hold what was sent",
            where=f"{destination.repository} at {pushed.revision}",
            got=", ".join(wrong),
            next_step="run the same command again",
        )
    return pushed


@dataclass(frozen=True)
class _Push:
    """A push under way; each step is safe to repeat."""

    api: HfApi
    title: str
    files: Mapping[str, CommitOperationAdd]
    destination: Destination
    say: Say

    def make_repository(self) -> None:
        """Create what does not exist; never make a private push public."""
        from huggingface_hub.errors import RepositoryNotFoundError

        repository, branch = self.destination.repository, self.destination.revision
        try:
            info = self.api.model_info(repository)
        except RepositoryNotFoundError:
            self.api.create_repo(repository, private=self.destination.private, exist_ok=True)
        else:
            if self.destination.private and not info.private:
                raise HubError(
                    "the repository is there already, and everybody can see it",
                    where=repository,
                    expected="a private repository (--private)",
                    next_step="choose another name, or make it private in its settings",
                )
        if branch != _MAIN and not branch.startswith("refs/"):
            self.api.create_branch(repository, branch=branch, exist_ok=True)

    def attempt(self) -> Pushed:
        """Compare, send what differs, and commit."""
        from huggingface_hub import CommitOperationDelete

        repository, revision = self.destination.repository, self.destination.revision
        address, opening = None, self.destination.pull_request
        if opening and (proposed := self._open_pull_request()) is not None:
            number = proposed.rpartition("/")[2]
            address = f"{self.api.endpoint}/{repository}/discussions/{number}"
            revision, opening = proposed, False
        commit, there = self.tree(revision)
        sent = self.differing(there)
        deleted = sorted(self._ours(commit, there) & there.keys() - self.files.keys())
        size = sum(self.files[name].upload_info.size for name in sent)
        if sent or deleted:
            self.say(
                f"sending {len(sent)} of {len(self.files)} files ({human_bytes(size)}) to "
                f"{repository}, {'a new pull request' if opening else revision}"
            )
            made = self.api.create_commit(
                repository,
                # Copies, because a commit marks what it is given, and may have to be repeated.
                [*(copy(self.files[n]) for n in sent), *map(CommitOperationDelete, deleted)],
                commit_message=self.title,
                revision=revision,
                create_pr=opening,
                parent_commit=commit,
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
            unchanged=len(self.files) - len(sent),
        )

    def tree(self, revision: str) -> tuple[str, dict[str, RepoFile]]:
        """What the Hub holds at a revision: the commit, and its files by name."""
        from huggingface_hub.hf_api import RepoFile

        repository = self.destination.repository
        commit = self.api.model_info(repository, revision=revision).sha or ""
        entries = self.api.list_repo_tree(repository, recursive=True, revision=commit)
        return commit, {e.path: e for e in entries if isinstance(e, RepoFile)}

    def differing(self, there: Mapping[str, RepoFile]) -> list[str]:
        """Names of our files that the Hub does not hold, or not with these bytes."""
        return sorted(n for n, file in self.files.items() if not _same(file, there.get(n)))

    def _open_pull_request(self) -> str | None:
        """The reference of an open pull request for the same checkpoint: none is opened twice."""
        open_ones = self.api.get_repo_discussions(
            self.destination.repository, discussion_type="pull_request", discussion_status="open"
        )
        return next((one.git_reference for one in open_ones if one.title == self.title), None)

    def _ours(self, commit: str, there: Mapping[str, RepoFile]) -> set[str]:
        """Files that an earlier push of ours put there, by the manifest it left."""
        if _MANIFEST not in there:
            return set()
        path = self.api.hf_hub_download(self.destination.repository, _MANIFEST, revision=commit)
        try:
            return set(read_manifest(Path(path).parents[1])["files"])
        except CheckpointError:
            # Not one of ours: nothing there is ours to delete.
            return set()


def _same(ours: CommitOperationAdd, there: RepoFile | None) -> bool:
    """Whether a file on the Hub has the bytes of ours."""
    from huggingface_hub.utils.sha import git_hash

    if there is None or there.size != ours.upload_info.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == ours.upload_info.sha256.hex()
    with ours.as_file() as file:
        return there.blob_id == git_hash(file.read())
