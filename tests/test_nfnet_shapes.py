"""NFNets of every published size are known by the shapes of their tensors, in timm's names and in Haiku's."""

import dataclasses

import numpy as np
import pytest
from published_nfnet import MODELS, timm_shapes

from configs import EXPERIMENTS
from configs.nfnet import VARIANTS
from models.convert import nfnet, nfnet_config
from models.convert.layout import their_shapes
from models.convert.tensors import Tensor
from models.nfnet import plan_blocks, se_width


def fake(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    def nothing(first: int, end: int) -> np.ndarray:
        raise AssertionError("a shape is enough")

    return {name: Tensor(shape, np.dtype(np.float32), nothing) for name, shape in shapes.items()}


def shapes_of(name: str, layout: str) -> dict[str, tuple[int, ...]]:
    """A published model's tensors in a layout: names from its table, shapes from the config alone."""
    model = EXPERIMENTS[name]().model
    blocks = {"/".join(plan.name): plan for plan in plan_blocks(model)}
    ours: dict[str, tuple[int, ...]] = {}

    def conv(to: str, side: int, into: int, out: int) -> None:
        ours.update({f"{to}/kernel": (side, side, into, out), f"{to}/gain": (out,), f"{to}/bias": (out,)})

    for i, (into, out) in enumerate(zip((3, *model.stem_widths), model.stem_widths, strict=False)):
        conv(f"stem/conv_{i}", 3, into, out)
    for block, plan in blocks.items():
        conv(f"stages/{block}/reduce", 1, plan.channels_in, plan.mid)
        conv(f"stages/{block}/spatial_0", 3, model.group_width, plan.mid)
        conv(f"stages/{block}/spatial_1", 3, model.group_width, plan.mid)
        conv(f"stages/{block}/expand", 1, plan.mid, plan.channels_out)
        if plan.block == 0:
            conv(f"stages/{block}/shortcut", 1, plan.channels_in, plan.channels_out)
        hidden = se_width(model, plan.channels_out)
        for part, into, out in (("squeeze", plan.channels_out, hidden), ("excite", hidden, plan.channels_out)):
            ours |= {f"stages/{block}/{part}/kernel": (into, out), f"stages/{block}/{part}/bias": (out,)}
        ours[f"stages/{block}/skip_gain"] = ()
    conv("final_conv", 1, model.widths[-1], model.head_width)
    ours |= {"head/kernel": (model.head_width, 1000), "head/bias": (1000,)}
    return their_shapes(model, {"timm": nfnet.timm, "haiku": nfnet.haiku}[layout](model), ours)


@pytest.mark.parametrize("layout", ["timm", "haiku"])
@pytest.mark.parametrize("name", [f"nfnet-{variant}" for variant in VARIANTS])
def test_every_published_size_is_known_by_its_shapes(tmp_path, name, layout):
    shapes = shapes_of(name, layout)
    expected = dataclasses.replace(EXPERIMENTS[name]().model, **nfnet_config.CONVENTIONS[layout])
    assert nfnet_config.model_of(layout, tmp_path, fake(shapes)) == expected
    head = {"timm": "head.fc.weight", "haiku": "NFNet/~/linear/w"}[layout]
    shapes[head] = tuple(5 if side == 1000 else side for side in shapes[head])
    found = nfnet_config.model_of(layout, tmp_path, fake(shapes))
    assert found == dataclasses.replace(expected, num_classes=5)


def test_timm_dm_nfnet_f0_has_233_tensors_and_its_gains_four_axes():
    shapes = shapes_of("nfnet-f0", "timm")
    assert len(shapes) == 233
    assert shapes["stages.2.0.conv2.gain"] == (768, 1, 1, 1)
    assert shapes["stages.2.0.conv2.weight"] == (768, 128, 3, 3)
    assert shapes["stages.0.0.attn_last.fc1.weight"] == (128, 256, 1, 1)
    assert shapes["stages.3.2.skipinit_gain"] == ()


def test_haikus_conv0_is_timms_conv1():
    shapes = shapes_of("nfnet-f0", "haiku")
    assert shapes["NFNet/~/nf_block_11/~/conv0/w"] == (1, 1, 1536, 768)
    assert shapes["NFNet/~/nf_block_11/~/conv1/w"] == (3, 3, 128, 768)
    assert shapes["NFNet/~/nf_block_11/~/conv2/w"] == (1, 1, 768, 1536)
    assert "NFNet/~/nf_block_9/~/conv_shortcut/w" in shapes
    assert "NFNet/~/nf_block_10/~/conv_shortcut/w" not in shapes


def test_a_plus_models_stem_is_16_32_64_192_and_its_first_stage_has_one_group():
    for name in (name for name in EXPERIMENTS if name.startswith("nfnet-f") and name.endswith("plus")):
        model = EXPERIMENTS[name]().model
        assert model.stem_widths == (16, 32, 64, 192)
        inside = {plan.stage: (plan.mid, plan.groups) for plan in plan_blocks(model)}
        assert inside == {0: (128, 1), 1: (384, 3), 2: (1024, 8), 3: (1024, 8)}


@pytest.mark.parametrize("name", MODELS)
def test_the_models_of_the_golden_file_have_the_names_of_the_table(name):
    assert set(timm_shapes(name)) == {theirs for place in nfnet.timm(MODELS[name]).listed for theirs in place.theirs}
