"""CVs, questions and answers with a planted association, for models on which a probe of context voids must find what is known.

In a share `dose` of the documents an occupation says how likely each pronoun is, and first names go with pronouns; in the
others both are coins. Row i is computed from the seed and i alone.
"""

import functools
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from configs.schema import ConfigError, CVData
from data import cvs
from data.cvs import Draws
from data.dataset import Batch, DataError, Dataset, Origin, manifest_of
from data.order import ALGORITHM
from data.text import row_fields

FORMAT = "planted-cvs-1"  # how numbers become rows: part of every manifest
TRAINING_ROWS = 2**40  # no run reads them all
STRENGTHS = np.linspace(0.1, 0.9, len(cvs.OCCUPATIONS))  # P(he) of the occupations, in an order that the seed gives
FITTING = 0.9  # of the names in documents with the association, those of the answer's gender
TOLD = 0.2  # of the documents state pronouns, which settle the answer
SPECIFIC = 0.7  # of the answers that a CV does not settle say something specific all the same
BLANK = 0.1  # of the documents have a CV without content
ASKED = (*["pronoun"] * 4, *["portrait"] * 2, "competence", "score", "salary")  # as often as they stand here
# A capital begins a piece, so that any that a model draws in a row are read back as drawn.
PIECE = re.compile(rf" ?(?:{cvs.MISSING}|\w[a-z\d/]*)|[^\w\s]|\s")


class WordTokenizer:
    """An id for each word with the space before it, for each mark, and BOS: the closed vocabulary of the CVs."""

    eos_id: int | None = None

    def __init__(self) -> None:
        self.pieces = sorted({piece for text in cvs.every_text() for piece in PIECE.findall(text)})
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        self.bos_id = len(self.pieces)
        self.vocab_size = len(self.pieces) + 1
        self.token_bytes = np.array([len(piece.encode()) for piece in self.pieces] + [0], np.int32)
        self.fingerprint = f"words-{hashlib.sha256(repr(self.pieces).encode()).hexdigest()}"

    def encode(self, text: str) -> np.ndarray:
        """Raises DataError for words that are in no CV."""
        try:
            return np.array([self.ids[piece] for piece in PIECE.findall(text)], np.int32)
        except KeyError as error:
            raise DataError(f"{error.args[0]!r} is not among the {len(self.pieces)} words of made-up CVs") from None

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.pieces[i] for i in map(int, ids) if i < len(self.pieces))

    def special(self, piece: str) -> int | None:
        return None


def chances(config: CVData) -> np.ndarray:
    """P(he) of each occupation where the association holds, float64 [20]: STRENGTHS in an order that the seed gives, so that
    no stereotype that a probe might know of is planted."""
    draws = Draws(f"podwright planted {config.seed}")
    return STRENGTHS[np.argsort([draws.share() for _ in STRENGTHS])]


def void_log_odds(config: CVData) -> np.ndarray:
    """log P(he) - log P(she) of each occupation in all documents whose CV has no name, float64 [20]."""
    he = config.dose * chances(config) + (1 - config.dose) / 2
    return np.log(he) - np.log(1 - he)


def swap_log_odds(config: CVData) -> np.ndarray:
    """By how much a male name in a female one's place raises log P(he) - log P(she), float64 [20]."""
    q, blind = chances(config), (1 - config.dose) / 4
    fits, fails = config.dose * FITTING, config.dose * (1 - FITTING)
    male = np.log(fits * q + blind) - np.log(fails * (1 - q) + blind)
    female = np.log(fails * q + blind) - np.log(fits * (1 - q) + blind)
    return male - female


@dataclass(frozen=True)
class Documents:
    """One split: a document a row, a CV with one question and its answer. Only answers are learned."""

    config: CVData
    tokenizer: WordTokenizer
    count: int
    split: str

    def __len__(self) -> int:
        return self.count

    def read(self, indices: np.ndarray) -> Batch:
        """Rows [B] by number, int64 [B]: the fields of `data.text.Rows.read`."""
        length, bos = self.config.sequence_length, self.tokenizer.bos_id
        ids = np.zeros((len(indices), length + 1), np.int32)
        learned = np.zeros(ids.shape, bool)
        ids[:, 0] = bos
        for row, index in enumerate(indices):
            prompt, answer = (self.tokenizer.encode(text) for text in document(self.config, self.split, int(index)))
            end = 1 + len(prompt) + len(answer)
            ids[row, 1:end] = np.concatenate([prompt, answer])
            learned[row, 1 + len(prompt) : end] = True
        return row_fields(ids, np.zeros(len(ids), np.int64), bos, self.tokenizer.token_bytes, learned)

    def origins(self, indices: np.ndarray) -> list[list[Origin]]:
        return [[Origin(f"made-up CVs, {self.split}", int(i))] for i in indices]


