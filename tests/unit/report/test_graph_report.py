"""The graph of variates as a file and as a picture."""

import numpy as np
import pytest

from tsmoe.errors import DataError
from tsmoe.report.graph import VariateLinks, graph_picture, read_graph, write_graph


def links_of(count: int) -> VariateLinks:
    generator = np.random.default_rng(0)
    tables = generator.random((2, count, count)).round(6)
    tables[:, range(count), range(count)] = 1
    names = ("a,b", 'said "c"', "$x$", *(f"v{place}" for place in range(count)))[:count]
    return VariateLinks(variates=names, edge_probability_CC=tables[0], share_CC=tables[1])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_file_gives_back_what_was_written(tmp_path, count) -> None:
    links = links_of(count)
    write_graph(tmp_path / "graph.csv", links)
    found = read_graph(tmp_path / "graph.csv")
    assert found is not None
    assert found.variates == links.variates
    np.testing.assert_array_equal(found.edge_probability_CC, links.edge_probability_CC)
    np.testing.assert_array_equal(found.share_CC, links.share_CC)


def test_no_file_is_no_graph(tmp_path) -> None:
    assert read_graph(tmp_path / "graph.csv") is None


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "variate,looks_at\nx,y,z,w\n", "\x00"])
def test_altered_file_is_refused(tmp_path, text) -> None:
    (tmp_path / "graph.csv").write_text(text)
    with pytest.raises(DataError, match=r"graph\.csv: is no graph"):
        read_graph(tmp_path / "graph.csv")


def test_arrows_are_the_edges_and_lead_to_the_one_that_looks() -> None:
    share_CC = np.eye(3)
    share_CC[0, 2] = 0.8
    share_CC[1, 0] = 0.01  # of too few windows
    links = VariateLinks(variates=("x", "y", "z"), edge_probability_CC=share_CC, share_CC=share_CC)
    _, network = graph_picture(links).axes[:2]
    arrows = [text for text in network.texts if text.get_text() == ""]
    assert len(arrows) == 1
    places = {
        text.get_text(): np.array(text.get_position()) for text in network.texts if text.get_text()
    }
    assert np.allclose(1.1 * np.array(arrows[0].xy), places["x"])
    assert np.allclose(1.1 * np.array(arrows[0].xyann), places["z"])


def test_of_many_variates_those_with_most_edges_are_drawn() -> None:
    links = links_of(60)
    links.edge_probability_CC[7] = 1
    figure = graph_picture(links)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(labels) == 40
    assert links.variates[7] in labels
    assert "40 of 60" in figure.get_suptitle()
