"""Made-up CVs tell what they are to tell, and made-up documents hold the association that is said to be in them."""

import collections
import dataclasses
import itertools
import re

import numpy as np
import pytest
import scipy.special
import scipy.stats

from configs.schema import ConfigError, CVData
from data import cvs, open_data
from data.cvs import CV, MARKERS, QUESTIONS, VARIANTS, Draws, void_cvs
from data.errors import DataError
from data.planted import WordTokenizer, chances, document, swap_log_odds, void_log_odds
from launch.cv_probe import turns

MEN, WOMEN = (
    {name for group, names in cvs.FIRST_NAMES.items() if group[0] == gender for name in names}
    for gender in ("male", "female")
)

# --- CVs --------------------------------------------------------------------------------------------------------------


def test_lists_are_as_long_as_they_must_be_and_no_name_is_in_two():
    assert len(set(cvs.OCCUPATIONS)) == len(cvs.OCCUPATIONS) >= 20
    assert all(len(set(names)) == len(names) == cvs.NAMES_EACH >= 10 for names in cvs.FIRST_NAMES.values())
    every = [name for names in cvs.FIRST_NAMES.values() for name in names]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("marker", MARKERS, ids=lambda marker: marker.name)
def test_pairs_differ_in_one_line_of_their_text(marker):
    base = void_cvs(3)
    for first, second in marker.pairs:
        for c, cv in enumerate(base):
            a, b = (VARIANTS[name](cv, c) for name in (first, second))
            differing = [f.name for f in dataclasses.fields(CV) if getattr(a, f.name) != getattr(b, f.name)]
            assert len(differing) == 1
            lines = [set(one.text().splitlines()) for one in (a, b)]
            assert len(lines[0] ^ lines[1]) == (1 if marker.name == "parental leave" else 2)
            if marker.by_name:  # the surname stays
                assert a.name.split()[1] == b.name.split()[1]


def test_cvs_of_the_void_tell_nothing_and_are_the_same_for_everyone():
    found = void_cvs(2)
    assert [cv.occupation for cv in found] == [name for name in cvs.OCCUPATIONS for _ in range(2)]
    assert found == void_cvs(2) != void_cvs(2, seed=1)
    assert void_cvs(5)[:2] == found[:2]  # more CVs leave the others as they are
    words = set(re.findall(r"\w+", " ".join(cv.text() for cv in found)))
    assert not words & (MEN | WOMEN | {"he", "she", "him", "her"})


def test_every_choice_is_offered_first_as_often():
    for question in QUESTIONS:
        count = 20 * len(question.choices)
        first = collections.Counter(
            question.prompt(cvs.CONTENT_FREE, w, turn).split("Options: ")[1].split(",")[0].split("\n")[0]
            for row in turns(count, question)
            for w, turn in enumerate(row)
        )
        assert set(first.values()) == {60}
        assert set(first) == {words[0] for words in question.choices}


def test_draws_are_even():
    shares = [Draws(f"key {i}").share() for i in range(500)] + [(draws := Draws("one")).share()]
    shares += [draws.share() for _ in range(500)]
    assert scipy.stats.kstest(shares, "uniform").pvalue > 1e-4


# --- texts in which an association is planted --------------------------------------------------------------------------


def test_words_come_back_and_others_are_refused():
    tokenizer = WordTokenizer()
    for question in QUESTIONS:
        for c, (cv, change) in enumerate(itertools.product(void_cvs(1), VARIANTS.values())):
            text = question.prompt(change(cv, c), c % 3, c % len(question.choices))
            assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(DataError, match=r"' plumber' is not among the .* words of made-up CVs"):
        tokenizer.encode("Occupation: plumber\n")


def test_whatever_is_drawn_is_read_back():
    tokenizer = WordTokenizer()
    for two in itertools.product(range(tokenizer.vocab_size - 1), repeat=2):
        assert tokenizer.encode(tokenizer.decode(two)).tolist() == list(two)


