"""`tsmoe data`: build a corpus, and look at one."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsmoe.commands import data_audit, data_report
from tsmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from data_pipeline.shards import Corpus, Manifest

TINY = "tiny"
"""In place of a corpus YAML: the embedded corpus."""
_EXAMPLES_SHOWN = 3
_PROCESSES_AT_MOST = 8


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its sub-commands."""
    parser = subparsers.add_parser("data", help="build, check and describe a corpus")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    build = _add_action(actions, "build", "sources -> steps -> Arrow shards", run_build)
    build.add_argument(
        "corpus", metavar="CORPUS.yaml", help=f"corpus configuration, or `{TINY}` (embedded)"
    )
    build.add_argument("--out", required=True, metavar="DIR", help="folder or URL of the corpus")
    build.add_argument(
        "--overwrite", action="store_true", help="replace a corpus built from something else"
    )
    build.add_argument(
        "--task",
        default="1/1",
        metavar="I/N",
        help="build the I-th of N parts; the task that ends last puts them together",
    )
    build.add_argument(
        "--processes",
        type=int,
        default=min(os.cpu_count() or 1, _PROCESSES_AT_MOST),
        metavar="N",
        help="blocks built at a time, each with a shard in memory (default: %(default)s)",
    )
    status = _add_action(actions, "status", "is it whole, and what was dropped", run_status)
    inspect = _add_action(actions, "inspect", "one series", run_inspect)
    verify = _add_action(actions, "verify", "compare all bytes with the manifest", run_verify)
    stats = _add_action(actions, "stats", "a table of the data sets", run_stats)
    report = _add_action(
        actions, "report", "a page of what was kept and dropped", data_report.run_report
    )
    data_report.add_arguments(report)
    audit = actions.add_parser("audit", help="is anything of evaluation tables in it")
    data_audit.add_arguments(audit)
    audit.set_defaults(run=data_audit.run_audit)
    for action in (status, inspect, verify, stats):
        action.add_argument("path", metavar="PATH", help="folder or URL of the corpus")

    which = inspect.add_mutually_exclusive_group()
    which.add_argument("--item", metavar="ID", help="item_id of the series")
    which.add_argument("--index", type=int, default=0, metavar="N", help="its number (default: 0)")
    inspect.add_argument("--plot", metavar="OUT.png", help="draw the series")


def run_build(args: argparse.Namespace) -> int:
    """Build a corpus, or say that it is up to date."""
    from data_pipeline.build import build_corpus, build_state, parse_task, up_to_date_manifest
    from data_pipeline.config import load_corpus_config
    from data_pipeline.progress import command_progress
    from data_pipeline.tiny import TINY_CORPUS_CONFIG
    from tsmoe.commands.options import require_positive

    require_positive("processes", args.processes)
    task = parse_task(args.task)
    config = load_corpus_config(TINY_CORPUS_CONFIG if args.corpus == TINY else args.corpus)
    is_current = not args.overwrite and up_to_date_manifest(config, args.out) is not None
    with command_progress() as progress:
        manifest = build_corpus(
            config,
            args.out,
            overwrite=args.overwrite,
            task=task,
            processes=args.processes,
            progress=progress,
        )
    if manifest is None:
        built, total = build_state(args.out) or (0, 0)
        if args.json:
            _print_json({"path": args.out, "task": args.task, "built": built, "blocks": total})
        else:
            print(f"{args.out}: task {args.task} is done, {built} of {total} blocks are built")
        return 0
    if args.json:
        _print_json({"path": args.out, "up_to_date": is_current, **_summary(manifest)})
        return 0
    if is_current:
        print(f"{args.out} is up to date: {_totals(manifest)}")
        return 0
    print(f"{args.out}: {_totals(manifest)}, fingerprint {manifest.fingerprint[:12]}")
    _print_drops(manifest)
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Say whether a corpus is whole, and what was dropped; exit code 3 if it is not whole."""
    from data_pipeline.build import build_state
    from data_pipeline.shards import Manifest

    unfinished = build_state(args.path)
    if unfinished is not None:
        built, total = unfinished
        raise DataError(
            f"{args.path}: the build has not finished, {built} of {total} blocks are built; run "
            f"the same `tsmoe data build` again, it goes on from there"
        )
    manifest = Manifest.read(args.path)
    problems = manifest.check_sizes(args.path)
    if args.json:
        _print_json(
            {
                "path": args.path,
                "whole": not problems,
                "problems": problems,
                **_summary(manifest),
                "drops": {name: asdict(drops) for name, drops in manifest.drops.items()},
            }
        )
    else:
        for problem in problems:
            print(problem)
        state = "damaged" if problems else "all shards there (`tsmoe data verify` reads them)"
        print(f"{args.path}: {state}, {_totals(manifest)} in {len(manifest.shards)} shards")
        print(f"fingerprint {manifest.fingerprint}")
        _print_drops(manifest)
    return DataError.exit_code if problems else 0


def run_inspect(args: argparse.Namespace) -> int:
    """Describe one series, and draw it if asked."""
    from data_pipeline.shards import Corpus

    corpus = Corpus.open(args.path)
    index = args.index if args.item is None else corpus.find(args.item)
    if not 0 <= index < corpus.num_series:
        raise ConfigError(
            f"--index {index}: the corpus has series 0 to {corpus.num_series - 1}; choose one"
        )
    if args.plot is not None and Path(args.plot).suffix.lower() != ".png":
        raise ConfigError(f"--plot {args.plot}: give a file that ends in .png")
    description = _describe(corpus, index)
    if args.plot is not None:
        _draw(corpus, index, Path(args.plot))
        description["plot"] = args.plot
    if args.json:
        _print_json(description)
    else:
        _print_table("series", ("property", "value"), [(k, v) for k, v in description.items()])
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Recompute every hash and count; exit code 3 if anything differs."""
    from data_pipeline.shards.verify import verify_corpus

    problems = verify_corpus(args.path)
    if args.json:
        _print_json({"path": args.path, "whole": not problems, "problems": problems})
    elif problems:
        for problem in problems:
            print(problem)
    else:
        print(f"{args.path}: every shard is as the manifest says")
    return DataError.exit_code if problems else 0


