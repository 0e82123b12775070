import base64
import json
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.curation.pictures import MAX_BARS, course_drawing, domain_chart
from data_pipeline.curation.report import write_report
from data_pipeline.curation.summary import EXAMPLES_KEPT, EXAMPLES_PER_REASON, Count, summarise
from data_pipeline.curation.table import CURATION_TABLE, SCHEMA, SeriesTable
from data_pipeline.errors import DataError
from data_pipeline.record import Drop
from data_pipeline.shards.manifest import Manifest, ShardEntry, SourceEntry
from data_pipeline.steps.quality import QualityConfig, measure
from data_pipeline.storage.store import Store

NAN = np.nan
NASTY = "<script>alert('$1 & $2')</script>"


def manifest_of(num_series: int, **fields: object) -> Manifest:
    shard = ShardEntry(file="part-00000.arrow", rows=num_series, points=9, bytes=9, sha256="")
    settings: dict = {
        "fingerprint": "f" * 64,
        "train_fraction": 0.9,
        "shards": [shard],
        "sources": {},
        "drops": {},
        "config": {"clean": {"min_length": 32}},
        "config_hash": "",
        "inputs": [],
    }
    return Manifest(**(settings | fields))


@pytest.fixture
def write_table(tmp_path, make_record):
    """Write a table of (values, reason, fields of the record), and a manifest that fits it."""

    def write(rows, drops=()) -> Store:
        path = tmp_path / "corpus" / CURATION_TABLE
        path.parent.mkdir(parents=True, exist_ok=True)
        with SeriesTable(path) as table:
            for number, (values, reason, fields) in enumerate(rows):
                record = make_record(values, **({"item_id": f"s{number}"} | fields))
                measurements = measure(record.values, train_fraction=0.9, config=QualityConfig())
                table.add(record, measurements, reason)
            for drop in drops:
                table.add_drop(drop)
        store = Store.at(tmp_path / "corpus")
        manifest_of(sum(reason is None for _, reason, _ in rows)).write(store)
        return store

    return write


def table_of(store: Store) -> str:
    return str(store.local_path(CURATION_TABLE))


def noise(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=length).astype(np.float32)


def test_counts_by_source_reason_and_domain(write_table) -> None:
    store = write_table(
        [
            (noise(40), None, {"source": "b", "domain": "Web"}),
            (noise(60), None, {"source": "a", "domain": "Energy", "freq": "D"}),
            (noise(50), "spiky", {"source": "a", "domain": "Energy"}),
            (noise(70), "clipped", {"source": "a", "domain": "Nature"}),
            (noise(30), "spiky", {"source": "c", "domain": "Energy"}),
            (noise(10), None, {"source": "a", "domain": "Energy", "freq": None}),
        ],
        drops=[Drop(item_id="x", source="d", reason="not_numeric")],
    )
    summary = summarise(table_of(store))
    assert (summary.seen, summary.kept) == (
        Count(series=7, points=260),
        Count(series=3, points=110),
    )
    assert summary.reasons == {
        "clipped": Count(series=1, points=70),
        "not_numeric": Count(series=1, points=0),
        "spiky": Count(series=2, points=80),
    }
    a, b, c, d = summary.sources
    assert [source.source for source in summary.sources] == ["a", "b", "c", "d"]
    assert (a.seen, a.kept) == (Count(series=4, points=190), Count(series=2, points=70))
    assert a.drops == {
        "clipped": Count(series=1, points=70),
        "spiky": Count(series=1, points=50),
    }
    assert (sorted(a.domains), sorted(a.freqs)) == (["Energy", "Nature"], ["D", "h"])
    assert (b.kept, c.kept.series, c.missing_fraction, c.adf) == (b.seen, 0, None, None)
    assert (d.domains, d.freqs, d.seen) == ([], [], Count(series=1))
    assert list(summary.domains.items()) == [
        ("Energy", Count(series=2, points=70)),
        ("Web", Count(series=1, points=40)),
    ]


def test_means_of_a_source_are_weighted_by_length(write_table) -> None:
    holed = noise(600, 1)
    holed[:60] = NAN
    rows = [
        (noise(300), None, {}),
        (holed, None, {}),
        (np.tile([0.0, 1.0, 2.0, 3.0], 100), None, {}),  # has no ADF statistic
        (np.full(5000, 1.0), "constant", {}),  # dropped, so not of interest
    ]
    measured = [
        measure(np.asarray(v, np.float32), train_fraction=0.9, config=QualityConfig())
        for v, *_ in rows[:2]
    ]
    (source,) = summarise(table_of(write_table(rows))).sources
    weights = [300 / 900, 600 / 900]
    for name in ("adf", "forecastability"):
        expected = np.dot(weights, [getattr(m, name) for m in measured])
        assert getattr(source, name) == pytest.approx(expected, rel=1e-6)
    assert source.missing_fraction == pytest.approx(60 / 1300)


