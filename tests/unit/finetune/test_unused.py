"""What of a start and of a table a run does not use is said."""

import numpy as np
import pandas as pd

from finetune_run import small_finetune
from tsmoe import ranks as ranks_module
from tsmoe.finetune.loop import finetune
from tsmoe.finetune.table import open_table


def test_layers_that_mixed_and_rows_beyond_the_context_are_named(folder, tmp_path, caplog) -> None:
    table, two = folder / "table.csv", {"training": {"steps": 2}}
    mixed = small_finetune(
        tmp_path / "mixed", table, two, {"mixing": {"num_channel_mixed_layers": 1}},
        {"optimizer": {"lr": 1e-2}, "stopping": {"mixes_with_start": False}},
        start=folder / "package",
    )  # fmt: skip
    finetune(mixed)
    assert "mix variates" not in caplog.text
    long = {"table": {"context_length": 100}}
    package = tmp_path / "mixed" / "package"
    finetune(small_finetune(tmp_path / "apart", table, two, long, start=package))
    ranks_module.stop()
    assert "in the start 1 layers mix variates, in this run 0; add mixing." in caplog.text
    assert "the model looks back 64 rows; of the 100 of table.context_length" in caplog.text


def test_targets_that_end_before_a_part_are_named(folder, tmp_path, caplog) -> None:
    table = pd.read_csv(folder / "table.csv")
    table.loc[300:, "a"] = np.nan
    table.to_csv(tmp_path / "table.csv", index=False)
    config = small_finetune(tmp_path / "run", tmp_path / "table.csv", start=folder / "package")
    open_table(config.table, context_length=64)
    for part in ("validation part (rows 350 to 400)", "test part (rows 400 to 500)"):
        assert f"a: no observed value in the {part}" in caplog.text
    assert "train part" not in caplog.text
