"""What comes of a fine-tuning run: the best weights or the start, and both on the test part."""

from __future__ import annotations

import json
import logging
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsmoe import __version__
from tsmoe.checkpoint.layout import write_text
from tsmoe.checkpoint.package import save_package
from tsmoe.config import encode
from tsmoe.evaluate.baselines import season_length
from tsmoe.evaluate.forecast import MODEL, ForecastEvaluation, evaluate_forecast
from tsmoe.evaluate.metrics import ForecastScores
from tsmoe.evaluate.protocol import iterate_windows
from tsmoe.finetune.choice import Choice, choose
from tsmoe.finetune.config import FinetuneRun
from tsmoe.finetune.guard import Guard
from tsmoe.finetune.order import uniformly_spaced
from tsmoe.finetune.start import Start
from tsmoe.finetune.table import SplitTable
from tsmoe.finetune.validation import Validation
from tsmoe.finetune.windows import context_rows
from tsmoe.inference import Forecaster
from tsmoe.ranks import Ranks
from tsmoe.report.graph import GRAPH, VariateLinks, graph_picture, write_graph
from tsmoe.report.pictures import png

logger = logging.getLogger(__name__)

RESULT_FILE, PACKAGE_FOLDER, GRAPH_PICTURE = "result.json", "package", "graph.png"
ZERO_SHOT, FINE_TUNED = "zero_shot", "fine_tuned"

# Test windows whose graphs are averaged for the picture.
_GRAPH_WINDOWS = 256
# Windows that pass the model together when the test part is forecast.
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What was handed over, and how it compares."""

    package: Path
    best_step: int | None
    """Steps after which validation was best; None if it never was a number."""
    verdict: str
    """One line for people."""
    scores: dict[str, ForecastScores]
    """On the test part, by `zero_shot`, `fine_tuned` and the baselines' names."""
    windows: int
    """Test windows."""


def hand_over(
    run: FinetuneRun,
    start: Start | None,
    split: SplitTable,
    guard: Guard,
    *,
    device: torch.device,
    failure: str | None,
) -> RunResult:
    """Write package, result.json and the graph; the first rank alone calls it.

    Args:
        device: where the test part is forecast.
        failure: why training ended before its time, if it did.

    Raises:
        TrainingError: if training from scratch brought nothing that can be used.
        CheckpointError: if the package can't be written.
    """
    folder = Path(run.run)
    validation = Validation(run, split, Ranks(device=device))
    choice = choose(run, start, guard, validation.error, failure=failure)
    logger.info("%s: %s", folder, choice.verdict)
    evaluations: dict[str, ForecastEvaluation] = {}
    if start is not None:
        forecaster = Forecaster(start.build(), {}, device)
        evaluations[ZERO_SHOT] = _evaluate(run, split, forecaster, baselines=choice.is_start)
    if not choice.is_start:
        forecaster = Forecaster(choice.model, {}, device)
        evaluations[FINE_TUNED] = _evaluate(run, split, forecaster, baselines=True)
        _write_links(run, split, forecaster)
    scores = _join(evaluations)
    card = _card(run, start, split, choice, scores)
    save_package(folder / PACKAGE_FOLDER, choice.model.cpu(), card)
    own = next(iter(evaluations.values()))
    text = json.dumps(
        {
            "handed_over": ZERO_SHOT if choice.is_start else FINE_TUNED,
            "verdict": choice.verdict,
            "best_step": choice.step,
            "share_of_learned": choice.share,
            "validation_mse": {
                **guard.as_json(),
                "by_share": {f"{share:g}": e for share, e in choice.errors_by_share.items()},
            },
            "test": {
                "data": own.data,
                "context": own.context_length,
                "horizon": own.prediction_length,
                "windows": own.windows,
                "results": {name: found.to_json_dict() for name, found in scores.items()},
            },
        },
        indent=1,
    )
    write_text(folder / RESULT_FILE, f"{text}\n")
    return RunResult(
        package=folder / PACKAGE_FOLDER,
        best_step=choice.step,
        verdict=choice.verdict,
        scores=scores,
        windows=own.windows,
    )


