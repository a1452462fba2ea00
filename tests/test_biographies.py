"""Biographies say what they should of the people they should, and evaluations count what models know of them."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import EXPERIMENTS
from configs.parameters import COUNTS
from configs.schema import BiographyData, ConfigError
from configs.store import from_json, to_json
from data import open_data
from data.biographies import Biographies, no_knowledge, ranges_of, sampled
from data.shapes import batch_fields
from sharding.mesh import one_device_mesh
from sharding.rules import rules_for
from trainer.evaluate import evaluate, place_batch
from trainer.tasks import make_task

TINY = BiographyData(population=50, unseen=30, names=(5, 6, 7), batch_size=16, held_out_rows=40)
# Values of two and three tokens, names of two, and room for padding.
ODD = dataclasses.replace(
    TINY,
    population=6,
    names=(7, 9),
    attributes=("4x3", "5", "2x3x4"),
    templates=4,
    training_templates=3,
    template_tokens=3,
    sequence_length=26,
)


def read_back(config: BiographyData, words: list[int], targets: bool = False) -> list[tuple]:
    """(attribute, name, template, value) of each sentence, with the vocabulary laid out as the docs say: BOS, names part by
    part, each template's words, values token by token."""
    sizes = [[int(n) for n in a.split("x")] for a in config.attributes]
    bounds = np.cumsum([1, *config.names])
    said = bounds[-1] + np.arange(len(sizes) * config.templates * config.template_tokens).reshape(
        len(sizes), config.templates, config.template_tokens
    )
    first_value = int(said[-1, -1, -1]) + 1
    found, at = [], 0
    while at < len(words):
        name = tuple(words[at + i] - bounds[i] for i in range(len(config.names)))
        assert all(0 <= part < size for part, size in zip(name, config.names, strict=True))
        at += len(name)
        a, template = (int(i[0]) for i in np.where((said == words[at : at + config.template_tokens]).all(axis=-1)))
        at += config.template_tokens
        symbol, value = first_value + sum(map(sum, sizes[:a])), []
        for size in sizes[a]:
            assert 0 <= words[at] - symbol < size
            value.append(words[at] - symbol)
            at, symbol = at + 1, symbol + size
        found.append((a, name, template, tuple(value)))
    return found


def sentences(config: BiographyData, split: Biographies, count: int) -> list[list[tuple]]:
    rows = split.read(np.arange(count))
    spoken = [list(t[w > 0]) for t, w in zip(rows["targets"], rows["weights"], strict=True)]
    return [read_back(config, words) for words in spoken]


@pytest.mark.parametrize("config", [TINY, ODD])
def test_a_row_is_one_biography_of_every_attribute_about_one_person(config):
    rows = sentences(config, open_data(config).train, 300)
    orders = set()
    for row in rows:
        assert sorted(a for a, *_ in row) == [0, 1, 2]
        assert len({name for _, name, *_ in row}) == 1
        orders.add(tuple(a for a, *_ in row))
    assert len(orders) == 6  # every order of three sentences


def test_facts_never_change_and_templates_are_held_out_for_each_person():
    data = open_data(ODD)
    facts, used = {}, {True: {}, False: {}}
    for held_out, split in ((False, data.train), (True, data.held_out)):
        for row in sentences(ODD, split, 1200 if not held_out else 80):
            for a, name, template, value in row:
                assert facts.setdefault((name, a), value) == value
                used[held_out].setdefault((name, a), set()).add(template)
    people = {name for name, _ in used[False]}
    assert len(people) == 6
    for key, templates in used[False].items():
        assert len(templates) == 3
        assert used[True][key] == {0, 1, 2, 3} - templates
    assert len({frozenset(templates) for templates in used[False].values()}) > 1  # not the same for all


def test_values_and_people_are_uniform():
    """Chi-squared of 40,000 values and of 50,000 draws: below the 99.99 % points for 15 and 49 degrees of freedom (44, 95)."""
    many = dataclasses.replace(TINY, population=10_000, names=(30, 30, 30))
    data = open_data(many)
    assert isinstance(data.train, Biographies)
    rows = data.train.read(np.arange(0, 20_000))
    values = {}
    for row in sentences(many, data.train, 4000):
        for a, name, _, value in row:
            values[name, a] = value
    for attribute in range(3):
        counts = np.bincount([value[0] for (_, a), value in values.items() if a == attribute], minlength=16)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 44
    assert len(rows["tokens"]) == 20_000
    draws = np.bincount(sampled(TINY, np.arange(50_000)), minlength=50)
    assert ((draws - 1000) ** 2 / 1000).sum() < 95