def run_stats(args: argparse.Namespace) -> int:
    """Print a table of the data sets."""
    from data_pipeline.shards import Corpus
    from data_pipeline.stats import source_statistics

    corpus = Corpus.open(args.path)
    statistics = source_statistics(corpus)
    if args.json:
        sources = [asdict(item) for item in statistics]
        _print_json({"path": args.path, "fingerprint": corpus.fingerprint, "sources": sources})
        return 0
    rows = [
        (
            item.source,
            ", ".join(item.domains),
            ", ".join(item.freqs) or "-",
            f"{item.series:,}",
            f"{item.points:,}",
            f"{item.missing_fraction:.1%}",
            f"{item.length_min:,} / {item.length_median:,} / {item.length_max:,}",
        )
        for item in statistics
    ]
    total = ("all", "", "", f"{corpus.num_series:,}", f"{corpus.lengths.sum():,}", "", "")
    header = ("source", "domain", "freq", "series", "points", "missing", "length min/median/max")
    _print_table(args.path, header, [*rows, total])
    return 0


def _add_action(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    text: str,
    function: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=function)
    return parser


def _summary(manifest: "Manifest") -> dict[str, Any]:  # Any: JSON
    return {
        "fingerprint": manifest.fingerprint,
        "series": manifest.num_series,
        "points": manifest.num_points,
        "dropped": manifest.num_dropped,
        "shards": len(manifest.shards),
        "train_fraction": manifest.train_fraction,
    }


def _totals(manifest: "Manifest") -> str:
    return (
        f"{manifest.num_series:,} series, {manifest.num_points:,} points of "
        f"{len(manifest.sources)} sources, {manifest.num_dropped:,} series dropped"
    )


def _print_drops(manifest: "Manifest") -> None:
    rows = [
        (reason, source, f"{item.count:,}", ", ".join(item.examples[:_EXAMPLES_SHOWN]))
        for reason, drops in manifest.drops.items()
        for source, item in drops.sources.items()
    ]
    if rows:
        _print_table("dropped series", ("reason", "source", "series", "such as"), rows)


def _describe(corpus: "Corpus", index: int) -> dict[str, Any]:  # Any: JSON
    record = corpus.record(index)
    statistics = corpus.statistics(index)
    return {
        "index": index,
        "item_id": record.item_id,
        "source": record.source,
        "domain": record.domain,
        "variate": record.variate,
        "freq": record.freq,
        "start": None if record.start is None else str(record.start),
        "end": None if record.end is None else str(record.end),
        "points": len(record.values),
        "train_points": int(corpus.train_lengths[index]),
        "observed_fraction": statistics.observed_fraction,
        "train_mean": statistics.mean,
        "train_std": statistics.std,
    }


def _draw(corpus: "Corpus", index: int, path: Path) -> None:
    """Draw one series with the end of its training part marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    record = corpus.record(index)
    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(record.values, linewidth=0.8)
    axes.axvline(int(corpus.train_lengths[index]), color="tab:red", linestyle="--")
    axes.set_title(f"{record.item_id} ({record.source}, {record.domain})")
    since = "" if record.start is None else f" since {record.start}"
    axes.set_xlabel(f"step of {record.freq or 'unknown length'}{since}; dashed: training ends")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written ({error.strerror})") from error


def _print_json(document: dict[str, Any]) -> None:  # Any: JSON
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, title=Text(title), title_justify="left")
    for row in rows:
        # Text, because names from the data may look like markup.
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    # A pipe has no width of its own; a narrow guess would cut the cells.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