def _evaluate(
    run: FinetuneRun, split: SplitTable, forecaster: Forecaster, *, baselines: bool
) -> ForecastEvaluation:
    """Forecast the test part; a start, which knows no covariates, is given none."""
    table = run.config.table
    season = table.season or season_length(split.table.freq)
    names: tuple[str, ...] = ()
    if baselines:
        is_seasonal = season is not None and season <= context_rows(run)
        names = ("linear", *(("seasonal_naive",) if is_seasonal else ()), "naive")
    return evaluate_forecast(
        forecaster,
        split.table,
        context_length=context_rows(run),
        prediction_length=table.prediction_length,
        split=table.split,
        season=season,
        baselines=names,
        must_fit=False,
        batch_size=_BATCH,
        num_covariates=split.num_covariates,
        num_known_future=split.num_known_future if forecaster.mixes_variates else 0,
        progress=_log_tenths(),
    )


class _log_tenths:  # noqa: N801
    """Says how far a long evaluation is."""

    def __init__(self) -> None:
        self._said = 0

    def __call__(self, done: int, total: int) -> None:
        if 10 * done // total > self._said:
            self._said = 10 * done // total
            logger.info("test part: %d of %d windows", done, total)


def _join(evaluations: dict[str, ForecastEvaluation]) -> dict[str, ForecastScores]:
    """Put models first and baselines behind."""
    scores = {name: evaluation.scores[MODEL] for name, evaluation in evaluations.items()}
    for evaluation in evaluations.values():
        scores |= {name: found for name, found in evaluation.scores.items() if name != MODEL}
    return scores


def _write_links(run: FinetuneRun, split: SplitTable, forecaster: Forecaster) -> None:
    """Average the graphs of test windows, write and draw them."""
    if not forecaster.mixes_variates:
        return
    borders, table = split.borders, run.config.table
    count = borders.window_count(table.prediction_length)
    sums = np.zeros((2, split.num_variates, split.num_variates))
    windows = 0
    for block in iterate_windows(
        split.scaled_LC,
        first_target=borders.validation_end,
        end=borders.test_end,
        context_length=context_rows(run),
        prediction_length=table.prediction_length,
        block_size=1,
        places_B=uniformly_spaced(count, _GRAPH_WINDOWS),
    ):
        graph = forecaster.graph(
            block.context_BCL[0],
            table.prediction_length,
            num_covariates=split.num_covariates,
            future_FQ=block.target_BCQ[0, split.num_variates - split.num_known_future :],
        )
        tables = (graph.edge_probability_BCC[0], graph.adjacency_BCC[0])
        sums += [found_CC.cpu().numpy() for found_CC in tables]
        windows += 1
    probability_CC, share_CC = sums / windows
    links = VariateLinks(
        variates=split.table.variates, edge_probability_CC=probability_CC, share_CC=share_CC
    )
    write_graph(Path(run.run) / GRAPH, links)
    (Path(run.run) / GRAPH_PICTURE).write_bytes(png(graph_picture(links)))


def _roles(run: FinetuneRun, split: SplitTable) -> dict[str, Any]:
    """Say which columns are what, for `tsmoe forecast` and `evaluate`."""
    variates = list(split.table.variates)
    return {
        "targets": variates[: split.num_targets],
        "covariates": variates[split.num_targets :],
        "known_future": variates[split.num_variates - split.num_known_future :],
        "context_length": run.config.table.context_length,
        "path": split.table.path,
        "fingerprint": split.fingerprint,
    }


def _card(
    run: FinetuneRun,
    start: Start | None,
    split: SplitTable,
    choice: Choice,
    scores: dict[str, ForecastScores],
) -> dict[str, Any]:
    tried = {"verdict": choice.verdict, "config": encode(run.config)}
    if choice.is_start and start is not None:
        of_file = ("format_version", "weights_sha256")
        card = {key: value for key, value in start.card.items() if key not in of_file}
        kept_after = [*card.get("kept_after", []), tried]
        # A start that was fine-tuned before goes on to know its own table.
        return {"table": _roles(run, split), **card, "kept_after": kept_after}
    model = choice.model
    return {
        "made_by": f"tsmoe {__version__}",
        "made_on": datetime.now(UTC).isoformat(timespec="seconds"),
        "architecture": model.config.type,
        "step": choice.step,
        "parameters": {"total": sum(p.numel() for p in model.parameters())},
        "context_length": model.config.context_length,
        "patch_length": model.config.patch_length,
        "table": _roles(run, split),
        "fine_tuning": {
            **tried,
            "share_of_learned": choice.share,
            "start": None if start is None else start.card,
        },
        "metrics": scores[FINE_TUNED].to_json_dict(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "licence": "Apache-2.0 (weights); the training data keep their own licences",
    }
