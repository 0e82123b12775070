"""What of a start and of a table a run does not use is said."""

from finetune_run import small_finetune
from tsmoe import ranks as ranks_module
from tsmoe.finetune.loop import finetune


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
