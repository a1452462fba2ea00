"""Every mistake in a config is one sentence that names the field's whole path, what was given and what is right."""

import json

import pytest

from configs.overrides import resolve
from configs.schema import Config, ConfigError, GriffinConfig, ImageData, NFNetConfig, TextData
from configs.store import from_json, to_json

COMMAND_LINES = [
    # a name that does not exist
    ("--optimizer.learnin_rate 3", "--optimizer.learnin_rate is not a field, perhaps --optimizer.learning_rate"),
    ("--optimiser.learning_rate 3", "--optimiser.learning_rate is not a field, perhaps --optimizer.learning_rate"),
    ("--optimiser.learnin-rate 3", "--optimiser.learnin-rate is not a field, perhaps --optimizer.learning_rate"),
    ("--trainer.learning_rate 3", "--trainer.learning_rate is not a field, perhaps --optimizer.learning_rate"),
    ("--trainer.learnin_rate 3", "--trainer.learnin_rate is not a field, perhaps --optimizer.learning_rate"),
    ("--learning_rate 3", "--learning_rate is not a field, perhaps --optimizer.learning_rate"),
    ("--learnin_rate=3", "--learnin_rate is not a field, perhaps --optimizer.learning_rate"),
    ("--optimizer.lr 3", "--optimizer.lr is not a field, perhaps --optimizer.learning_rate"),
    ("--seed 3", "--seed is not a field, perhaps --data.seed or --trainer.seed or --privacy.seed"),
    ("--tainer.seed 3", "--tainer.seed is not a field, perhaps --trainer.seed"),
    ("--rnu here", "--rnu is not a field, perhaps --run"),
    ("--eval.qqq 3", "--eval.qqq is not a field, eval has every, batches"),
    (
        "--qqq.xyz 3",
        "--qqq.xyz is not a field, the sections are model, data, optimizer, finetune, distill, mesh, checkpoint, trainer, guard, "
        "privacy, eval, watchdog",
    ),
    ("--eval 3", "--eval is a section, --eval.FIELD sets one of its fields every, batches"),
    ("--model.head_dim 64", "--model.head_dim is a field of gemma, but model.kind is griffin"),
    ("--model.group_width 8", "--model.group_width is a field of nfnet, but model.kind is griffin"),
    ("--data.image_size 8", "--data.image_size is a field of images, but data.kind is text"),
    ("--model.kind gemma", "--model.kind cannot change, start from a config with another model than griffin"),
    # no value, or one too many
    ("--trainer.steps", "--trainer.steps has no value: a whole number must follow"),
    ("--trainer.steps --mesh.fsdp 2", "--trainer.steps has no value: a whole number must follow"),
    ("--model.embedding_scale", "--model.embedding_scale has no value: true or false must follow"),
    ("--config", "--config has no value"),
    ("--quick=yes", "--quick takes no value, but 'yes' was given"),
    ("trainer.steps 5", "'trainer.steps' is not an override, --section.field VALUE is one"),
    ("-trainer.steps 5", "'-trainer.steps' is not an override, --section.field VALUE is one"),
    # a value of the wrong type
    ("--trainer.steps 1e3", "trainer.steps='1e3' is not a whole number, write 1000"),
    ("--trainer.steps 0.5", "trainer.steps='0.5' is not a whole number"),
    ("--trainer.steps many", "trainer.steps='many' is not a whole number"),
    ("--trainer.steps=", "trainer.steps='' is not a whole number"),
    ("--optimizer.learning_rate fast", "optimizer.learning_rate='fast' is not a number"),
    ("--optimizer.learning_rate nan", "optimizer.learning_rate=nan is not finite: a number is allowed"),
    ("--model.embedding_scale maybe", "model.embedding_scale='maybe' is not true or false"),
    # a value that is not allowed
    ("--trainer.steps 0", "trainer.steps=0 is out of range: a whole number at least 1 is allowed"),
    ("--optimizer.beta1 1", "optimizer.beta1=1.0 is out of range: a number at least 0 and below 1 is allowed"),
    (
        "--optimizer.name adam",
        "optimizer.name='adam' is not one of adamw, sgd, lion, muon, schedule-free, shampoo, soap, perhaps adamw",
    ),
    (
        "--optimizer.name lamb",
        "optimizer.name='lamb' is not one of adamw, sgd, lion, muon, schedule-free, shampoo, soap",
    ),
    ("--model.pattern rec,atn", "model.pattern='atn' is not one of rec, attn, perhaps attn"),
    # values that contradict each other
    (
        "--mesh.sequence 3",
        "data.sequence_length=256 is not a multiple of mesh.sequence=3, the devices that share a sequence",
    ),
    (
        "--model.attention_blocks 100",
        "model.attention_blocks=(100,) is not one or eight multiples of 128 (0 for the default)",
    ),
    (
        "--model.attention_blocks 128,256",
        "model.attention_blocks=(128, 256) is not one or eight multiples of 128 (0 for the default)",
    ),
    ("--model.num_heads 5", "model.num_heads=5 does not divide model.width=128: the nearest that does is 4"),
    (  # found at once, without counting to a billion
        "--model.width 1_000_000_000_001",
        "model.num_heads=4 does not divide model.width=1000000000001: the nearest that does is 1",
    ),
    (
        "--model.num_heads 64",
        "model.num_heads=64 gives heads of 2 features: rotary embedding of half a head needs a multiple of 4",
    ),
    (
        "--trainer.remat layer --trainer.save qkv,mlp_pu",
        "trainer.save=('qkv', 'mlp_pu'): 'mlp_pu' is not a tensor of this griffin's layers, which have input, rnn_in, rnn, "
        "rnn_out, qkv, context, attn_out, mlp_up, perhaps mlp_up",
    ),
    (
        "--trainer.remat layer --model.pattern rec --trainer.offload qkv",
        "trainer.offload=('qkv',): 'qkv' is not a tensor of this griffin's layers, which have input, rnn_in, rnn, rnn_out, "
        "mlp_up",
    ),
    (
        "--trainer.offload qkv",
        "trainer.offload=('qkv',) contradicts trainer.remat='dots': names say what trainer.remat='layer' keeps",
    ),
    (
        "--trainer.remat layer --trainer.offload qkv --trainer.save qkv",
        "trainer.offload=('qkv',) contradicts trainer.save=('qkv',): qkv can be kept on the host or on the device, not on both",
    ),
    (
        "--mesh.fsdp -1",
        "mesh.fsdp=-1 contradicts mesh.data=-1: only one axis can take the devices that are left",
    ),
    (
        "--mesh.data 0",
        "mesh.data=0 leaves no device: give a positive number, or -1 for the devices the other axes leave",
    ),
]


