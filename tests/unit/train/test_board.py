"""The list of tags: each can be told from the others, and the layout has a chart for it."""

import re
from itertools import combinations

from tsmoe.train.board import TAGS, layout, listed

EXAMPLES = [(tag, tag.name.format(layer="07", expert="123", source="a/b.c (d)")) for tag in TAGS]


def test_written_tag_is_found_in_the_list_by_name_and_kind() -> None:
    for tag, name in EXAMPLES:
        assert listed(name, tag.kind) is tag
        assert listed(f"{name}x", tag.kind) in (None, listed("sources/x", "scalars"))
    assert listed("loss/train", "images") is None
    assert listed("loss/other", "scalars") is None


def test_no_two_entries_share_a_name() -> None:
    assert all(first.name != second.name for first, second in combinations(TAGS, 2))


def test_every_scalar_is_in_one_chart_of_the_layout() -> None:
    charts = {
        f"{group}: {chart}": patterns
        for group, of_group in layout(9).items()
        for chart, (_, patterns) in of_group.items()
    }
    for tag, name in EXAMPLES:
        places = [c for c, patterns in charts.items() if any(re.search(p, name) for p in patterns)]
        assert len(places) == (tag.kind == "scalars"), name
    assert charts["Loss: train and validation"] == [r"^loss/train$", r"^loss/validation$"]
    assert charts["Experts: load share, layer 07"] == [r"^load_share/layer_07/expert_\d{3,}$"]
    assert "Experts: load share, layer 09" not in charts


def test_dense_model_has_no_charts_of_single_experts() -> None:
    assert not any("layer" in chart for chart in layout(0)["Experts"])
