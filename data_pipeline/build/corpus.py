"""Building a corpus from start to end: plan, blocks, merge. Read `build_corpus` first.

A build may be spread over tasks (`--task I/N`, such as those of a SLURM array) and over processes
of one machine. Whatever is killed goes on where it was: finished blocks stay, the rest is built
again, and until the manifest is written nothing in the folder looks like a corpus.
"""

import logging
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatch
from multiprocessing import get_context

import pyarrow as pa

from data_pipeline.build.block import build_block, read_result
from data_pipeline.build.lock import LOCK_PREFIX, build_lock
from data_pipeline.build.merge import merge_blocks
from data_pipeline.build.plan import (
    Block,
    BuildPlan,
    describe_change,
    input_files,
    make_plan,
)
from data_pipeline.config import CorpusConfig
from data_pipeline.curation.table import CURATION_FOLDER
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.progress import Progress, SilentProgress
from data_pipeline.shards.index import INDEX_FILE
from data_pipeline.shards.manifest import (
    BUILDING_FOLDER,
    MANIFEST_FILE,
    InputFile,
    Manifest,
    SourceEntry,
)
from data_pipeline.shards.writer import SHARD_PATTERN
from data_pipeline.storage import Store

logger = logging.getLogger(__name__)

PLAN_FILE = f"{BUILDING_FOLDER}/plan.json"


def build_corpus(
    config: CorpusConfig,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    task: tuple[int, int] = (1, 1),
    processes: int = 1,
    progress: Progress | None = None,
) -> Manifest | None:
    """Build a corpus, or this task's share of one; leave it alone if it is up to date.

    The task that finds all blocks built merges them: with one task that is always this one.

    Args:
        config: what to build.
        out: folder or URL of the corpus; made if it does not exist.
        overwrite: replace a corpus, or an unfinished build, of something else.
        task: (I, N), this process builds every N-th block from the I-th.
        processes: blocks built at a time; each holds one shard in memory.
        progress: told about every series that is kept.

    Returns:
        The manifest, or None if other tasks have not finished their blocks.

    Raises:
        ConfigError: if `out` holds something else, or a source names no files.
        DataError: if a source cannot be read, the disk is full, or no series is left.
    """
    store = Store.at(out)
    inputs = input_files(config)
    current = up_to_date_manifest(config, store, inputs)
    if current is not None and not overwrite:
        logger.info("%s is up to date: %d series", store, current.num_series)
        store.remove_folder(BUILDING_FOLDER)  # a merge may have been killed while tidying
        return current
    _check_replaceable(store, overwrite)
    with build_lock(store, task) as lock:
        plan = _begin(config, store, inputs, overwrite=overwrite)
        blocks = plan.of_task(*task)
        _build_blocks(config, plan, blocks, store, processes, progress or SilentProgress())
        results = [read_result(store, block, plan.identity) for block in plan.blocks]
        unbuilt = results.count(None)
        if unbuilt:
            logger.info(
                "task %d of %d has ended; %d of %d blocks of the others are not there yet, the "
                "last task merges them", *task, unbuilt, len(results),
            )  # fmt: skip
            return None
        lock.make_exclusive()
        manifest = up_to_date_manifest(config, store, inputs)
        if manifest is None:  # else another task that ended with this one was faster
            manifest = merge_blocks(config, plan, [r for r in results if r is not None], store)
        store.remove_folder(BUILDING_FOLDER)
    return manifest


def up_to_date_manifest(
    config: CorpusConfig,
    out: "str | os.PathLike[str] | Store",
    inputs: list[InputFile] | None = None,
) -> Manifest | None:
    """Return the manifest of a whole corpus of this configuration and these files, if there is one.

    Files are compared by path, size and time of change. A data set on the hub has no local files:
    only its configuration counts, so pin its `revision`.
    """
    store = out if isinstance(out, Store) else Store.at(out)
    if not store.exists(MANIFEST_FILE):
        return None
    manifest = Manifest.read(store)
    is_same = manifest.config_hash == config.content_hash()
    is_same = is_same and manifest.inputs == (input_files(config) if inputs is None else inputs)
    return manifest if is_same and not manifest.check_sizes(store) else None