def test_every_person_has_a_name_of_their_own():
    everybody = dataclasses.replace(TINY, population=180, unseen=30)  # all of 5 x 6 x 7
    names = {row[0][1] for row in sentences(everybody, open_data(everybody).train, 4000)}
    unseen = {row[0][1] for row in sentences(everybody, open_data(everybody).held_out, 400)[1::2]}
    assert len(names) == 180
    assert len(unseen) == 30
    assert not names & unseen


def test_the_loss_of_one_who_knows_nobody_is_that_of_the_paper():
    paper = EXPERIMENTS["facts-transformer"]().data
    expected = (math.log(200 * 12 * 31) + 2 * math.log(800) + math.log(200) + math.log(100) + math.log(500)) / 6
    assert no_knowledge(paper) == pytest.approx(expected, rel=1e-12)
    assert round(no_knowledge(paper), 3) == 6.784  # arXiv 2503.21676
    assert no_knowledge(EXPERIMENTS["facts-hawk-tiny"]().data) == pytest.approx(math.log(16))


def share(config: BiographyData, count: int, rows: range = range(40_000)) -> np.ndarray:
    people = sampled(config, np.arange(rows.start, rows.stop))
    return np.bincount(people - config.first, minlength=count) / len(rows)


def test_popularity_follows_an_inverse_power_law():
    found = share(dataclasses.replace(TINY, sampling="power:0.8"), 50)
    expected = np.arange(1, 51) ** -0.8 / sum(i**-0.8 for i in range(1, 51))
    assert (abs(found - expected) < 5 * np.sqrt(expected / 40_000)).all()


def test_celebrities_are_so_many_times_likelier():
    found = share(dataclasses.replace(TINY, sampling="celebrities:5:8"), 50)
    assert found[:5].sum() == pytest.approx(40 / 85, abs=0.013)  # 5 standard errors
    assert (abs(found[5:] - 1 / 85) < 5 * np.sqrt(1 / 85 / 40_000)).all()


def test_a_warm_up_shows_few_people_for_the_first_batches():
    config = dataclasses.replace(TINY, sampling="warmup:10:100")
    early, late = share(config, 50, range(1600)), share(config, 50, range(1600, 41_600))
    assert early[10:].sum() == 0
    assert (early[:10] > 0).all()
    assert share(config, 50, range(1600, 1616))[10:].sum() > 0.3  # the batch after them: 0.8 in expectation, of 16 rows
    data = open_data(config)
    for step in (0, 99, 100):  # a step reads the rows that belong to it
        np.testing.assert_array_equal(
            data.train_batch(step)["tokens"], data.train.read(np.arange(16 * step, 16 * step + 16))["tokens"]
        )
    assert (abs(late - 0.02) < 5 * np.sqrt(0.02 / 40_000)).all()


def test_groups_come_one_after_the_other_and_again():
    config = dataclasses.replace(TINY, population=50, sampling="groups:4:100")
    edges = [0, 12, 25, 37, 50]
    for turn in range(8):
        people = set(sampled(config, np.arange(1600 * turn, 1600 * (turn + 1))))
        assert people == set(range(edges[turn % 4], edges[turn % 4 + 1]))


def test_sequential_groups_are_evaluated_one_by_one():
    """After the population, unseen people and, if there are any, earlier ones; each row in turn."""
    config = dataclasses.replace(TINY, first=40, sampling="groups:4:100", held_out_rows=400)
    data = open_data(config)
    assert isinstance(data.held_out, Biographies)
    people, group = data.held_out.people(np.arange(7 * 400))
    np.testing.assert_array_equal(group, np.tile(np.arange(7), 400))
    edges = [40, 52, 65, 77, 90]
    for place in range(4):
        assert set(people[group == 3 + place]) == set(range(edges[place], edges[place + 1]))
    assert set(people[group == 0]) == set(range(40, 90))
    assert set(people[group == 2]) == set(range(40))
    assert list(ranges_of(dataclasses.replace(config, first=0)))[2:] == ["group_1", "group_2", "group_3", "group_4"]
    assert data.held_out.origins(np.array([3]))[0][0].source == f"biography of person {people[3]} (group_1), held_out"


