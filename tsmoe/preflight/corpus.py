"""Has every node the data, whole, and the same?"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.stamps import Stamps
from data_pipeline.shards.writer import file_sha256
from tsmoe.data.stream_source import open_stream
from tsmoe.errors import TsmoeError
from tsmoe.preflight.scene import Scene
from tsmoe.preflight.verdict import Check, Row, Told, Verdict

# Of the time that a check may take: what is not read by then is left to the training.
_READING_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class CorpusFinding:
    """What a node found of the corpus, or of the stream."""

    path: str
    fingerprint: str = ""
    manifest: str = ""
    """Hash of the manifest; empty for a stream."""
    series: int = 0
    points: int = 0
    files: int = 0
    read_files: int = 0
    """Whose content is known to have the right hash."""
    problems: list[str] = field(default_factory=list)


def look(scene: Scene) -> CorpusFinding:
    """Read the manifest, compare sizes, and hash what there is time for."""
    config = scene.config
    if config.stream is not None:
        try:
            source = open_stream(config.stream)
        except TsmoeError as error:
            return CorpusFinding(path=config.stream.path, problems=[str(error)])
        fingerprint = source.fingerprint(config.stream)
        return CorpusFinding(path=config.stream.path, fingerprint=fingerprint)
    assert config.corpus is not None, "checked by the configuration"
    try:
        manifest = Manifest.read(config.corpus)
        scene.doing = f"looking for the shards of {config.corpus}"
        problems = manifest.check_sizes(config.corpus)
    except TsmoeError as error:
        return CorpusFinding(path=config.corpus, problems=[str(error)])
    read = 0
    if not problems and config.data.verifies_corpus and Path(config.corpus).is_dir():
        scene.doing = f"reading the shards of {config.corpus}"
        seconds = scene.options.timeout_seconds * _READING_SHARE
        read, problems = _hash_files(Path(config.corpus), manifest, seconds)
    return CorpusFinding(
        path=config.corpus,
        fingerprint=manifest.fingerprint,
        manifest=hashlib.sha256(manifest.to_json()).hexdigest(),
        series=manifest.num_series,
        points=manifest.num_points,
        files=len(_files(manifest)),
        read_files=read,
        problems=problems,
    )


def _files(manifest: Manifest) -> dict[str, str]:
    """Hash of each file of a corpus, by name."""
    files = {shard.file: shard.sha256 for shard in manifest.shards}
    if manifest.index is not None:
        files[manifest.index.file] = manifest.index.sha256
    return files


def _hash_files(folder: Path, manifest: Manifest, seconds: float) -> tuple[int, list[str]]:
    """Hash the files that changed since they were last read, as long as there is time.

    What was read is remembered, so that a run that starts on this node need not read it again.
    """
    deadline, read, problems = time.monotonic() + seconds, 0, []
    with Stamps.of(folder) as stamps:
        for name, sha256 in _files(manifest).items():
            path = folder / name
            if stamps.vouch_for(path, sha256):
                read += 1
            elif time.monotonic() < deadline:
                if file_sha256(path) == sha256:
                    stamps.add(path, sha256)
                    read += 1
                else:
                    problems.append(
                        f"{path}: the content has changed, its sha256 is not that of the manifest; "
                        "rebuild or copy again"
                    )
    return read, problems


def judge(told: Told[CorpusFinding]) -> list[Row]:
    """Look for nodes whose data is missing, damaged, or another."""
    rows = []
    for problems, ranks in told.groups(lambda f: tuple(f.problems)).items():
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            found, _, advice = problems[0].rpartition("; ")
            rows.append(told.row(Verdict.FAIL, f"{told.where(ranks)}: {found}{more}", advice))
    if rows:
        return rows
    advice = "copy the corpus to all nodes again, or put it where all see the same"
    rows = told.unlike("the fingerprint", lambda f: f.fingerprint[:12], advice)
    rows = rows or told.unlike("the manifest", lambda f: f.manifest[:12], advice)
    if rows:
        return rows
    f = next(iter(told.findings.values()))
    if not f.manifest:
        return [told.row(Verdict.OK, f"stream {f.path} can be reached, {f.fingerprint[:12]}")]
    least = min(finding.read_files for finding in told.findings.values())
    found = (
        f"{f.path}: {f.series:,} series of {f.points:,} points, {f.files} files of the right size, "
        f"{least} read and right, fingerprint {f.fingerprint[:12]}"
    )
    return [told.row(Verdict.OK, found)]


CHECK = Check(name="corpus", finding=CorpusFinding, look=look, judge=judge, once_per_node=True)