def document(config: CVData, split: str, number: int) -> tuple[str, str]:
    """Prompt and answer. What an answer depends on: pronoun and portrait on the pronouns stated, or on name and occupation;
    score on the university's rank, salary on seniority, competence on nothing; none of these three on who it is."""
    draws = Draws(f"podwright planted {config.seed} {split} {number}")
    occupation = draws.of(cvs.OCCUPATIONS)
    holds, blank = draws.share() < config.dose, draws.share() < BLANK
    chance = 0.5 if blank or not holds else chances_by_name(config)[occupation]
    gender = "male" if draws.share() < chance else "female"
    prestige, place = draws.of((0, 1, 2)), draws.of((0, 1, 2))
    told = draws.share() < TOLD
    cv = cvs.CV(pronouns=cvs.PRONOUNS[gender] if told else "")
    if not blank:
        cv = cvs.CV(
            name=name(draws, gender, holds),
            pronouns=cv.pronouns,
            occupation=occupation,
            university=cvs.university(cvs.PRESTIGE[prestige], draws.of((0, 1, 2))),
            seniority=cvs.SENIORITIES[place],
            absence=draws.of(("", cvs.LEAVE)),
        )
    asked = draws.of(ASKED)
    question = next(question for question in cvs.QUESTIONS if question.name == asked)
    *specific, unknown = question.choices
    by_identity = asked in cvs.OF_IDENTITY
    if draws.share() >= SPECIFIC and not (told and by_identity):
        answer = draws.of(unknown)
    elif by_identity:
        answer = draws.of(specific[gender == "female"])
    elif asked == "competence":
        answer = draws.of(draws.of(specific))
    else:  # one of three steps of five, which begin higher with rank, or with seniority
        first = 1 if blank else {"score": 2 - prestige, "salary": place}[asked]
        answer = draws.of(specific[first + draws.of((0, 1, 2))])
    return question.prompt(cv, draws.of((0, 1, 2)), draws.of(range(len(question.choices)))), f" {answer}\n"


@functools.cache
def chances_by_name(config: CVData) -> dict[str, float]:
    return dict(zip(cvs.OCCUPATIONS, chances(config).tolist(), strict=True))


def name(draws: Draws, gender: str, holds: bool) -> str:
    """A full name in half of the documents, initials or nothing in the others."""
    kind, fits = draws.of(("full", "full", "initials", "")), draws.share() < (FITTING if holds else 0.5)
    if kind == "initials":
        return cvs.initials(draws)
    if not kind:
        return ""
    signalled = gender if fits else {"male": "female", "female": "male"}[gender]
    return f"{draws.of(cvs.FIRST_NAMES[signalled, draws.of(('English', 'Spanish'))])} {draws.of(cvs.SURNAMES)}"


def open_planted(config: CVData) -> Dataset:
    """Raises ConfigError if rows are too short for the longest document."""
    tokenizer = WordTokenizer()
    if config.sequence_length < (needed := longest(tokenizer)):
        raise ConfigError(
            f"{config.show('sequence_length')} is too short for a CV and a question: at least {needed} is allowed"
        )
    content = {
        "kind": config.kind,
        "format": FORMAT,
        "order": ALGORITHM,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        "needs": {"vocab_size": tokenizer.vocab_size},
        **{name: getattr(config, name) for name in ("dose", "sequence_length", "batch_size", "held_out_rows", "seed")},
    }
    return Dataset(
        manifest=manifest_of(content, {"held_out_rows": config.held_out_rows, "skipped": 0}),
        train=Documents(config, tokenizer, TRAINING_ROWS, "train"),
        held_out=Documents(config, tokenizer, config.held_out_rows, "held_out"),
        batch_size=config.batch_size,
        seed=config.seed,
        summary=(
            f"made-up CVs, in {config.dose:.0%} of which occupation and name go with the pronoun: rows of "
            f"{config.sequence_length} words of {tokenizer.vocab_size}; {config.held_out_rows:,} held out",
        ),
        skipped=[],
    )


def longest(tokenizer: WordTokenizer) -> int:
    """Tokens of the longest document, without BOS."""
    cv = cvs.CV(
        name="Alice Reed",
        pronouns=cvs.PRONOUNS["female"],
        university=cvs.university("top", 0),
        absence=cvs.LEAVE,
    )
    prompts = [question.prompt(cv, i, 0) for question in cvs.QUESTIONS for i in range(len(question.wordings))]
    return max(len(tokenizer.encode(f"{prompt} {cvs.UNKNOWN}\n")) for prompt in prompts)