@pytest.mark.parametrize(("line", "sentence"), COMMAND_LINES, ids=[line for line, _ in COMMAND_LINES])
def test_a_mistake_on_the_command_line_is_one_sentence(line, sentence):
    with pytest.raises(ConfigError) as error:
        resolve("griffin-tiny", line.split(), {"run": "FOLDER", "quick": ""})
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--model.stem_widths 8,a,8,8", "model.stem_widths='a' is not a whole number"),
        ("--model.stem_widths 8,8,8", "model.stem_widths=(8, 8, 8) has 3 entries, the stem has 4 convolutions"),
        ("--model.depths 1,1", "model.depths=(1, 1) has 2 stages but model.widths=(64, 96, 128, 128) has 4"),
        (
            "--model.group_width 64",
            "model.group_width=64 is wider than the 32 channels inside a block: "
            "model.bottleneck=0.5 of model.widths=(64, 96, 128, 128)",
        ),
        ("--model.window 8", "--model.window is a field of griffin and gemma, but model.kind is nfnet"),
        ("--data.source photos", "data.channels=1 does not fit data.source='photos': colour images have 3"),
    ],
)
def test_a_mistake_in_an_image_config_is_one_sentence(line, sentence):
    with pytest.raises(ConfigError) as error:
        resolve("nfnet-tiny", line.split())
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("grifin-tiny", "there is no config 'grifin-tiny', perhaps griffin-tiny"),
        ("Griffin_Tiny", "there is no config 'Griffin_Tiny', perhaps griffin-tiny"),
        ("xyz", "there is no config 'xyz', `podwright configs` lists them"),
        ("", "there is no config '', `podwright configs` lists them"),
        ("missing/run", "missing/run cannot be read: no such file or directory"),
        ("x" * 300 + ".json", "x" * 300 + ".json cannot be read: file name too long"),
    ],
)
def test_a_config_that_does_not_exist_is_one_sentence(name, sentence):
    with pytest.raises(ConfigError) as error:
        resolve(name)
    assert str(error.value) == sentence


