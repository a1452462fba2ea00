"""A config saved as JSON loads back equal, also by a later version that has more fields."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import EXPERIMENTS
from configs.fields import build, fields_of, kinds_of, values_of
from configs.schema import SECTIONS, Config, ConfigError
from configs.store import from_json, to_json


@st.composite
def configs(draw) -> Config:
    """An experiment with some fields changed to any value that the schema allows."""
    config = EXPERIMENTS[draw(st.sampled_from(sorted(EXPERIMENTS)))]()
    kinds, values = kinds_of(config), values_of(config)
    of_type = {bool: st.booleans(), int: st.integers(), float: st.floats(), str: st.text()}
    for path in draw(st.sets(st.sampled_from(sorted(values)))):
        new = draw(of_type.get(fields_of(kinds)[path].hint, st.just(values[path])))
        try:
            config = build(kinds, values | {path: new})
        except ConfigError:
            continue
        values[path] = new
    return config


@given(configs())
def test_saving_and_loading_gives_an_equal_config(config):
    text = to_json(config)
    assert from_json(text) == config
    assert to_json(from_json(text)) == text


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_json_has_the_schemas_order_and_the_kinds(name):
    config = EXPERIMENTS[name]()
    tree = json.loads(to_json(config))
    assert list(tree) == ["name", *SECTIONS]
    assert next(iter(tree["model"])) == "kind"
    assert (tree["model"]["kind"], tree["data"]["kind"]) == (config.model.kind, config.data.kind)


def test_a_field_newer_than_the_file_takes_its_default():
    tree = json.loads(to_json(EXPERIMENTS["griffin-tiny"]()))
    del tree["eval"], tree["model"]["conv_width"]
    assert from_json(json.dumps(tree)) == EXPERIMENTS["griffin-tiny"]()


def test_a_field_that_no_longer_exists_is_refused():
    tree = json.loads(to_json(EXPERIMENTS["griffin-tiny"]()))
    tree["trainer"]["qqq"] = 1
    with pytest.raises(ConfigError, match=r"^old\.json: trainer\.qqq is not a field, trainer has steps, seed"):
        from_json(json.dumps(tree), "old.json")


def test_a_config_without_a_name_is_refused():
    tree = json.loads(to_json(EXPERIMENTS["griffin-tiny"]()))
    del tree["name"]
    with pytest.raises(ConfigError, match=r"^config\.json: name is missing$"):
        from_json(json.dumps(tree))


def test_whole_numbers_written_by_hand_for_numbers_load_as_numbers():
    tree = json.loads(to_json(EXPERIMENTS["griffin-tiny"]()))
    tree["optimizer"]["clip_norm"] = 1
    assert to_json(from_json(json.dumps(tree))) == to_json(EXPERIMENTS["griffin-tiny"]())