def test_forecastability_alone_is_averaged_too(write_table, tmp_path, make_record) -> None:
    off = QualityConfig(measures_stationarity=False)
    record = make_record(noise(300))
    measurements = measure(record.values, train_fraction=0.9, config=off)
    with SeriesTable(tmp_path / "t.parquet") as table:
        table.add(record, measurements, None)
    (source,) = summarise(tmp_path / "t.parquet").sources
    assert source.adf is None
    assert source.forecastability == pytest.approx(measurements.forecastability)


def test_histograms_count_every_series_once(write_table) -> None:
    rows = [(noise(length), None, {}) for length in (1, 40, 41, 5000)]
    summary = summarise(table_of(write_table([*rows, (noise(100), "spiky", {})])))
    lengths = summary.histograms["length"]
    assert (lengths.kept.sum(), lengths.dropped.sum()) == (4, 1)
    (place,) = np.flatnonzero(lengths.dropped)
    assert lengths.edges[place] <= 100 < lengths.edges[place + 1]
    assert summary.histograms["adf"].kept.sum() == 3  # one point has no statistic
    assert summary.histograms["missing_fraction"].kept[0] == 4


def test_what_lies_beyond_the_edges_counts_into_the_outer_bins(tmp_path) -> None:
    rows = [
        {"item_id": "a", "source": "s", "domain": "Web", "length": 1, "adf": adf}
        for adf in (-400.0, 30.0, 0.0)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "t.parquet")
    kept = summarise(tmp_path / "t.parquet").histograms["adf"].kept
    assert (kept[0], kept[-1], kept.sum()) == (1, 1, 3)


def test_examples_are_few_and_of_every_kind(write_table) -> None:
    rows = [(noise(40), None, {"source": "set0"}), (noise(40), "clipped", {"source": "set0"})]
    rows += [(noise(40), None, {"source": f"set{i}"}) for i in range(EXAMPLES_KEPT + 5)]
    rows += [(noise(40), "spiky", {"source": f"set{i}"}) for i in range(EXAMPLES_PER_REASON + 5)]
    summary = summarise(table_of(write_table(rows)))
    reasons = [example.reason for example in summary.examples]
    assert reasons == [None] * EXAMPLES_KEPT + ["clipped"] + ["spiky"] * EXAMPLES_PER_REASON
    # No data set has a second one while another has none.
    assert len({example.source for example in summary.examples[:EXAMPLES_KEPT]}) == EXAMPLES_KEPT
    np.testing.assert_array_equal(summary.examples[0].thumbnail, noise(40))


def test_few_data_sets_show_several_examples_each(write_table) -> None:
    rows = [(noise(40), None, {"source": "ba"[i % 2]}) for i in range(10)]
    examples = summarise(table_of(write_table(rows))).examples
    assert [(example.source, example.item_id) for example in examples] == [
        *(("a", "s1"), ("a", "s3"), ("a", "s5")),
        *(("b", "s0"), ("b", "s2"), ("b", "s4")),
    ]