def test_replay_returns_to_each_earlier_person_so_often():
    config = dataclasses.replace(TINY, first=40, population=10, replay=0.25)
    people = np.bincount(sampled(config, np.arange(40_000)), minlength=50) / 40_000
    assert people[:40].sum() == pytest.approx(0.5, abs=0.0125)  # 40 of weight 1/4, 10 of weight 1
    assert (abs(people[:40] - 0.0125) < 5 * np.sqrt(0.0125 / 40_000)).all()
    never = dataclasses.replace(config, replay=0.0)
    assert set(sampled(never, np.arange(4000))) == set(range(40, 50))


def test_the_same_number_is_the_same_person_in_every_population():
    """So that a run that goes on with new people can be asked for the old ones."""
    old = open_data(TINY)
    later = open_data(dataclasses.replace(TINY, first=50, population=20))
    known = {(name, a): value for row in sentences(TINY, old.train, 1000) for a, name, _, value in row}
    rows = later.held_out.read(np.arange(120))
    assert set(rows["group"]) == {0, 1, 2}
    for group, row in zip(rows["group"], sentences(TINY, later.held_out, 120), strict=True):
        for a, name, _, value in row:
            assert ((name, a) in known) == (group == 2)
            assert group != 2 or known[name, a] == value


def test_values_are_marked_where_they_are_asked_for():
    rows = open_data(ODD).held_out.read(np.arange(40))
    for tokens, targets, values, weights in zip(
        *(rows[n] for n in ("tokens", "targets", "values", "weights")), strict=True
    ):
        spoken = [(a, value) for a, _, _, value in read_back(ODD, list(targets[weights > 0]))]
        marked = [(a, tuple(targets[values == a + 1])) for a, _ in spoken]
        first = 1 + 7 + 9 + 3 * 4 * 3
        starts = {0: (first, first + 4), 1: (first + 7,), 2: (first + 12, first + 14, first + 17)}
        assert marked == [(a, tuple(v + s for v, s in zip(value, starts[a], strict=True))) for a, value in spoken]
        assert tokens[0] == 0
        assert list(tokens[1:21]) == list(targets[:20])
        assert list(weights) == [1] * 21 + [0] * 5  # three times 2 of a name and 3 words, and 2 + 1 + 3 of values
    assert (rows["segment_pos"][:, :21] == np.arange(21)).all()
    assert (rows["segment_pos"][:, 21:] == -1).all()


def test_batches_are_the_same_on_any_number_of_hosts_and_fields_as_announced():
    whole = open_data(TINY).train_batch(5)
    parts = [open_data(TINY, rows).train_batch(5) for rows in np.split(np.arange(16), 4)]
    for name, rows in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)
    other = open_data(dataclasses.replace(TINY, seed=1))
    assert (other.train_batch(5)["tokens"] != whole["tokens"]).any()
    assert other.manifest["hash"] != open_data(TINY).manifest["hash"]
    for held_out, batch in ((False, whole), (True, next(open_data(TINY).held_out_batches()))):
        assert {n: (a.shape, a.dtype) for n, a in batch.items()} == batch_fields(TINY, held_out)


