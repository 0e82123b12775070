"""Which weights are handed over: learned, mixed with the start's, or the start's."""

import math
from pathlib import Path

import pytest
import torch

from finetune_run import small_finetune, write_package, write_table
from tsmoe.checkpoint.layout import step_folder
from tsmoe.checkpoint.package import model_from_checkpoint
from tsmoe.checkpoint.resume import open_checkpoint
from tsmoe.errors import TrainingError
from tsmoe.finetune.choice import choose
from tsmoe.finetune.guard import Guard
from tsmoe.finetune.loop import finetune
from tsmoe.finetune.start import open_start, resolve_run


@pytest.fixture(scope="module", name="done")
def finished_run(tmp_path_factory):
    """A run of two validations, its start, and the weights after its last step."""
    folder = tmp_path_factory.mktemp("choice")
    write_table(folder / "table.csv")
    write_package(folder / "package")
    config = small_finetune(
        folder / "run", folder / "table.csv", {"training": {"steps": 2}}, start=folder / "package"
    )
    finetune(config)
    start = open_start(config.start)
    learned = model_from_checkpoint(*open_checkpoint(folder / "run/checkpoints" / step_folder(2)))
    return resolve_run(config, start), start, dict(learned.named_parameters())


def share_of(model, start, learned) -> float:
    """Where on the way from the start to the learned weights a model lies."""
    name = "embed.values.weight"
    way = learned[name].detach() - start.state[name]
    step = model.get_parameter(name).detach() - start.state[name]
    return float((step * way).sum() / way.square().sum())


def guard_of(start: float, learned: float) -> Guard:
    guard = Guard(patience=3)
    guard.set_start(start)
    guard.add(0, start)
    guard.add(2, learned)
    return guard


@pytest.mark.parametrize(
    ("by_share", "learned_error", "expected"),
    [
        ({0.25: 0.9, 0.5: 0.8, 0.75: 0.7}, 0.6, 1.0),
        ({0.25: 0.9, 0.5: 0.6, 0.75: 0.7}, 0.8, 0.5),
        ({0.25: 0.9, 0.5: 0.7, 0.75: 0.7}, 0.8, 0.5),
        ({0.25: 0.9, 0.5: 0.72, 0.75: 0.7}, 0.701, 0.75),
        ({0.25: math.nan, 0.5: math.inf, 0.75: math.nan}, 0.9, 1.0),
    ],
)
def test_share_that_validates_best_is_taken(done, by_share, learned_error, expected) -> None:
    run, start, learned = done

    def validate(model) -> float:
        return by_share[round(share_of(model, start, learned), 3)]

    choice = choose(run, start, guard_of(1.0, learned_error), validate, failure=None)
    assert (choice.is_start, choice.step, choice.share) == (False, 2, expected)
    for name, parameter in choice.model.named_parameters():
        whole = torch.lerp(start.state[name], learned[name], expected)
        torch.testing.assert_close(parameter, whole, msg=name)
    assert (f"{expected:.0%} of the way" in choice.verdict) == (expected < 1)


def test_of_a_new_shortcut_the_share_is_taken_too(done, tmp_path: Path) -> None:
    _, start, _ = done
    config = small_finetune(
        tmp_path / "run",
        Path(done[0].config.table.path),
        {"training": {"steps": 2}, "linear_shortcut": "learned"},
        start=Path(done[0].config.start),
    )
    finetune(config)
    folder = tmp_path / "run/checkpoints" / step_folder(2)
    learned = model_from_checkpoint(*open_checkpoint(folder)).shortcut.project.weight.detach()
    assert learned.abs().max() > 0

    def validate(model) -> float:
        return abs(float(model.shortcut.project.weight.detach().norm() / learned.norm()) - 0.5)

    run = resolve_run(config, start)
    choice = choose(run, start, guard_of(1.0, 0.5), validate, failure=None)
    assert choice.share == 0.5
    torch.testing.assert_close(choice.model.shortcut.project.weight, 0.5 * learned)


def test_mixture_may_be_better_where_what_was_learned_is_worse(done) -> None:
    run, start, _ = done
    guard = guard_of(1.0, 1.5)
    guard.errors.pop(0)
    choice = choose(run, start, guard, lambda _: 0.9, failure=None)
    assert (choice.is_start, choice.share) == (False, 0.25)


def test_start_is_kept_whole_where_nothing_is_better(done) -> None:
    run, start, _ = done
    choice = choose(run, start, guard_of(1.0, 1.5), lambda _: 1.0, failure="it broke")
    assert choice.is_start
    assert "holds the start as it was" in choice.verdict
    assert choice.verdict.endswith("training broke off: it broke")
    for name, parameter in choice.model.named_parameters():
        assert torch.equal(parameter, start.state[name])


def test_nothing_is_mixed_where_it_is_not_wanted(done, tmp_path: Path) -> None:
    run, start, learned = done
    unmixed = small_finetune(
        Path(run.run), Path(run.config.table.path), {"stopping": {"mixes_with_start": False}},
        start=Path(run.config.start),
    )  # fmt: skip

    def never(_) -> float:
        raise AssertionError

    choice = choose(resolve_run(unmixed, start), start, guard_of(1.0, 0.5), never, failure=None)
    assert choice.share == 1
    for name, parameter in choice.model.named_parameters():
        assert torch.equal(parameter, learned[name])


@pytest.mark.parametrize("errors", [{0: 1.0}, {0: 1.0, 2: 1.1}, {0: 1.0, 2: math.inf}])
def test_from_scratch_nothing_better_than_chance_is_an_error(done, errors) -> None:
    run, _, _ = done
    guard = Guard(patience=3, errors=dict(errors))
    with pytest.raises(TrainingError, match=r"lower optimizer\.lr"):
        choose(run, None, guard, lambda _: 0.0, failure=None)
