"""Small NFNets as timm and DeepMind publish theirs, written out name by name with nothing of ours but the sizes."""

import pathlib
import pickle
import zlib

import numpy as np

from configs.schema import NFNetConfig

# The second has fewer channels inside its first block than half its width, as "+" variants do: 24 are cut to a group of 16.
MODELS = {
    "tiny": NFNetConfig(
        num_classes=10,
        channels=3,
        stem_widths=(2, 4, 8, 16),
        widths=(32, 64, 96, 96),
        depths=(1, 2, 1, 1),
        group_width=16,
        head_width=192,
        ws_eps_mode="add_var",
        gelu_approximate=False,
    ),
    "plus": NFNetConfig(
        num_classes=7,
        channels=3,
        stem_widths=(3, 6, 12, 24),
        widths=(48, 96),
        depths=(1, 4),
        group_width=16,
        head_width=64,
        ws_eps_mode="add_var",
        gelu_approximate=False,
    ),
}
INSIDE = {"tiny": (16, 32, 48, 48), "plus": (16, 48)}  # channels of a stage's 3x3 convolutions
TIMM_ARGUMENTS = {
    name: dict(
        model_name="dm_nfnet_f0",
        num_classes=model.num_classes,
        depths=model.depths,
        channels=model.widths,
        group_size=model.group_width,
        stem_chs=model.stem_widths[-1],
        num_features=model.head_width,
    )
    for name, model in MODELS.items()
}
# An even and an odd size: strides pad them differently.
IMAGES = {size: np.random.default_rng(size).standard_normal((2, size, size, 3)).astype(np.float32) for size in (64, 75)}
Arrays = dict[str, np.ndarray]


def weights(classes: int) -> np.ndarray:
    """Of logits (2 classes) in the scalar whose gradient is compared."""
    return np.random.default_rng(5).standard_normal((2, classes)).astype(np.float32)


def timm_shapes(name: str) -> dict[str, tuple[int, ...]]:
    model, found = MODELS[name], {}

    def conv(to: str, out: int, into: int, side: int) -> None:
        found.update({f"{to}.weight": (out, into, side, side), f"{to}.gain": (out, 1, 1, 1), f"{to}.bias": (out,)})

    before = 3
    for i, width in enumerate(model.stem_widths):
        conv(f"stem.conv{i + 1}", width, before, 3)
        before = width
    for s, (width, depth, inside) in enumerate(zip(model.widths, model.depths, INSIDE[name], strict=True)):
        for b in range(depth):
            block = f"stages.{s}.{b}"
            found[f"{block}.skipinit_gain"] = ()
            if b == 0:
                conv(f"{block}.downsample.conv", width, before, 1)
            conv(f"{block}.conv1", inside, before, 1)
            conv(f"{block}.conv2", inside, model.group_width, 3)
            conv(f"{block}.conv2b", inside, model.group_width, 3)
            conv(f"{block}.conv3", width, inside, 1)
            for fc, out, into in (("fc1", width // 2, width), ("fc2", width, width // 2)):
                found[f"{block}.attn_last.{fc}.weight"] = (out, into, 1, 1)
                found[f"{block}.attn_last.{fc}.bias"] = (out,)
            before = width
    conv("final_conv", model.head_width, before, 1)
    found |= {"head.fc.weight": (model.num_classes, model.head_width), "head.fc.bias": (model.num_classes,)}
    return found


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Telling values: convolutions so small that eps matters, no gain, bias or skip gain that could be left out."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape)
    if name.endswith("skipinit_gain"):
        x = rng.uniform(0.5, 1.0)
    elif name.endswith("gain"):
        x = 1 + 0.3 * x
    elif name.endswith("bias"):
        x = 0.1 * x
    elif "attn_last" in name:
        x = 3 * x / shape[1] ** 0.5
    elif name.startswith("head"):
        x = x / shape[1] ** 0.5
    else:
        x = 0.1 * x / np.prod(shape[1:]) ** 0.5
    return np.asarray(x, np.float32)


def timm_parameters(name: str) -> Arrays:
    return {tensor: value(tensor, shape) for tensor, shape in timm_shapes(name).items()}


CONVS = {"conv1": "conv0", "conv2": "conv1", "conv2b": "conv1b", "conv3": "conv2", "downsample.conv": "conv_shortcut"}
DENSE = {"attn_last.fc1": "squeeze_excite/~/linear", "attn_last.fc2": "squeeze_excite/~/linear_1"}


def haiku_parameters(name: str) -> dict[str, Arrays]:
    """The same parameters as DeepMind names and turns them."""
    timm, model = timm_parameters(name), MODELS[name]

    def conv(theirs: str) -> Arrays:
        w = timm[f"{theirs}.weight"].transpose(2, 3, 1, 0)
        return {"w": w.copy(), "gain": timm[f"{theirs}.gain"].ravel(), "bias": timm[f"{theirs}.bias"]}

    found = {f"NFNet/~/stem_conv{i}": conv(f"stem.conv{i + 1}") for i in range(4)}
    index = 0
    for s, depth in enumerate(model.depths):
        for b in range(depth):
            block, theirs = "NFNet/~/nf_block" + (f"_{index}" if index else ""), f"stages.{s}.{b}"
            found[block] = {"skip_gain": timm[f"{theirs}.skipinit_gain"]}
            for timm_name, haiku_name in CONVS.items():
                if b == 0 or timm_name != "downsample.conv":
                    found[f"{block}/~/{haiku_name}"] = conv(f"{theirs}.{timm_name}")
            for timm_name, haiku_name in DENSE.items():
                w = timm[f"{theirs}.{timm_name}.weight"][:, :, 0, 0].T.copy()
                found[f"{block}/~/{haiku_name}"] = {"w": w, "b": timm[f"{theirs}.{timm_name}.bias"]}
            index += 1
    found["NFNet/~/final_conv"] = conv("final_conv")
    found["NFNet/~/linear"] = {"w": timm["head.fc.weight"].T.copy(), "b": timm["head.fc.bias"]}
    return found


def write_pickle(file: pathlib.Path, tree: object, protocol: int = 4) -> pathlib.Path:
    file.write_bytes(pickle.dumps(tree, protocol=protocol))
    return file


def directions(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()) + 1)
    return rng.standard_normal((8, int(np.prod(shape)))).astype(np.float32)