def test_metrics_are_those_of_the_papers_definitions():
    """Against float64 loops over rows, groups and attributes; the last batch has rows of padding."""
    config = EXPERIMENTS["facts-transformer-tiny"]()
    data = dataclasses.replace(ODD, first=4, population=6, sampling="groups:2:5", held_out_rows=10, batch_size=16)
    model = dataclasses.replace(config.model, vocab_size=data.vocab_size, width=16, mlp_width=16, depth=1)
    config = dataclasses.replace(config, data=data, model=model)
    task, mesh, opened = make_task(config), one_device_mesh(), open_data(data)
    with jax.set_mesh(mesh):
        spec = rules_for(mesh).spec
        init = jax.jit(lambda: jax.tree.map(lambda p: 4 * p, task.init(jax.random.key(0), spec)))()
        place = functools.partial(place_batch, mesh=mesh, spec=spec)
        found = evaluate(jax.jit(task.evaluate), {"": init}, opened, 0, task, place)
        rows = opened.held_out.read(np.arange(50))
        run = jax.jit(functools.partial(init, dtype=jnp.float32))
        logits = np.asarray(run(rows["tokens"], rows["segment_pos"]), np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    sums = {group: [] for group in range(5)}
    for i in range(50):
        nats, right, sure, entropy, everything = [], [], [], [], []
        for t in range(21):
            here, target = p[i, t], rows["targets"][i, t]
            everything.append(-math.log(here[target]))
            if rows["values"][i, t]:
                nats.append(-math.log(here[target]))
                sure.append(here.max())
                entropy.append(-sum(q * math.log(q) for q in here if q > 0))
        for a in (1, 2, 3):
            places = np.flatnonzero(rows["values"][i] == a)
            right.append(all(p[i, t].argmax() == rows["targets"][i, t] for t in places))
        sums[int(rows["group"][i])].append(
            (sum(nats) / 3, np.mean(right), np.mean(sure), np.mean(entropy), np.mean(everything))
        )
    names = ("attribute_loss", "attribute_accuracy", "max_probability", "entropy", "loss")
    for group, prefix in enumerate(("", "unseen_", "earlier_", "group_1_", "group_2_")):
        assert len(sums[group]) == 10
        for name, expected in zip(names, np.mean(sums[group], axis=0), strict=True):
            assert found[prefix + name] == pytest.approx(expected, rel=2e-5, abs=1e-9), prefix + name
    assert task.headline == "attribute_loss"


def test_a_value_is_right_only_if_all_of_its_tokens_are():
    """A stand-in that knows every next token but the last of three-token values."""
    config = dataclasses.replace(EXPERIMENTS["facts-hawk-tiny"](), data=ODD)
    opened, task, mesh = open_data(ODD), make_task(config), one_device_mesh()
    (rows,) = [opened.held_out.read(np.arange(20))]
    knows = rows["targets"].copy()
    for row, values in zip(knows, rows["values"], strict=True):
        row[np.flatnonzero(values == 3)[-1]] = 0

    def oracle(tokens, segment_pos, *, dtype):
        return 30.0 * jax.nn.one_hot(knows, ODD.vocab_size)

    with jax.set_mesh(mesh):
        placed = place_batch(rows, mesh, rules_for(mesh).spec)
        found = task.summarise(jax.device_get(task.evaluate(oracle, placed)))
    assert found["attribute_accuracy"] == pytest.approx(2 / 3)
    assert found["attribute_loss"] == pytest.approx(10, rel=1e-4)  # one of 3 values is 30 nats off, over 3 attributes
    assert found["max_probability"] == pytest.approx(1)
    assert "earlier_attribute_loss" not in found


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attributes": ("16", "x4", "3")}, "data.attributes=('16', 'x4', '3'): 'x4' is no number of values above 1"),
        ({"attributes": ("1",)}, "data.attributes=('1',): '1' is no number of values above 1, such as 16 or 200x12x31"),
        (
            {"training_templates": 8},
            "data.training_templates=8 leaves none of data.templates=8 for evaluation: at most 7",
        ),
        ({"population": 200}, "data.names=(5, 6, 7) make 210 people, fewer than data.first=0, data.population=200 and"),
        ({"sequence_length": 17}, "data.sequence_length=17 is shorter than a biography, which has 18 tokens"),
        ({"replay": 1.0}, "data.replay=1.0 has nobody to return to: give data.first above 0"),
        (
            {"sampling": "zipf:1"},
            "data.sampling='zipf:1' is none of uniform, power:EXPONENT, celebrities:PEOPLE:WEIGHT,",
        ),
        ({"sampling": "power"}, "data.sampling='power' is not power:EXPONENT, with numbers from 0 on"),
        ({"sampling": "power:-1"}, "data.sampling='power:-1' is not power:EXPONENT, with numbers from 0 on"),
        ({"sampling": "warmup:many:2"}, "data.sampling='warmup:many:2' is not warmup:PEOPLE:BATCHES, with numbers"),
        ({"sampling": "groups:1.5:10"}, "data.sampling='groups:1.5:10' is not groups:GROUPS:BATCHES, with numbers"),
        ({"sampling": "celebrities:51:2"}, "data.sampling='celebrities:51:2' is not from 1 to data.population=50"),
        ({"sampling": "groups:5:0"}, "data.sampling='groups:5:0' ends with 0, a number above it is allowed"),
    ],
)
def test_mistakes_are_told_in_a_sentence(change, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        dataclasses.replace(TINY, **change)


def test_configs_are_stored_whole_and_models_are_of_one_size():
    for size in ("", "-tiny"):
        configs = [EXPERIMENTS[f"facts-{name}{size}"]() for name in ("transformer", "griffin", "hawk")]
        assert all(from_json(to_json(config)) == config for config in configs)
        counts = [COUNTS["griffin"](config.model).total for config in configs]
        assert max(counts) < 1.12 * min(counts)
        assert json.loads(to_json(configs[0]))["data"]["kind"] == "biographies"
