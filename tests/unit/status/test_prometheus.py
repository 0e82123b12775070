"""The text file for Prometheus, read back by Prometheus' own parser."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from status_run import NOW, write_checkpoint, write_ends
from tsmoe.__main__ import main
from tsmoe.status import look_at
from tsmoe.status.prometheus import prometheus_text

MakeRun = Callable[..., Path]


def samples(text: str) -> dict[tuple[str, str], float]:
    """Values by name and run; of health by state in the place of the name."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in ("gauge", "counter")
        for sample in family.samples:
            key = (sample.labels.get("state", sample.name), sample.labels["run"])
            assert key not in found, "twice"
            found[key] = sample.value
    return found


def test_values_are_those_of_the_status(make_run: MakeRun) -> None:
    first, second = make_run('a "quoted"\\n'), make_run("b", lines=[])
    write_checkpoint(first, 20, age=300)
    write_ends(first, {}, {})
    statuses = [look_at(run, now=NOW) for run in (first, second, first)]
    found = samples(prometheus_text(statuses))
    of_first = {name: value for (name, run), value in found.items() if run == str(first)}
    assert of_first["tsmoe_step"] == 30
    assert of_first["tsmoe_loss"] == pytest.approx(10 / 30)
    assert of_first["tsmoe_eta_seconds"] == pytest.approx(175)
    assert of_first["tsmoe_restarts_total"] == 2
    assert of_first["tsmoe_checkpoint_timestamp_seconds"] == NOW - 300
    assert of_first["tsmoe_checkpoint_whole"] == 1
    assert (of_first["running"], of_first["stalled"]) == (1, 0)
    assert all(map(math.isfinite, found.values()))
    # What is not known has no line.
    assert ("tsmoe_loss", str(second)) not in found
    assert found["tsmoe_step", str(second)] == 0


def test_file_is_replaced_at_once_and_alone(make_run: MakeRun, tmp_path: Path, capsys) -> None:
    run, folder = make_run(), tmp_path / "collector"
    folder.mkdir()
    target = folder / "tsmoe.prom"
    target.write_text("of before")
    (folder / "as_it_was").hardlink_to(target)
    assert main(["status", str(run), "--prometheus", str(target)]) == 0
    assert samples(target.read_text())["tsmoe_step", str(run)] == 30
    assert (folder / "as_it_was").read_text() == "of before"
    assert {path.name for path in folder.iterdir()} == {"tsmoe.prom", "as_it_was"}
    # The collector may run as another user.
    assert target.stat().st_mode & 0o444 == 0o444


def test_folder_that_is_not_there_exits_with_2(make_run: MakeRun, tmp_path: Path, capsys) -> None:
    target = tmp_path / "none" / "tsmoe.prom"
    assert main(["status", str(make_run()), "--prometheus", str(target)]) == 2
    assert f"--prometheus {target}" in capsys.readouterr().err
