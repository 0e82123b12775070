"""Lay a run's report out as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from tsmoe.report.history import RunHistory

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }
table { border-collapse: collapse; }
th, td { padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
.grid { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; }
img { max-width: 100%; }
pre { background: #f7f7f7; padding: 1em; overflow-x: auto; }
"""
_NOT_FINITE_SHOWN = 64
_SECTIONS = (
    ("Loss", ("loss", "schedule")),
    ("Speed", ("throughput", "shares")),
    ("Experts", ("load_over_time", "layers_over_time", "exchange")),
    ("Ranks", ("stragglers",)),
    ("Data", ("sources",)),
    ("Variates", ("graph",)),
    ("Starts", ()),
    ("Checkpoints", ()),
)


def page(history: RunHistory, summary: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Lay the report out; every name from the run is escaped.

    Args:
        history: of the run.
        summary: its numbers, as `summarise` gives them.
        pictures: PNG files by name.
    """
    tables = {
        "Loss": _loss_table(summary) + _not_finite_table(summary["not_finite"]),
        "Speed": _speed_table(summary),
        "Experts": _expert_table(summary["experts"]),
        "Ranks": _rank_table(summary["stragglers"]),
        "Data": _data_table(summary),
        "Variates": "",
        "Starts": _end_table(summary["ends"]),
        "Checkpoints": _checkpoint_table(summary["checkpoints"]),
    }
    parts = [f"<h1>Run {escape(history.path.name)}</h1>", f"<p>{escape(headline(summary))}</p>"]
    if summary["verdict"]:
        parts.append(f"<p>{escape(summary['verdict'])}</p>")
    for title, names in _SECTIONS:
        shown = [_image(name, pictures[name]) for name in names if name in pictures]
        if shown or tables[title]:
            parts += [
                f"<h2>{title}</h2>",
                tables[title],
                *([f'<div class="grid">{"".join(shown)}</div>'] if shown else []),
            ]
    if summary["missing"]:
        items = "".join(f"<li>{escape(text)}</li>" for text in summary["missing"])
        parts.append(f"<h2>Missing</h2><ul>{items}</ul>")
    if history.config:
        settings = yaml.safe_dump(dict(history.config), sort_keys=False)
        parts.append(f"<h2>Settings</h2><pre>{escape(settings)}</pre>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f"<title>Run {escape(history.path.name)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def headline(summary: Mapping[str, Any]) -> str:
    """Say in one line how the run stands."""
    steps, loss, speed = summary["steps"], summary["loss"], summary["speed"]
    planned = f" of {steps['planned']:,}" if steps["planned"] else ""
    parts = [f"{summary['state']}: step {steps['done']:,}{planned}"]
    last = loss["mean_of_last"]
    parts.append(f"loss {number(last['loss'], '.4f')} (mean of the last {last['steps']})")
    if loss["best_validation"]:
        best = loss["best_validation"]
        parts.append(f"best validation {number(best['loss'], '.4f')} after step {best['step']:,}")
    parts.append(f"{number(speed['median_points_per_second'], ',.0f')} points/s")
    if speed["median_mfu"] is not None:
        parts.append(f"MFU {speed['median_mfu']:.1%}")
    return ", ".join(parts)


def number(value: float | None, form: str) -> str:
    """Write a number, or a dash for one that is not known."""
    return "-" if value is None else format(value, form)


def _loss_table(summary: Mapping[str, Any]) -> str:
    loss = summary["loss"]
    best = loss["best_validation"] or {"loss": None, "step": None}
    return _table(
        ("first", "mean of the last", "best validation", "after step", "last validation"),
        [(number(loss["first"], ".4f"), number(loss["mean_of_last"]["loss"], ".4f"),
          number(best["loss"], ".4f"), number(best["step"], ",d"),
          number(loss["last_validation"], ".4f"))],
    )  # fmt: skip


def _not_finite_table(events: Sequence[Mapping[str, Any]]) -> str:
    if not events:
        return ""
    rows = []
    for event in events[-_NOT_FINITE_SHOWN:]:
        first, stop = event["windows"]
        action = event["action"].replace("_", " ")
        if event["to"] is not None:
            action += f" to step {event['to']:,}"
        rows.append((f"{event['step']:,}", event["what"], action, f"{first:,} to {stop - 1:,}",
                     ", ".join(event["series"]) or "-"))  # fmt: skip
    left_out = len(events) - len(rows)
    note = f" The first {left_out:,} are left out." if left_out else ""
    return (f"<p>Not finite, and not learned from: {len(events):,} step(s).{note}</p>") + _table(
        ("step", "what", "then", "windows", "series"), rows
    )


def _speed_table(summary: Mapping[str, Any]) -> str:
    speed = summary["speed"]
    rows = [
        ("step", number(speed["median_step_seconds"], ".4f") + " s"),
        ("points/s", number(speed["median_points_per_second"], ",.0f")),
        ("tokens/s", number(speed["median_tokens_per_second"], ",.0f")),
        ("model GFLOP/s", _scaled(speed["median_flops_per_second"], 1e9)),
        ("MFU", number(speed["median_mfu"], ".2%")),
        ("waited for other ranks", number(speed["median_communication_share"], ".1%")),
        ("of that in all-to-all", number(speed["median_all_to_all_share"], ".1%")),
        ("waited for data", number(speed["median_data_wait_share"], ".1%")),
        ("sent between ranks, MiB a step", _scaled(speed["median_bytes_out"], 2**20)),
        ("peak memory of a rank, MiB", _scaled(speed["peak_memory_bytes"], 2**20)),
    ]
    starts = "".join(
        f"<li>step {start['step']:,}: {escape(_start_text(start))}</li>"
        for start in summary["starts"]
    )
    return _table(("median over steps", ""), rows) + (f"<ul>{starts}</ul>" if starts else "")


def _start_text(start: Mapping[str, Any]) -> str:
    text = f"started on {start['ranks']} rank(s)"
    if start["peak_flops"] is None:
        return f"{text}; peak not known ({start['peak_is']})"
    return f"{text}; peak {start['peak_flops'] / 1e9:,.0f} GFLOP/s ({start['peak_is']})"


def _expert_table(experts: Mapping[str, Any] | None) -> str:
    if experts is None:
        return ""
    rows = []
    for layer in experts["layers"]:
        dead = layer["dead_experts"]
        rows.append((
            str(layer["layer"]), number(layer["load_entropy"], ".3f"),
            number(layer["live_experts"], ".0%"),
            "-" if dead is None else ", ".join(map(str, dead)) or "none",
            f"{layer['busiest_times_mean']:.2f}", f"{layer['idlest_times_mean']:.2f}",
            number(layer["margin"], ".4f"), number(layer["rows_moved"], ",.0f"),
            _scaled(layer["forward_seconds"], 1e-3), _scaled(layer["backward_seconds"], 1e-3),
        ))  # fmt: skip
    after = experts["dead_after_steps"]
    header = (
        "layer", "entropy", "live", f"dead ({number(after, 'd')} steps without a decision)",
        "busiest / mean", "idlest / mean", "margin", "tokens moved",
        "all-to-all forward, ms", "backward, ms",
    )  # fmt: skip
    return f"<p>Means over the {experts['newest_steps_recorded']} newest tables.</p>" + _table(
        header, rows
    )


def _rank_table(stragglers: Mapping[str, Any] | None) -> str:
    if stragglers is None:
        return ""
    # Many ranks: those that were slowest most often.
    ranks = sorted(stragglers["ranks"], key=lambda r: -(r["slowest_share_of_steps"] or 0.0))[:32]
    rows = [
        (str(rank["rank"]), number(rank["slowest_share_of_steps"], ".1%"),
         _scaled(rank["mean_compute_seconds"], 1e-3), _scaled(rank["mean_data_wait_seconds"], 1e-3),
         _scaled(rank["peak_memory_bytes"], 2**20))
        for rank in ranks
    ]  # fmt: skip
    spread = _scaled(stragglers["median_spread_seconds"], 1e-3)
    extreme = _scaled(stragglers["spread_seconds_of_95_percent"], 1e-3)
    return (
        f"<p>Slowest less fastest rank: {spread} ms in the median step, {extreme} ms or less in "
        f"95 % of them.</p>"
    ) + _table(("rank", "slowest in", "compute, ms", "wait for data, ms", "peak memory, MiB"), rows)


def _data_table(summary: Mapping[str, Any]) -> str:
    found = ""
    if summary["sources"]:
        shares = sorted(summary["sources"].items(), key=lambda pair: -pair[1])
        rows = [(name, f"{share:.2%}") for name, share in shares[:64]]
        found += _table(("source", "share of the newest windows"), rows)
    if summary["stream"]:
        rows = [(str(key), str(value)) for key, value in summary["stream"].items()]
        found += _table(("stream", ""), rows)
    if lost := summary["lost_shards"]:
        bad = [
            (str(shard.get("file", "-")), number(shard.get("points"), ",d"),
             number(shard.get("step"), ",d"), str(shard.get("reason", "-")))
            for shard in lost
        ]  # fmt: skip
        found += f"<p>Goes on without {len(lost):,} bad shard(s) of its corpus.</p>"
        found += _table(("shard", "points", "from step", "reason"), bad)
    return found


def _end_table(ends: Sequence[Mapping[str, Any]]) -> str:
    if not ends:
        return ""
    rows = [
        (_clock(end["time"]), str(end["restart"]), end["job"] or "-",
         ", ".join(end["nodes"]) or "-",
         f"{end['step_before']:,}", f"{end['step']:,}",
         f"{end['outcome']} ({number(end['exit_code'], 'd')})",
         end["decision"].replace("_", " "), end["reason"])
        for end in ends
    ]  # fmt: skip
    restarts = sum(end["decision"] == "restart" for end in ends)
    header = ("ended (UTC)", "start", "job", "nodes", "from step", "to step", "outcome (exit code)",
              "then", "reason")  # fmt: skip
    return f"<p>Restarted {restarts} time(s) by the launcher.</p>" + _table(header, rows)


def _checkpoint_table(checkpoints: Sequence[Mapping[str, Any]]) -> str:
    if not checkpoints:
        return ""
    rows = [
        (f"{kept['step']:,}", _clock(kept["saved"]), _scaled(kept["size_bytes"], 2**20),
         kept["damage"] or "yes")
        for kept in checkpoints
    ]  # fmt: skip
    return _table(("step", "saved (UTC)", "MiB", "whole (by sizes)"), rows)


def _clock(time: str | None) -> str:
    return "-" if time is None else time[:19].replace("T", " ")


def _scaled(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:,.2f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    return f"<div class='wide'>{table}</div>"


def _image(name: str, content: bytes) -> str:
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return f'<img src="{url}" alt="{escape(name.replace("_", " "))}">'