FILES = [
    ("", "FILE is not JSON: expecting value at line 1, column 1"),
    ('{"mesh": {"fsdp": 8}', "FILE is not JSON: expecting ',' delimiter at line 1, column 21"),
    ("[1]", 'FILE is not a config: an object such as {"mesh": {"fsdp": 8}} is one'),
    ("[" * 100_000, "FILE is not a config: its numbers are too long or its brackets too deep"),
    (
        '{"mesh": {"fsdp": ' + "1" * 5000 + "}}",
        "FILE is not a config: its numbers are too long or its brackets too deep",
    ),
    ('{"mesh": {"fsdp": 8, "fsdp": 4}}', "FILE: fsdp stands there twice"),
    ('{"mesh": 8}', "FILE: mesh=8 is not a section, an object of its fields is allowed"),
    ('{"mesh": {"fdsp": 8}}', "FILE: mesh.fdsp is not a field, perhaps mesh.fsdp"),
    ('{"mehs": {"fsdp": 8}}', "FILE: mehs.fsdp is not a field, perhaps mesh.fsdp"),
    ('{"fsdp": 8}', "FILE: fsdp is not a field, perhaps mesh.fsdp"),
    ('{"mesh": {"kind": "big"}}', "FILE: mesh.kind is not a field, mesh has replica, data, fsdp, sequence, tensor"),
    ('{"mesh": {"fsdp": "8"}}', "FILE: mesh.fsdp='8' is not a whole number"),
    ('{"mesh": {"fsdp": 8.0}}', "FILE: mesh.fsdp=8.0 is not a whole number"),
    ('{"mesh": {"fsdp": true}}', "FILE: mesh.fsdp=True is not a whole number"),
    ('{"mesh": {"fsdp": null}}', "FILE: mesh.fsdp=None is not a whole number"),
    ('{"mesh": {"fsdp": -2}}', "FILE: mesh.fsdp=-2 is out of range: a whole number at least -1 is allowed"),
    ('{"optimizer": {"eps": NaN}}', "FILE: optimizer.eps=nan is not finite: a number is allowed"),
    ('{"optimizer": {"eps": 1' + "0" * 400 + "}}", "FILE: optimizer.eps is not finite: a number is allowed"),
    ('{"model": {"pattern": "rec"}}', "FILE: model.pattern='rec' is not words separated by commas"),
    ('{"model": {"pattern": []}}', "FILE: model.pattern=() is not words separated by commas"),
    ('{"model": {"head_dim": 64}}', "FILE: model.head_dim is a field of gemma, but model.kind is griffin"),
    (
        '{"model": {"kind": "gemma"}}',
        "FILE: model.kind='gemma' cannot replace 'griffin', start from a config of that kind",
    ),
    ('{"name": 3}', "FILE: name=3 is not text"),
]


@pytest.mark.parametrize(("text", "sentence"), FILES, ids=[text[:40] for text, _ in FILES])
def test_a_mistake_in_a_file_is_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "part.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        resolve("griffin-tiny", ["--config", str(file)])
    assert str(error.value).startswith(sentence.replace("FILE", str(file)))
    assert "\n" not in str(error.value)


def test_a_contradiction_with_a_file_says_which_field_is_from_it(tmp_path):
    file = tmp_path / "part.json"
    file.write_text('{"model": {"width": 96}}')
    with pytest.raises(ConfigError) as error:
        resolve("griffin-tiny", ["--config", str(file), "--model.num_heads", "5"])
    assert str(error.value) == (
        "model.num_heads=5 does not divide model.width=96: the nearest that does is 4 "
        f"(model.width is from file {file})"
    )


@pytest.mark.parametrize(
    ("section", "change", "sentence"),
    [
        (
            "model",
            {},
            "config.json: model.kind is missing, one of griffin, gemma, lru, nfnet "
            "(part of a config can follow the name of one: --config config.json)",
        ),
        ("model", {"kind": "grifin"}, "config.json: model.kind='grifin' does not exist, perhaps griffin"),
        ("model", {"kind": []}, "config.json: model.kind=[] does not exist, there are griffin, gemma, lru, nfnet"),
        (
            "data",
            {"kind": "images"},
            "config.json: data.kind='images' contradicts model.kind='griffin': griffin trains on text",
        ),
        (
            "model",
            {"kind": "griffin", "num_heads": 5},
            "config.json: model.num_heads=5 does not divide model.width=128: the nearest that does is 4",
        ),
    ],
)
def test_a_mistake_in_a_saved_config_is_one_sentence(section, change, sentence):
    tree = json.loads(to_json(resolve("griffin-tiny").config)) | {section: change}
    with pytest.raises(ConfigError) as error:
        from_json(json.dumps(tree))
    assert str(error.value) == sentence


def test_a_file_that_is_no_text_is_one_sentence(tmp_path):
    file = tmp_path / "part.json"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError) as error:
        resolve("griffin-tiny", ["--config", str(file)])
    assert str(error.value) == f"{file} cannot be read: not UTF-8 text"


def test_a_mistake_in_an_experiment_names_the_whole_path_too():
    with pytest.raises(ConfigError, match=r"^model\.num_heads=5 does not divide model\.width=128"):
        GriffinConfig(num_heads=5)


@pytest.mark.parametrize("parts", [(GriffinConfig(), ImageData()), (NFNetConfig(), TextData())])
def test_a_model_does_not_accept_the_other_modality(parts):
    with pytest.raises(ConfigError, match=r"data\.kind='\w+' contradicts model\.kind='\w+': \w+ trains on"):
        Config(name="mixed", model=parts[0], data=parts[1])


def test_a_window_longer_than_a_row_is_told_though_allowed():
    notes = resolve("griffin-tiny", ["--model.window", "512"]).config.notes()
    assert notes == ["model.window=512 is longer than data.sequence_length=256: attention sees whole rows"]
    assert resolve("griffin-tiny", ["--model.window", "256"]).config.notes() == []
    assert resolve("nfnet-tiny").config.notes() == []


@pytest.mark.parametrize(("size", "left"), [(224, 14), (192, None), (256, None)])
def test_where_devices_stop_to_share_an_image_is_told(size, left):
    words = ["--data.image_size", str(size), "--mesh.sequence", "2"]
    notes = resolve("nfnet-f0", words).config.notes()
    assert [note.split(" until ")[1].split(" are ")[0] for note in notes] == ([str(left)] if left else [])
