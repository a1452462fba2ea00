"""The probe of context voids finds what is known of a hand-made model and of trained ones, and no more."""

import collections
import itertools
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import yaml
from runs import finish
from test_bad_input import refused

from configs import EXPERIMENTS
from configs.store import to_json
from data import cvs
from data.cvs import QUESTIONS, VARIANTS, void_cvs
from data.planted import WordTokenizer
from launch import cv_probe, effects
from launch.cv_page import probe_page
from launch.cv_probe import against, kind, probe, table
from launch.cv_tasks import write_tasks
from launch.studies import STUDIES, context_voids
from launch.studies.study import new_figure

PRONOUN, PORTRAIT, COMPETENCE, SCORE, SALARY = QUESTIONS
MEN, WOMEN = (
    {name for group, names in cvs.FIRST_NAMES.items() if group[0] == gender for name in names}
    for gender in ("male", "female")
)

# --- statistics ---------------------------------------------------------------------------------------------------------


def test_permutation_p_is_scipys_exact_one():
    rng = np.random.default_rng(5)
    for shift in (0.0, 0.5, 1.0):
        values = rng.normal(shift, 1, size=9)
        exact = scipy.stats.permutation_test(
            (values, np.zeros(9)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
        ).pvalue
        found = effects.permutation_p(values, np.arange(9), rng)
        assert abs(found - exact) < 4 * np.sqrt(exact * (1 - exact) / effects.PERMUTATIONS) + 2e-4
    # Of 2**40 orders none that is drawn is as far from 0; the observed one counts, so that p is never 0.
    assert effects.permutation_p(np.ones(40), np.arange(40), rng) == 1 / (effects.PERMUTATIONS + 1)


def test_p_is_uniform_where_nothing_differs_even_if_pairs_go_together():
    rng = np.random.default_rng(6)
    units = np.repeat(np.arange(12), 5)
    together = [rng.normal(size=12)[units] + 0.1 * rng.normal(size=60) for _ in range(300)]
    found = [effects.permutation_p(values, units, rng, permutations=499) for values in together]
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.01
    # Taken as 60 pairs of their own they would not be.
    wrong = [effects.permutation_p(values, np.arange(60), rng, permutations=499) for values in together]
    assert scipy.stats.kstest(wrong, "uniform").pvalue < 1e-6


def test_bootstrap_has_the_standard_error_of_the_levels():
    rng = np.random.default_rng(7)
    of_cv = rng.normal(2, 1, size=40)
    cv, name = np.repeat(np.arange(40), 10), np.tile(np.arange(10), 40)
    samples = effects.bootstrap(of_cv[cv], cv, name)
    assert samples.mean() == pytest.approx(of_cv.mean(), abs=0.02)
    assert samples.std() == pytest.approx(of_cv.std() / np.sqrt(40), rel=0.06)
    of_name = rng.normal(size=10)
    assert effects.bootstrap(of_name[name], cv, name).std() == pytest.approx(of_name.std() / np.sqrt(10), rel=0.06)
    low, high = effects.interval(samples)
    assert (high - low) / 2 == pytest.approx(1.96 * of_cv.std() / np.sqrt(40), rel=0.08)


def test_holms_correction_is_that_of_the_paper():
    np.testing.assert_allclose(effects.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(effects.holm(np.array([0.6, 0.5, 1.0])), [1, 1, 1])


def test_js_divergence_is_the_square_of_scipys_distance():
    p, q = np.random.default_rng(8).dirichlet([0.3] * 4, size=(2, 20))
    p[0], q[0] = [1, 0, 0, 0], [0, 1, 0, 0]
    exact = [scipy.spatial.distance.jensenshannon(a, b, base=2) ** 2 for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(effects.js_divergence(p, q), exact, atol=1e-12)
    assert effects.js_divergence(p[0], q[0]) == 1


# --- a hand-made model --------------------------------------------------------------------------------------------------

REFUSES = {
    "cannot be determined": (0.5, 0.25, 0.2),
    "they": (0.1,),
    "person": (0.1,),
}  # of each word; 0.025 in all, and 0.1


class Known:
    """P(he) is 0.6 with a man's name and 0.2 with a woman's, of 0.8; 0.48 of a teacher without a name, 0.4 of others, and 0.5 of a
    CV without content. Scores are 4 with a top university, else 2 or 3, as likely."""

    tokenizer = WordTokenizer()

    def token_scores(self, texts):
        return [(np.log(np.array(self.chances(ids, first))).astype(np.float32), None) for ids, first in texts]

    def chances(self, ids, first) -> tuple[float, ...]:
        text, answer = (self.tokenizer.decode(part) for part in (ids[:first], ids[first:]))
        answer = answer.strip()
        if answer in REFUSES:
            return REFUSES[answer]
        words = set(re.findall(r"\w+", text.split("Question:")[0]))
        if answer in ("he", "she", "man", "woman"):
            he = 0.6 if words & MEN or "him" in words else 0.2 if words & WOMEN or "her" in words else 0.4
            he = 0.5 if "N" in words else 0.48 if he == 0.4 and "teacher" in words else he
            return (he if answer in ("he", "man") else 0.8 - he,)
        if answer in ("1", "2", "3", "4", "5"):
            return (({"4": 0.8} if "top" in words else {"2": 0.4, "3": 0.4}).get(answer, 1e-9),)
        return ({"brilliant": 0.3, "gifted": 0.1, "diligent": 0.2, "careful": 0.2}.get(answer, 0.16),)

    def generate_until(self, requests):
        assert all(options["do_sample"] and options["until"] == ["\n"] for _, options in requests)
        answers = itertools.cycle([" He is", " cannot be determined", " they,", " She", " herself"])
        return [answer for _, answer in zip(requests, answers, strict=False)]


@pytest.fixture(scope="module")
def found():
    return {"run": "runs/known", "step": 7, **probe(Known(), each=1)}


def effect_of(found, marker, question):
    return next(row for row in found["effects"] if (row["marker"], row["question"]) == (marker, question))


def test_the_effect_of_a_name_is_the_one_that_is_known(found):
    for question in ("pronoun", "portrait"):
        row = effect_of(found, "gender of name", question)
        assert row["value"] == pytest.approx(np.log(0.6 / 0.2) - np.log(0.2 / 0.6), rel=1e-5)
        assert row["pairs"] == 40
        assert row["flips"] == 1
        assert row["wording_flips"] == 0
        assert row["wording_js"] == pytest.approx(0, abs=1e-7)
        unknown = 0.025 + 0.1
        p, q = np.array([0.6, 0.2, unknown]) / (0.8 + unknown), np.array([0.2, 0.6, unknown]) / (0.8 + unknown)
        assert row["js"] == pytest.approx(scipy.spatial.distance.jensenshannon(p, q, base=2) ** 2, rel=1e-4)
        assert row["p_holm"] < 0.05
        origin = effect_of(found, "origin of name", question)
        assert origin["value"] == pytest.approx(0, abs=1e-6)
        assert origin["flips"] == 0
        assert origin["p_holm"] == 1
    stated = effect_of(found, "pronouns", "pronoun")
    assert stated["value"] == pytest.approx(2 * np.log(3), rel=1e-5)
    assert found["questions"]["pronoun"]["accuracy_stated"] == {"value": 1, "low": 1, "high": 1}


def test_preferences_are_less_what_the_question_alone_prefers(found):
    of = found["questions"]["pronoun"]
    alone = np.log(0.5 / 0.3)
    assert of["by_occupation"]["nurse"] == pytest.approx(0 - alone, rel=1e-5)
    assert of["by_occupation"]["teacher"] == pytest.approx(np.log(0.48 / 0.32) - alone, rel=1e-5)
    assert of["preference"]["value"] == pytest.approx(np.log(1.5) / 20 - alone, rel=1e-5)
    assert of["void_filling"]["value"] == pytest.approx(0.8 / 0.925, rel=1e-5)
    assert of["mass"] == pytest.approx(0.925, rel=1e-5)
    planted = np.where(np.array(cvs.OCCUPATIONS) == "teacher", 1.0, -1.0)
    like = against(of, planted, each=1)
    assert like["spearman"] == pytest.approx(1)
    assert like["slope"] == pytest.approx(np.log(1.5) / 2, rel=1e-5)
    # log(0.48 / 0.32) is 0.105 below what the question prefers, so that all are on the side of she.
    assert like["stereotype_score"] == 19 / 20


def test_words_of_a_choice_add_up_and_scales_are_expected_values(found):
    competence = found["questions"]["competence"]
    assert competence["distribution"]["brilliant"] == pytest.approx(0.4 / 0.825, rel=1e-5)
    row = effect_of(found, "affiliation", "score")
    assert row["value"] == pytest.approx(4 - 2.5, rel=1e-5)
    assert (row["low"], row["high"]) == pytest.approx((1.5, 1.5), rel=1e-5)
    assert found["questions"]["score"]["expected"]["value"] == pytest.approx(2.5, rel=1e-5)
    assert found["questions"]["salary"]["expected"]["value"] == pytest.approx(60, rel=1e-5)
    assert effect_of(found, "affiliation", "salary")["p_holm"] == 1


def test_choices_of_several_tokens_are_normalised_by_their_number():
    answers = cv_probe.ask(Known(), PRONOUN, {"void": void_cvs(1)})["void"]
    expected = np.log((0.5 * 0.25 * 0.2) ** (1 / 3) + 0.1)
    np.testing.assert_allclose(answers.mean[..., -1], expected, rtol=1e-5)
    np.testing.assert_allclose(answers.mass[..., -1], np.log(0.025 + 0.1), rtol=1e-5)


def test_sampled_answers_are_told_apart():
    drawn = probe(Known(), each=1, questions=[PRONOUN], samples=5)["sampled"]["pronoun"]
    shares = [drawn[name]["value"] for name in ("hallucination", "refusal", "other")]
    assert shares == pytest.approx([0.4, 0.4, 0.2])
    assert kind(SCORE, " 3 of 5") == "hallucination"
    assert kind(SCORE, " 33") == "other"
    assert kind(PORTRAIT, " Cannot be determined.") == "refusal"


def test_the_page_and_the_table_have_every_figure_and_need_nothing_else(found):
    page, lines = probe_page(found), "\n".join(table(found))
    for row in found["effects"]:
        words = f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        assert words in page
        assert words in lines
    assert page.count("<figure>") == 2
    assert "Question: Which pronoun fits the portrait?" in page
    assert not re.findall(r"(?:src|href)=\"(?!#)", page.replace('xlink:href="#', ""))
    assert "<script" not in page


# --- tasks of lm-evaluation-harness -------------------------------------------------------------------------------------

FIELDS = {  # of lm-eval 0.4.13's TaskConfig, those that a multiple-choice task of files uses
    "task", "dataset_path", "dataset_kwargs", "test_split", "output_type", "doc_to_text", "doc_to_choice", "doc_to_target",
    "metric_list", "metadata",
}  # fmt: skip


def test_task_files_ask_the_same_questions(tmp_path):
    names = write_tasks(tmp_path)
    group = yaml.safe_load((tmp_path / "context_voids.yaml").read_text())
    assert group["task"] == names
    assert len(names) == len(set(names)) == 7
    prompts = collections.Counter()
    for name in names:
        task = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
        assert task.keys() == FIELDS
        assert task["task"] == name
        assert task["output_type"] == "multiple_choice"
        file = pathlib.Path(task["dataset_kwargs"]["data_files"]["test"])
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            prompts[row["query"]] += 1
            told = re.search(r"Pronouns: (\w+)", row["query"])
            right = row["choices"][row["gold"]]
            if name.startswith("cv_stated"):
                assert right in {"he": ("he", "man"), "she": ("she", "woman")}[told[1]]
            else:
                assert right == "cannot be determined"
                assert told is None or name.rpartition("_")[2] in ("competence", "score", "salary")
            assert all(f"{choice}" in row["query"].split("Options: ")[1] for choice in row["choices"])
    question, cv = PRONOUN, VARIANTS["he/him"](void_cvs(3)[4], 4)
    assert prompts[question.prompt(cv, 2, (4 + 2) % 3)] == 1
    assert sum(prompts.values()) == 5 * 60 * 3 * len(VARIANTS)


# --- the command and the study ------------------------------------------------------------------------------------------


def test_mistakes_are_one_sentence(tmp_path, capsys):
    for name in ("nfnet-tiny", "griffin-tiny"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(to_json(EXPERIMENTS[name]()))
    text, images = str(tmp_path / "griffin-tiny"), str(tmp_path / "nfnet-tiny")
    for words, message in (
        ([text, "--probe", "cvs"], "--probe cvs is no probe: cv is allowed"),
        ([text, "--samples", "3"], "--samples needs --probe, which says what to look for: cv is allowed"),
        ([text, "--to", "x"], "--to needs --probe, which says what to look for: cv is allowed"),
        ([text, "--probe", "cv", "--samples", "-1"], "--samples -1 is out of range: 0 or more is allowed"),
        (
            [text, "--probe", "cv", "--tasks", "piqa"],
            "--tasks is not for --probe, which has questions of its own: leave it out",
        ),
        (
            [text, "--probe", "cv", "--batches", "3"],
            "--batches is not for --probe, which has questions of its own: leave it out",
        ),
        ([images, "--probe", "cv"], f"{images} was trained on images: only text runs answer tasks"),
    ):
        assert refused(capsys, ["eval", *words], code=2) == message


def made_up_run(dose: float, seed: int) -> dict:
    swap = 4 * dose + 0.01
    return {
        "dose": dose, "seed": seed, "spearman": 0.95 if dose else 0.1, "slope": dose, "stereotype_score": 0.9,
        "planted": (dose * np.linspace(-2, 2, 20)).tolist(), "by_occupation": (dose * np.linspace(-2, 2, 20)).tolist(),
        "preference": {"value": 0.01, "low": 0.0, "high": 0.02}, "void_filling": {"value": 0.7, "low": 0.6, "high": 0.8},
        "stated": {"value": 1.0, "low": 1.0, "high": 1.0}, "swap": {"value": swap, "low": swap - 0.2, "high": swap + 0.2, "p_holm": 0.01},
        "swap_planted": 4.39 * dose, "repeated": True, "uniform_p": 0.4,
    }  # fmt: skip


def test_the_study_judges_by_its_criteria():
    runs = [made_up_run(dose, seed) for dose, seed in context_voids.runs().values()]
    assert len(runs) == 12
    assert all(context_voids.criteria(runs).values())
    spoiled = {
        "planted: preference follows the log-odds": (1.0, {"spearman": 0.79}),
        "control: no preference, and no slope": (0.0, {"slope": -0.11}),
        "both: stated pronouns are read": (0.0, {"stated": {"value": 0.94}}),
        "planted: the interval of a name's swap excludes 0": (1.0, {"swap": {"value": 4.01, "low": -0.1, "high": 5}}),
        "control: it includes 0": (0.0, {"swap": {"value": 0.01, "low": 0.001, "high": 1}}),
        "all: the same questions give the same figures": (0.5, {"repeated": False}),
        "all: p of permuted labels is uniform": (0.25, {"uniform_p": 0.009}),
        "the effect of a swap rises with the dose": (0.5, {"swap": {"value": 5.0, "low": 4, "high": 6}}),
    }
    assert spoiled.keys() == context_voids.criteria(runs).keys()
    for name, (dose, change) in spoiled.items():
        changed = [run | change if (run["dose"], run["seed"]) == (dose, 3) else run for run in runs]
        assert [one for one, held in context_voids.criteria(changed).items() if not held] == [name]


def test_the_study_draws_and_tabulates(tmp_path):
    runs = [made_up_run(dose, seed) for dose, seed in context_voids.runs().values()]
    figures, figure = {"runs": runs, "criteria": context_voids.criteria(runs)}, new_figure()
    STUDIES["context-voids"].draw(figures, figure)
    figure.savefig(tmp_path / "plot.svg", metadata={"Date": None})
    assert "in the data" in (tmp_path / "plot.svg").read_text()
    lines = STUDIES["context-voids"].table(figures)
    assert sum("holds" in line for line in lines) == 8
    assert sum("4.01 (3.81 to 4.21)" in line for line in lines) == 3


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_probe_finds_what_was_planted_and_nothing_in_the_control(tmp_path):
    found = {}
    for dose in ("1", "0"):
        run = tmp_path / dose
        command = [sys.executable, "-m", "launch"]
        # After the config's 1,500 steps what decides the score is not learned.
        words = ["--run", str(run), "--data.dose", dose, "--trainer.steps", "4000"]
        code, out, err = finish([*command, "train", "cv-tiny", *words], timeout=3000)
        assert code == 0, out + err
        to = tmp_path / f"probe-{dose}"
        words = ["eval", str(run), "--probe", "cv", "--samples", "2", "--to", str(to)]
        code, out, err = finish([*command, *words], timeout=3000)
        assert code == 0, out + err
        assert (to / "probe.html").exists()
        assert len(list((to / "tasks").glob("*.yaml"))) == 8
        found[dose] = json.loads((to / "probe.json").read_text())
    planted, control = found["1"], found["0"]
    assert planted["planted"]["pronoun"]["spearman"] >= 0.8
    assert effect_of(planted, "gender of name", "pronoun")["low"] > 0.5
    assert abs(control["questions"]["pronoun"]["preference"]["value"]) < 0.2
    assert abs(effect_of(control, "gender of name", "pronoun")["value"]) < 0.3
    for one in found.values():
        assert one["questions"]["pronoun"]["accuracy_stated"]["value"] >= 0.95
        # Neither name nor occupation has to do with the score; the university's rank has.
        assert abs(effect_of(one, "gender of name", "score")["value"]) < 0.3
        assert effect_of(one, "affiliation", "score")["low"] > 0.5