def build_state(out: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Count the blocks that are built and all there are; None if no build is under way."""
    store = Store.at(out)
    if store.exists(MANIFEST_FILE) or not store.exists(PLAN_FILE):
        return None
    plan = BuildPlan.from_json(store.read_bytes(PLAN_FILE), store.path_of(PLAN_FILE))
    built = [read_result(store, block, plan.identity) is not None for block in plan.blocks]
    return sum(built), len(built)


def _begin(
    config: CorpusConfig, store: Store, inputs: list[InputFile], *, overwrite: bool
) -> BuildPlan:
    """Take up the plan of an unfinished build, or make one."""
    if store.exists(PLAN_FILE):
        plan = BuildPlan.from_json(store.read_bytes(PLAN_FILE), store.path_of(PLAN_FILE))
        if plan.config_hash == config.content_hash() and plan.inputs == inputs:
            return plan
        if not overwrite:
            raise ConfigError(
                f"--out {store} holds an unfinished build of something else "
                f"({describe_change(plan.inputs, inputs)}); go on with that, choose another --out, "
                f"or pass --overwrite to begin anew"
            )
    plan = make_plan(config)  # first: a source that cannot be read leaves an older corpus as it is
    # The manifest goes before anything of the plan is there: from here on nothing looks whole.
    store.remove(MANIFEST_FILE)
    _discard_blocks(store)
    store.write_bytes(PLAN_FILE, plan.to_json())
    return plan


def _build_blocks(
    config: CorpusConfig,
    plan: BuildPlan,
    blocks: list[Block],
    store: Store,
    processes: int,
    progress: Progress,
) -> None:
    """Build those of the blocks that are not there yet."""
    identity = plan.identity
    missing = [block for block in blocks if read_result(store, block, identity) is None]
    if len(missing) < len(blocks):
        logger.info("%d of %d blocks were built before", len(blocks) - len(missing), len(blocks))
    if processes == 1 or len(missing) < 2:
        for block in missing:
            build_block(config, block, plan=identity, store=store, progress=progress)
        return
    # Spawned, not forked: pyarrow's and numpy's threads do not survive a fork.
    with ProcessPoolExecutor(
        min(processes, len(missing)), mp_context=get_context("spawn"), initializer=_use_one_thread
    ) as pool:
        jobs = [
            pool.submit(_build_in_process, config, block, identity, store.location)
            for block in missing
        ]
        try:
            for job in as_completed(jobs):
                for source, entry in job.result().items():
                    progress.advance(source, entry.points, entry.series)
        except BrokenProcessPool as error:
            raise DataError(
                f"{store}: a build process died without a word, as the kernel kills them when "
                f"memory runs out; start the same command again with fewer --processes or a "
                f"smaller shard_size_bytes: finished blocks stay"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _use_one_thread() -> None:
    """Keep the library's threads of many processes from fighting over the cores."""
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


def _build_in_process(
    config: CorpusConfig, block: Block, plan: str, location: str
) -> dict[str, SourceEntry]:
    """Build a block in a process of the pool, and say what it holds."""
    return build_block(
        config, block, plan=plan, store=Store.at(location), progress=SilentProgress()
    ).sources


def _check_replaceable(store: Store, overwrite: bool) -> None:
    """Refuse to touch what is neither an unfinished corpus, nor a finished one that may go."""
    if store.is_local:
        folder = store.local_path("")
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--out {store} is a file; choose a folder")
    if store.exists(MANIFEST_FILE):
        if not overwrite:
            raise ConfigError(
                f"--out {store} holds a corpus built from another configuration, from files that "
                f"have changed since, or with damaged shards; choose another --out or pass "
                f"--overwrite"
            )
        return
    if store.exists(PLAN_FILE):
        return
    found = [name for name in store.files() if not name.startswith(f"{BUILDING_FOLDER}/")]
    if INDEX_FILE in found and all(map(_is_of_corpus, found)):
        if not overwrite:
            raise ConfigError(
                f"--out {store} holds what is left of a corpus whose replacement came to nothing; "
                f"choose another --out or pass --overwrite"
            )
    elif found:
        raise ConfigError(
            f"--out {store} holds files that are no corpus; choose another --out or empty it"
        )


def _is_of_corpus(name: str) -> bool:
    is_shard = fnmatch(name, SHARD_PATTERN)
    return is_shard or name == INDEX_FILE or name.startswith(f"{CURATION_FOLDER}/")


def _discard_blocks(store: Store) -> None:
    """Remove what was built under another plan; the locks stay."""
    for name in store.files(BUILDING_FOLDER):
        if not name.startswith(LOCK_PREFIX):
            store.remove(name)