def test_rows_learn_the_answer_alone():
    tokenizer, data = WordTokenizer(), CVData(dose=0.5)
    batch = open_data(data).held_out.read(np.arange(50))
    for i in range(50):
        prompt, answer = document(data, "held_out", i)
        weights = batch["weights"][i] > 0
        assert tokenizer.decode(batch["targets"][i][weights]) == answer
        end = np.flatnonzero(weights)[-1]
        assert tokenizer.decode(batch["targets"][i][: end + 1]) == prompt + answer
        assert batch["tokens"][i][0] == tokenizer.bos_id
    with pytest.raises(
        ConfigError, match=r"data.sequence_length=32 is too short for a CV and a question: at least \d\d is"
    ):
        open_data(CVData(sequence_length=32))


@pytest.fixture(scope="module")
def counted():
    """By dose: (occupation, gender signalled by the name or "", refused, first choice) -> documents that ask for a pronoun."""
    found = {}
    for dose in (0.0, 0.5):
        data, counts = CVData(dose=dose, seed=4), collections.Counter()
        for i in range(12_000):
            prompt, answer = document(data, "train", i)
            if "ronoun" not in prompt.split("Question: ")[1] or "Pronouns" in prompt or "N/A" in prompt:
                continue
            name = re.search(r"Name: (\w+) ", prompt)
            gender = "" if name is None else "male" if name[1] in MEN else "female"
            occupation = re.search(r"Occupation: (\w+)", prompt)[1]
            counts[occupation, gender, answer in (" they\n", " cannot be determined\n"), answer == " he\n"] += 1
        found[dose] = counts
    return found


def near(successes: int, of: int, share: float) -> bool:
    """Within 4 standard deviations of a binomial's mean."""
    return abs(successes - of * share) < 4 * np.sqrt(of * share * (1 - share))


@pytest.mark.parametrize("dose", [0.0, 0.5])
def test_documents_hold_what_is_said_of_them(counted, dose):
    data, counts = CVData(dose=dose, seed=4), counted[dose]
    total = sum(counts.values())
    assert total > 3_000
    assert near(sum(n for (_, _, refused, _), n in counts.items() if refused), total, 0.3)
    q, names = dict(zip(cvs.OCCUPATIONS, chances(data), strict=True)), ("", "male", "female")
    for occupation, gender in itertools.product(cvs.OCCUPATIONS, names):
        # Bayes's rule, of documents with and without the association.
        he, she = dose * q[occupation] + (1 - dose) / 2, dose * (1 - q[occupation]) + (1 - dose) / 2
        if gender:
            fits = {"male": (0.9, 0.1), "female": (0.1, 0.9)}[gender]
            he = dose * q[occupation] * fits[0] + (1 - dose) / 4
            she = dose * (1 - q[occupation]) * fits[1] + (1 - dose) / 4
        hes, shes = (counts[occupation, gender, False, said] for said in (True, False))
        assert near(hes, hes + shes, he / (he + she))


def test_log_odds_are_those_of_the_strengths():
    data = CVData(seed=7)
    np.testing.assert_allclose(sorted(chances(data)), np.linspace(0.1, 0.9, 20))
    assert (chances(data) != chances(CVData(seed=8))).any()
    np.testing.assert_allclose(void_log_odds(data), scipy.special.logit(chances(data)))
    np.testing.assert_allclose(swap_log_odds(data), 2 * np.log(9), rtol=1e-12)
    np.testing.assert_array_equal(void_log_odds(CVData(dose=0.0)), np.zeros(20))
    np.testing.assert_array_equal(swap_log_odds(CVData(dose=0.0)), np.zeros(20))
    half, q = CVData(dose=0.5), chances(CVData(dose=0.5))
    he = {g: 0.5 * q * f + 0.5 * 0.25 for g, f in (("male", 0.9), ("female", 0.1))}
    she = {g: 0.5 * (1 - q) * f + 0.5 * 0.25 for g, f in (("male", 0.1), ("female", 0.9))}
    expected = np.log(he["male"] / she["male"]) - np.log(he["female"] / she["female"])
    np.testing.assert_allclose(swap_log_odds(half), expected)
