import numpy as np
import pytest

from data_pipeline.shards import Corpus
from tsmoe.data.loader import DataConfig
from tsmoe.data.mixing import CurriculumPhase, Mixture, source_quotas
from tsmoe.data.order import DECK_SIZE
from tsmoe.data.windows import training_windows
from tsmoe.errors import ConfigError

LENGTHS = {"big": [400] * 4, "mid": [200] * 2, "small": [100], "none": [2]}
DOMAINS = {"big": "Energy", "mid": "Energy", "small": "Nature", "none": "Web"}


@pytest.fixture
def corpus(make_corpus) -> Corpus:
    return make_corpus(LENGTHS, domains=DOMAINS)


def shares(corpus: Corpus, **settings: object) -> dict[str, float]:
    index = training_windows(corpus, window_length=24, patch_length=4, stride=1)
    quotas = source_quotas(Mixture(**settings), corpus, index)
    assert quotas.sum() == DECK_SIZE
    return dict(zip(corpus.sources, (quotas / DECK_SIZE).tolist(), strict=True))


def assert_shares(found: dict[str, float], expected: dict[str, float]) -> None:
    # A deck has whole windows: up to one more or less for each source.
    assert found == pytest.approx({"none": 0.0} | expected, abs=2 / DECK_SIZE)


def test_weights_multiply_shares_and_the_others_keep_theirs(corpus) -> None:
    # Points before the split: 1200, 300, 75.
    plain = {"big": 1200 / 1575, "mid": 300 / 1575, "small": 75 / 1575}
    assert_shares(shares(corpus, source_temperature=1.0), plain)
    doubled = shares(corpus, source_temperature=1.0, source_weights={"small": 2.0})
    assert_shares(doubled, {"big": 1200 / 1650, "mid": 300 / 1650, "small": 150 / 1650})


def test_with_temperature_0_weights_are_the_proportions(corpus) -> None:
    weights = {"big": 1.0, "mid": 2.0, "small": 5.0}
    found = shares(corpus, source_temperature=0.0, source_weights=weights)
    assert_shares(found, {name: weight / 8 for name, weight in weights.items()})


def test_weight_0_leaves_a_source_out(corpus) -> None:
    found = shares(corpus, source_temperature=0.0, source_weights={"big": 0.0})
    assert_shares(found, {"big": 0.0, "mid": 0.5, "small": 0.5})


def test_capped_domain_has_its_cap_and_the_others_the_rest(corpus) -> None:
    found = shares(corpus, source_temperature=1.0, domain_caps={"Energy": 0.6})
    # Within a domain the sources keep their proportions.
    assert_shares(found, {"big": 0.48, "mid": 0.12, "small": 0.4})


def test_cap_that_others_rise_above_is_filled_too(make_corpus) -> None:
    corpus = make_corpus(
        {"a": [1000], "b": [300], "c": [200]}, domains={"a": "A", "b": "B", "c": "C"}
    )
    found = shares(corpus, source_temperature=1.0, domain_caps={"A": 0.4, "B": 0.3})
    # A cut to 0.4 would leave B 0.36 of the windows.
    assert found == pytest.approx({"a": 0.4, "b": 0.3, "c": 0.3}, abs=2 / DECK_SIZE)


def test_cap_above_the_share_changes_nothing(corpus) -> None:
    plain = shares(corpus, source_temperature=1.0)
    assert_shares(shares(corpus, source_temperature=1.0, domain_caps={"Nature": 0.9}), plain)


def test_impossible_caps_are_refused_with_their_numbers(corpus) -> None:
    with pytest.raises(
        ConfigError, match=r"0\.7 of the windows.*Energy 0\.5, Nature 0\.2.*by 0\.3"
    ):
        shares(corpus, domain_caps={"Energy": 0.5, "Nature": 0.2})


def test_cap_below_one_window_for_each_source_is_refused(make_corpus) -> None:
    names = [f"s{number}" for number in range(40)]
    corpus = make_corpus(
        {name: [60] for name in [*names, "other"]}, domains=dict.fromkeys(names, "A")
    )
    with pytest.raises(ConfigError, match=r"domain_caps\.A \(0\.0005\).*40 sources.*33 windows"):
        shares(corpus, domain_caps={"A": 0.0005})


def test_capped_domain_of_a_mixed_source_is_refused(make_corpus, monkeypatch) -> None:
    corpus = make_corpus({"a": [100, 100], "b": [100]}, domains={"a": "A", "b": "B"})
    monkeypatch.setattr(corpus, "domain_ids", np.array([0, 1, 1], np.int32))
    with pytest.raises(ConfigError, match=r"domain_caps\.B: source 'a' .*A, B"):
        shares(corpus, domain_caps={"B": 0.5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_weights": {"bgi": 1.0}}, r"source_weights\.bgi: .* did you mean big\?"),
        ({"source_weights": {"xyz": 1.0}}, r"source_weights\.xyz: .*there are big, mid, none"),
        ({"domain_caps": {"energy": 1.0}}, r"domain_caps\.energy: .*Energy"),
        ({"source_weights": {"big": 0, "mid": 0, "small": 0}}, "no source.*big, mid, small"),
    ],
)
def test_names_that_the_corpus_has_not_are_refused(corpus, settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shares(corpus, **settings)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Mixture(source_weights={"a": -1.0}), r"source_weights\.a \(-1\.0\)"),
        (lambda: Mixture(domain_caps={"A": 1.5}), r"domain_caps\.A \(1\.5\)"),
        (lambda: CurriculumPhase(from_step=0), r"from_step \(0\)"),
        (lambda: CurriculumPhase(from_step=1, source_temperature=2.0), r"temperature \(2\.0\)"),
        (
            lambda: DataConfig(
                curriculum=(CurriculumPhase(from_step=5), CurriculumPhase(from_step=5))
            ),
            "from_step 5 follows one from_step 5",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(build, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build()


def test_phase_changes_what_it_names_and_keeps_the_rest() -> None:
    start = DataConfig(source_temperature=0.25, source_weights={"a": 2.0}, domain_caps={"A": 0.5})
    phase = CurriculumPhase(from_step=7, source_weights={})
    assert phase.over(start) == Mixture(source_temperature=0.25, domain_caps={"A": 0.5})
