"""Whole hashes of a checkpoint's weights, found while the model is run, and what they prove."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from converter.checkpoint.reader import read_manifest, scores_inside
from converter.checkpoint.verify.report import Check, names_check
from converter.common.errors import CheckpointError
from converter.common.files import read_json_object
from converter.model.identity import start_hashing
from converter.model.source import Source


class WeightHashes:
    """The weights of a checkpoint, and of the model it is held against, hashed by a thread.

    They are read whole even when their hashes are known: this is the proof.

    Attributes:
        sampled: weight files that nothing holds a whole hash of, so that only their sampled hashes
            can be compared.
    """

    def __init__(self, inside: Source, against: Source | None) -> None:
        self._inside, self._against = inside, against
        shards, files = inside.weights.shards, read_manifest(inside.folder)["files"]
        whole = {name: files.get(name, {}).get("sha256") for name in shards}
        self._recorded = {name: digest for name, digest in whole.items() if digest is not None}
        self._scored = _fingerprint_of_scores(inside)
        theirs = () if against is None else against.weights.shards
        # Two names of one file are equal whatever is in it.
        same = [name for name in theirs if against is not None and _same(inside, against, name)]
        self._apart, self._linked = [name for name in theirs if name not in same], len(same)
        known = {*self._recorded, *(self._scored.get("weights") or {}), *self._apart}
        self.sampled = tuple(name for name in shards if name not in known)
        paths = [inside.folder / name for name in shards]
        if against is not None:
            paths += [against.folder / name for name in self._apart]
        self._found = start_hashing(paths, afresh=True)

    def checks(self) -> Iterator[Check]:
        """Against the manifest, the scores and the source; waits for the hashes.

        Raises:
            SourceError: a file cannot be read, or was written to since it was opened.
        """
        found = self._found.result()
        inside, against = self._inside, self._against
        ours = {name: found[inside.folder / name] for name in inside.weights.shards}
        told = f"{len(ours)} hashed wholly"
        if self.sampled:
            told += f", {len(self.sampled)} held against sampled hashes only"
        wrong = [name for name in self._recorded if ours[name] != self._recorded[name]]
        yield names_check("hashes of the weights", wrong, told, "the manifest's")
        if self._scored:
            yield self._measured(ours)
        if against is not None:
            theirs = {name: found[against.folder / name] for name in self._apart}
            wrong = [name for name, digest in theirs.items() if ours.get(name) != digest]
            wrong += ours.keys() - set(against.weights.shards)
            equal = "identical" if self._apart else ""
            linked = f"{self._linked} the same file (hard link)" if self._linked else ""
            told = ", ".join(filter(None, (equal, linked)))
            yield names_check("weights are the source's", wrong, told, "byte by byte")
            against.files.check()
        inside.files.check()

    def _measured(self, ours: dict[str, str]) -> Check:
        """The scores inside were measured on these weights."""
        name, measured = "weights are those that were measured", self._scored.get("weights")
        if isinstance(measured, dict):
            wrong = [n for n in ours.keys() | measured.keys() if ours.get(n) != measured.get(n)]
            return names_check(name, wrong, "identical", "the scores' hashes")
        # Scores of earlier versions.
        same = self._scored.get("source") == self._inside.fingerprint
        return Check(name, same, "the same samples" if same else "others", "the scores' samples")


def _fingerprint_of_scores(inside: Source) -> dict[str, Any]:
    if (path := scores_inside(inside.folder)) is None:
        return {}
    found = read_json_object(path, CheckpointError).get("fingerprint")
    return found if isinstance(found, dict) else {}


def _same(inside: Source, against: Source, name: str) -> bool:
    path = inside.folder / name
    return path.exists() and path.samefile(against.folder / name)
