"""What stands in tensorboard: every tag of a run, what it tells, and the chart it belongs to.

`TAGS` is the one list of them. A test reads the event files of real runs back and holds them
against it, so a tag that is written and not listed, or listed and never written, is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tsmoe.run_folder import CONFIG_FILE

SETTINGS_TAG = "run/settings"
FORECASTS_TAG = "forecasts/held_out"

# What a placeholder of a tag stands for.
_PLACES = {"{layer}": r"\d{2,}", "{expert}": r"\d{3,}", "{source}": r".+"}


@dataclass(frozen=True, kw_only=True)
class Tag:
    """One tag, or one for each layer, expert or source."""

    name: str
    tells: str
    group: str = ""
    """Of the layout of custom scalars."""
    chart: str = ""
    """In that group; tags of one chart are drawn together. Empty: in no chart of the layout."""
    kind: Literal["scalars", "images", "text"] = "scalars"
    is_there: str = ""
    """In which runs; empty: in all."""

    @property
    def pattern(self) -> str:
        """Regular expression of the tag, as the charts of tensorboard take it."""
        found = re.escape(self.name)
        for place, expression in _PLACES.items():
            found = found.replace(re.escape(place), expression)
        return found


def _tags(group: str, *rows: tuple[str, str, str] | tuple[str, str, str, str]) -> Iterator[Tag]:
    for name, chart, tells, *is_there in rows:
        yield Tag(name=name, chart=chart, tells=tells, group=group, is_there="".join(is_there))


_MOE, _BEFORE = "with experts", "from the second step on"
_STREAM = "that stream"

TAGS: tuple[Tag, ...] = (
    *_tags(
        "Loss",
        ("loss/train", "train and validation", "mean over the points of the step"),
        ("loss/validation", "train and validation", "of held-out windows; fine-tuning: the error"),
        ("optimizer/grad_norm", "gradient norm", "before clipping"),
        ("optimizer/lr", "learning rate", "of the step"),
        ("loss/regulariser", "added to the loss", "such as what balances experts", "with one"),
    ),
    *_tags(
        "Speed",
        ("speed/points_per_second", "points a second", "recorded points forecast, all ranks"),
        ("speed/tokens_per_second", "tokens a second", "all ranks"),
        ("speed/flops_per_second", "FLOP a second", "as the model needs them", "where all learns"),
        ("speed/mfu", "share of the peak", "FLOP/s over what the machine can", "with known peak"),
        ("speed/step_seconds", "seconds", "of the step"),
        ("speed/validation_seconds", "seconds", "of the validation pass"),
        ("speed/straggler_spread_seconds", "seconds", "slowest less fastest rank", _BEFORE),
        ("speed/data_wait_share", "shares of a step", "the first rank waited for data"),
        ("speed/all_ranks_data_wait_share", "shares of a step", "mean over ranks", _BEFORE),
        ("speed/communication_share", "shares of a step", "waited for other ranks", _BEFORE),
        ("speed/all_to_all_share", "shares of a step", "of that in all-to-all", _BEFORE),
        ("speed/slowest_rank", "slowest rank", "its number", _BEFORE),
        ("speed/peak_memory_bytes", "memory of the fullest rank", "most so far", _BEFORE),
        ("speed/bytes_out", "bytes sent between ranks", "of all, a step", _BEFORE),
    ),
    *_tags(
        "Experts",
        ("experts/load_entropy/layer_{layer}", "evenness of the load", "1: even", _MOE),
        ("experts/live_experts/layer_{layer}", "live experts",
         "share with at least a quarter of the mean load", _MOE),
        ("experts/dead/layer_{layer}", "dead experts", "chosen by nobody for 100 steps",
         f"{_MOE}, from step 100 on"),
        ("experts/margin/layer_{layer}", "margin", "last chosen expert ahead of the next",
         f"{_MOE}, fewer chosen than there are"),
        ("load_share/layer_{layer}/expert_{expert}", "load share", "of the decisions", _MOE),
        ("load_bias/layer_{layer}/expert_{expert}", "load bias", "added for the choice", _MOE),
    ),
    *_tags(
        "Exchange",
        ("exchange/rows_moved/layer_{layer}", "rows moved", "to other ranks", f"{_MOE}, {_BEFORE}"),
        ("exchange/forward_seconds/layer_{layer}", "forward, s", "in all-to-all",
         f"{_MOE}, {_BEFORE}"),
        ("exchange/backward_seconds/layer_{layer}", "backward, s", "in all-to-all",
         f"{_MOE}, {_BEFORE}"),
    ),
    *_tags(
        "Data",
        ("data/points", "points a step", "recorded points forecast"),
        ("data/tokens", "tokens a step", "of a series"),
        ("sources/{source}", "sources", "share of the newest windows, the 64 largest",
         "on a corpus"),
        ("stream/epoch", "epoch of the stream", "that of the rank furthest behind", _STREAM),
        ("stream/series_used", "series of the stream", "since its beginning", _STREAM),
        ("stream/dropped", "series of the stream", "left out since its beginning", _STREAM),
    ),
    Tag(name="experts/load_by_layer", kind="images", is_there=_MOE,
        tells="a row a layer, a column an expert: black 0, brightest twice the mean and more"),
    Tag(name="experts/load_over_time/layer_{layer}", kind="images", is_there=_MOE,
        tells="a row an expert, the newest step on the right"),
    Tag(name=FORECASTS_TAG, kind="images", is_there="that forecast",
        tells="six held-out windows: past grey, truth blue, forecast orange"),
    Tag(name=f"{SETTINGS_TAG}/text_summary", kind="text", tells="config.yaml as of each start"),
)  # fmt: skip


def listed(name: str, kind: str) -> Tag | None:
    """Return the entry of the list that a tag as written belongs to, or None."""
    for tag in TAGS:
        if tag.kind == kind and re.fullmatch(tag.pattern, name):
            return tag
    return None


def layout(num_layers: int) -> dict[str, dict[str, list[str | list[str]]]]:
    """Lay custom scalars out: charts by group, those of single experts by layer.

    Returns:
        What `SummaryWriter.add_custom_scalars` takes.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for tag in TAGS:
        if not tag.chart:
            continue
        charts = groups.setdefault(tag.group, {})
        if "{expert}" not in tag.name:
            charts.setdefault(tag.chart, []).append(f"^{tag.pattern}$")
            continue
        for layer in range(num_layers):
            of_layer = tag.pattern.replace(_PLACES["{layer}"], f"{layer:02}", 1)
            charts.setdefault(f"{tag.chart}, layer {layer:02}", []).append(f"^{of_layer}$")
    return {
        group: {chart: ["Multiline", patterns] for chart, patterns in charts.items()}
        for group, charts in groups.items()
    }


def settings_text(run: Path) -> str | None:
    """Return the settings of a run as text for tensorboard, or None where there is no file."""
    path = run / CONFIG_FILE
    if not path.is_file():
        return None
    # Indented by four: a block of code in Markdown, whatever it holds.
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(f"    {line}" for line in lines)
