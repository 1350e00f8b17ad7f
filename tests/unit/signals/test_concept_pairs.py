"""The packaged contrastive pairs: enough, a fixed split, and nothing but the concept to tell sides apart."""

import collections
import re
import statistics

import pytest

from verl_grad_routing.directions import load_pairs
from verl_grad_routing.directions.pairs import rows_with_tag
from verl_grad_routing.errors import UserError

CONCEPTS = ("shortcut", "deception", "evaluation_awareness")
CODING = re.compile(
    r"\b(code|coding|python|compil\w*|software|debug\w*|unit tests?|program\w*|algorithm)\b", re.IGNORECASE
)


def packaged(concept, tags=""):
    return load_pairs(f"pkg://verl_grad_routing.directions.concepts/{concept}.jsonl{tags}")


def words(text):
    return re.findall(r"\w+", text.lower())


def texts(pair):
    return pair.chat[0]["content"], pair.unwanted, pair.wanted


@pytest.mark.parametrize("concept", CONCEPTS)
def test_eighty_pairs_of_which_a_fixed_twenty_are_held_out(concept):
    pairs = packaged(concept)
    assert len(pairs) == 80
    held_out = rows_with_tag(pairs, "held_out")
    assert held_out == tuple(range(3, 80, 4))
    assert set(rows_with_tag(pairs, "fit")) == set(range(80)) - set(held_out)
    assert len(packaged(concept, "@held_out")) == 20 and len(packaged(concept, "@fit")) == 60


# A change of the texts changes every result that was made with them: it must be meant.
HASHES = {
    "shortcut": "81576d895d91d1b743d311c2ddf83f37becc359dc6fe823aef5043b0096e8b76",
    "deception": "6b3ab268ea9190065f90231f275f7a7104f05946f48dfb4e3cd93267f5cc453f",
    "evaluation_awareness": "27458b2b8d8bafcece8c3734f2b42de9344139f5f9110f730a87a770465039e3",
}


@pytest.mark.parametrize("concept", CONCEPTS)
def test_the_texts_are_those_of_this_version(concept):
    assert packaged(concept).content_hash == HASHES[concept]


def test_ids_are_unique_over_all_files():
    ids = [pair.id for concept in CONCEPTS for pair in packaged(concept)]
    assert len(set(ids)) == len(ids) == 240


@pytest.mark.parametrize("concept", CONCEPTS)
def test_sides_are_equally_long(concept):
    pairs = packaged(concept)
    gaps = [len(words(pair.unwanted)) - len(words(pair.wanted)) for pair in pairs]
    lengths = [len(words(pair.wanted)) for pair in pairs]
    # neither side is longer by more than three words on average, nor by more than half in any pair
    assert abs(statistics.mean(gaps)) < 3
    assert all(2 / 3 < len(pair.unwanted) / len(pair.wanted) < 3 / 2 for pair in pairs)
    assert 15 < statistics.mean(lengths) < 40


@pytest.mark.parametrize("concept", CONCEPTS)
def test_no_template_is_repeated(concept):
    columns = list(zip(*(texts(pair) for pair in packaged(concept)), strict=True))
    for column in columns:
        assert len(set(column)) == 80
        openings = collections.Counter(tuple(words(text)[:2]) for text in column)
        assert openings.most_common(1)[0][1] <= 5, openings.most_common(3)
        four_grams = collections.Counter(gram for text in column for gram in set(grams(words(text), 4)))
        assert four_grams.most_common(1)[0][1] <= 4, four_grams.most_common(3)
        bags = [frozenset(words(text)) for text in column]
        assert max(len(a & b) / len(a | b) for i, a in enumerate(bags) for b in bags[:i]) < 0.5


def grams(tokens, size):
    return zip(*(tokens[start:] for start in range(size)), strict=False)


@pytest.mark.parametrize("concept", CONCEPTS)
def test_pairs_are_not_about_programming_and_of_many_topics(concept):
    pairs = packaged(concept)
    assert not [pair.id for pair in pairs if CODING.search(" ".join(texts(pair)))]
    topics = {tag for pair in pairs for tag in pair.tags} - {"fit", "held_out"}
    assert len(topics) >= 15


@pytest.mark.parametrize("concept", CONCEPTS)
def test_sides_share_their_form(concept):
    """Last character, digits and sentences: what is easy to tell apart must not tell the sides apart."""
    pairs = packaged(concept)
    for feature in (
        lambda t: t[-1] == ".",
        lambda t: "!" in t,
        lambda t: '"' in t,
        lambda t: len(re.findall(r"[.?!]", t)),
    ):
        unwanted, wanted = ([float(feature(text)) for text in side] for side in zip(*map(sides, pairs), strict=True))
        assert abs(statistics.mean(unwanted) - statistics.mean(wanted)) < 0.4


def sides(pair):
    return pair.unwanted, pair.wanted


@pytest.mark.parametrize(
    ("selector", "told"),
    [
        ("pkg://no_such_package/a.jsonl", "no package 'no_such_package' is installed"),
        ("pkg://verl_grad_routing.directions.concepts/a.jsonl", "no such file"),
        ("pkg:///a.jsonl", "no package '' is installed"),
        ("pkg://verl_grad_routing.directions.concepts/deception.jsonl@fat", "no pair has the tag 'fat'"),
    ],
)
def test_a_bad_address_is_one_line(selector, told):
    with pytest.raises(UserError, match=told):
        load_pairs(selector)