class Page(HTMLParser):
    """What a browser would find: tags, images and text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self.images += [value for name, value in attrs if tag == "img" and name == "src"]

    def handle_data(self, data):
        self.text += data


def test_page_needs_nothing_beside_it_and_shows_all(write_table) -> None:
    rows = [(noise(400), None, {}), (noise(400), "spiky", {}), (noise(40), "too_short", {})]
    store = write_table(rows)
    report = write_report(store)
    content = store.read_bytes("curation/report.html").decode()
    page = Page(content)
    assert report.path == store.path_of("curation/report.html")
    assert len(page.images) == 5
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    for image in page.images:
        root = ElementTree.fromstring(base64.b64decode(image.partition(",")[2]))
        assert root.tag.endswith("svg")
    assert page.tags.count("svg") == 3
    assert "1 of 3 series stayed, with 400 of 840 points" in page.text
    assert re.search(r"spiky\s*1\s*33.33%\s*400\s*47.62%", page.text)
    assert "min_length 32" in page.text


def test_names_are_escaped_wherever_they_stand(write_table) -> None:
    fields = {"item_id": NASTY, "source": NASTY, "domain": NASTY, "freq": NASTY}
    store = write_table([(noise(400), None, fields), (noise(400), NASTY, fields)])
    sources = {NASTY: SourceEntry(series=1, points=400, licence=NASTY)}
    manifest_of(1, sources=sources, config={"clean": {NASTY: NASTY}}).write(store)
    write_report(store)
    page = Page(store.read_bytes("curation/report.html").decode())
    assert "script" not in page.tags
    assert page.text.count(NASTY) >= 12
    for image in page.images:
        root = ElementTree.fromstring(base64.b64decode(image.partition(",")[2]))
        assert not any("script" in element.tag for element in root.iter())


def test_same_table_gives_the_same_page(write_table, tmp_path) -> None:
    store = write_table([(noise(400), None, {}), (noise(400), "spiky", {})])
    pages = []
    for name in ("one", "two"):
        write_report(store, Store.at(tmp_path / name))
        pages.append((tmp_path / name / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_numbers_are_written_beside_the_page(write_table, tmp_path) -> None:
    store = write_table([(noise(400), None, {}), (noise(40), "spiky", {})])
    report = write_report(store, Store.at(tmp_path / "out"))
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    assert numbers == report.numbers
    assert numbers["kept"] == {"series": 1, "points": 400}
    assert numbers["reasons"] == {"spiky": {"series": 1, "points": 40}}
    assert numbers["sources"][0]["drops"] == numbers["reasons"]
    assert numbers["thresholds"] == {"min_length": 32}
    assert sum(numbers["histograms"]["length"]["kept"]) == 1


def test_table_that_is_missing_or_of_another_build_is_refused(write_table) -> None:
    store = write_table([(noise(400), None, {})])
    manifest_of(2).write(store)
    with pytest.raises(DataError, match=r"tells of 1 kept series, but the corpus has 2"):
        write_report(store)
    store.remove(CURATION_TABLE)
    with pytest.raises(DataError, match=r"series\.parquet: there is no such file"):
        write_report(store)


def test_table_is_read_from_a_remote_store(write_table) -> None:
    local = write_table([(noise(400), None, {})])
    remote = Store.at("memory://curation-report/corpus")
    for name in local.files():
        remote.put_file(name, local.local_path(name))
    report = write_report(remote)
    assert report.numbers["kept"]["series"] == 1
    assert remote.exists("curation/report.html")


def test_drawing_leaves_gaps_open() -> None:
    drawing = course_drawing(np.array([1, 2, NAN, 3, NAN, np.inf, 1, 2, 3], np.float32), "red")
    root = ElementTree.fromstring(drawing)
    lines = [element.attrib["points"].split() for element in root]
    assert [len(points) for points in lines] == [2, 2, 3]  # a single point is a short stroke
    heights = [float(point.split(",")[1]) for point in lines[2]]
    assert heights == sorted(heights, reverse=True)  # upwards, as SVG counts from the top
    for values in ([], [NAN, NAN], [5.0, 5.0]):
        ElementTree.fromstring(course_drawing(np.array(values, np.float32), "red"))


def test_many_domains_are_added_up() -> None:
    domains = {f"domain{i}": Count(series=1, points=100 - i) for i in range(MAX_BARS + 7)}
    image = base64.b64decode(domain_chart(domains).partition(",")[2]).decode()
    assert "7 more" in image
    assert f">domain{MAX_BARS - 1}<" in image
    assert f">domain{MAX_BARS}<" not in image


def test_quarter_of_a_million_series_is_summed_up_in_seconds(tmp_path) -> None:
    count = 250_000
    numbers = np.random.default_rng(0)
    columns = {
        "item_id": [f"series{i}" for i in range(count)],
        "source": np.char.add("set", (np.arange(count) % 500).astype(str)).tolist(),
        "domain": ["Web"] * count,
        "freq": ["h"] * count,
        "length": numbers.integers(1, 5000, count),
        "reason": [None if i % 10 else "spiky" for i in range(count)],
    }
    for name in SCHEMA.names:
        if SCHEMA.field(name).type == pa.float32():
            columns[name] = numbers.random(count).astype(np.float32)
        columns.setdefault(name, [None] * count)
    pq.write_table(pa.table(columns, schema=SCHEMA), tmp_path / "t.parquet")
    del columns
    start = time.perf_counter()
    summary = summarise(tmp_path / "t.parquet")
    assert time.perf_counter() - start < 5.0  # takes 0.3 s
    assert (summary.seen.series, summary.reasons["spiky"].series) == (count, count // 10)
    assert len(summary.sources) == 500
