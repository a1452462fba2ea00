"""NFNet's arrays in timm's state dicts and in DeepMind's Haiku files: one row a parameter, both directions.

Names shift between the two: Haiku's conv0, conv1, conv1b, conv2 are timm's conv1, conv2, conv2b, conv3. Shapes: K kernel
side, I and O channels in and out; of a grouped convolution, I is of one group in all three, so that groups need no more.
"""

from collections.abc import Callable, Iterator

from configs.schema import ConfigError, NFNetConfig
from models.convert.layout import Layout, Place, Row
from models.nfnet import STEM_STRIDES, plan_blocks

HAIKU = "NFNet/~/"
BLOCK_CONVS = {  # ours: timm's, Haiku's
    "reduce": ("conv1", "conv0"),
    "spatial_0": ("conv2", "conv1"),
    "spatial_1": ("conv2b", "conv1b"),
    "expand": ("conv3", "conv2"),
}
BLOCK_DENSE = {
    "squeeze": ("attn_last.fc1", "squeeze_excite/~/linear"),
    "excite": ("attn_last.fc2", "squeeze_excite/~/linear_1"),
}
Rows = dict[str, Row]


def modules(model: NFNetConfig) -> Iterator[tuple[str, str, str, str]]:
    """(kind, our name, timm's, Haiku's) of everything that has parameters, in the order of the network.

    Kinds: "conv", "gate" (a dense layer of squeeze-excite), "dense", and "gain", a single scalar."""
    for i in range(len(STEM_STRIDES)):
        yield "conv", f"stem/conv_{i}", f"stem.conv{i + 1}", f"{HAIKU}stem_conv{i}"
    for index, plan in enumerate(plan_blocks(model)):
        if plan.projects and plan.stride == 1 and plan.channels_in == plan.channels_out:
            raise ConfigError(
                f"neither timm nor DeepMind's network can represent {model.show('stem_widths')} beside "
                f"{model.show('widths')}: they project no shortcut where widths agree"
            )
        ours, theirs = "stages/" + "/".join(plan.name), f"stages.{plan.stage}.{plan.block}"
        haiku = f"{HAIKU}nf_block" + (f"_{index}" if index else "")
        for name, (timm_name, haiku_name) in BLOCK_CONVS.items():
            yield "conv", f"{ours}/{name}", f"{theirs}.{timm_name}", f"{haiku}/~/{haiku_name}"
        if plan.projects:
            yield "conv", f"{ours}/shortcut", f"{theirs}.downsample.conv", f"{haiku}/~/conv_shortcut"
        for name, (timm_name, haiku_name) in BLOCK_DENSE.items():
            yield "gate", f"{ours}/{name}", f"{theirs}.{timm_name}", f"{haiku}/~/{haiku_name}"
        yield "gain", f"{ours}/skip_gain", f"{theirs}.skipinit_gain", f"{haiku}/skip_gain"
    yield "conv", "final_conv", "final_conv", f"{HAIKU}final_conv"
    yield "dense", "head", "head.fc", f"{HAIKU}linear"


def _timm_conv(name: str) -> Rows:
    return {
        "/kernel": Row(
            (f"{name}.weight",),
            lambda x: (x.transpose(3, 2, 0, 1),),  # (K K I O) is their (O I K K)
            lambda parts: parts[0].transpose(2, 3, 1, 0),
        ),
        "/gain": Row((f"{name}.gain",), lambda x: (x.reshape(-1, 1, 1, 1),)),
        "/bias": Row((f"{name}.bias",)),
    }


def _timm_gate(name: str) -> Rows:
    kernel = Row(  # (I O) is their convolution of one pixel, (O I 1 1)
        (f"{name}.weight",), lambda x: (x.T[:, :, None, None],), lambda parts: parts[0][:, :, 0, 0].T
    )
    return {"/kernel": kernel, "/bias": Row((f"{name}.bias",))}


def _timm_dense(name: str) -> Rows:
    return {
        "/kernel": Row((f"{name}.weight",), lambda x: (x.T,), lambda parts: parts[0].T),
        "/bias": Row((f"{name}.bias",)),
    }


def _haiku_conv(name: str) -> Rows:
    return {"/kernel": Row((f"{name}/w",)), "/gain": Row((f"{name}/gain",)), "/bias": Row((f"{name}/bias",))}


def _haiku_dense(name: str) -> Rows:
    return {"/kernel": Row((f"{name}/w",)), "/bias": Row((f"{name}/b",))}


def _scalar(name: str) -> Rows:
    return {"": Row((name,))}


TIMM: dict[str, Callable[[str], Rows]] = {
    "conv": _timm_conv,
    "gate": _timm_gate,
    "dense": _timm_dense,
    "gain": _scalar,
}
HAIKU_ROWS: dict[str, Callable[[str], Rows]] = {
    "conv": _haiku_conv,
    "gate": _haiku_dense,
    "dense": _haiku_dense,
    "gain": _scalar,
}


def timm(model: NFNetConfig) -> Layout:
    rows = [(ours, TIMM[kind](theirs)) for kind, ours, theirs, _ in modules(model)]
    return Layout("timm", listed=_places(rows))


def haiku(model: NFNetConfig) -> Layout:
    """Names of module and parameter, joined by a slash."""
    rows = [(ours, HAIKU_ROWS[kind](theirs)) for kind, ours, _, theirs in modules(model)]
    return Layout("haiku", listed=_places(rows))


def _places(modules: list[tuple[str, Rows]]) -> list[Place]:
    return [Place(ours + name, None, row, row.theirs) for ours, rows in modules for name, row in rows.items()]
