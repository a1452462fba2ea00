"""NFNet's forward pass written from the paper in numpy: float64, loops, no jax, nothing of ours but the config."""

import math

import numpy as np


def np_gelu(x, approximate):
    if approximate:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def np_same(side, window, stride):
    """Output side and the padding before the first pixel."""
    out = -(-side // stride)
    return out, max((out - 1) * stride + window - side, 0) // 2


def np_windows(x, window, stride):
    """Yields (row, column, tap row, tap column, pixel [B, C]) of every tap inside the image."""
    height, pad_y = np_same(x.shape[1], window, stride)
    width, pad_x = np_same(x.shape[2], window, stride)
    for row in range(height):
        for column in range(width):
            for i in range(window):
                for j in range(window):
                    y, z = row * stride + i - pad_y, column * stride + j - pad_x
                    if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
                        yield row, column, i, j, x[:, y, z]


def np_conv(p, name, x, config, stride=1, groups=1):
    kernel, gain, bias = p[f"{name}/kernel"], p[f"{name}/gain"], p[f"{name}/bias"]
    window, _, group_in, out = kernel.shape
    standard = np.empty_like(kernel)
    for o in range(out):
        w = kernel[..., o]
        centred = w - w.sum() / w.size
        variance = (centred**2).sum() / w.size
        if config.ws_eps_mode == "max_nvar":
            standard[..., o] = centred * gain[o] / math.sqrt(max(w.size * variance, 1e-4))
        else:
            standard[..., o] = centred * gain[o] / math.sqrt(w.size * (variance + 1e-5))
    y = np.zeros((x.shape[0], -(-x.shape[1] // stride), -(-x.shape[2] // stride), out)) + bias
    for row, column, i, j, pixel in np_windows(x, window, stride):
        for g in range(groups):
            outs = slice(g * out // groups, (g + 1) * out // groups)
            y[:, row, column, outs] += pixel[:, g * group_in : (g + 1) * group_in] @ standard[i, j, :, outs]
    return y


def np_pool(x):
    total = np.zeros((x.shape[0], -(-x.shape[1] // 2), -(-x.shape[2] // 2), x.shape[3]))
    count = np.zeros(total.shape)
    for row, column, _, _, pixel in np_windows(x, 2, 2):
        total[:, row, column] += pixel
        count[:, row, column] += 1
    return total / count


def np_forward(p, config, x):
    def act(x):
        return 1.7015043497085571 * np_gelu(x, config.gelu_approximate)

    x = np_conv(p, "stem/conv_0", x, config, stride=2)
    x = np_conv(p, "stem/conv_1", act(x), config)
    x = np_conv(p, "stem/conv_2", act(x), config)
    x = np_conv(p, "stem/conv_3", act(x), config, stride=2)
    expected_std = 1.0
    for s, depth in enumerate(config.depths):
        for b in range(depth):
            name = f"stages/stage_{s}/block_{b}"
            stride = 2 if s > 0 and b == 0 else 1
            groups = math.floor(config.bottleneck * config.widths[s] / config.group_width)
            h = act(x) / expected_std
            if b == 0:
                x = np_conv(p, f"{name}/shortcut", np_pool(h) if stride == 2 else h, config)
            h = act(np_conv(p, f"{name}/reduce", h, config))
            h = act(np_conv(p, f"{name}/spatial_0", h, config, stride, groups))
            h = act(np_conv(p, f"{name}/spatial_1", h, config, 1, groups))
            h = np_conv(p, f"{name}/expand", h, config)
            z = h.mean((1, 2)) @ p[f"{name}/squeeze/kernel"] + p[f"{name}/squeeze/bias"]
            z = np.maximum(z, 0) @ p[f"{name}/excite/kernel"] + p[f"{name}/excite/bias"]
            h = h * 2 / (1 + np.exp(-z))[:, None, None, :]
            x = x + config.alpha * p[f"{name}/skip_gain"] * h
            expected_std = math.sqrt((1 if b == 0 else expected_std**2) + config.alpha**2)
    features = act(np_conv(p, "final_conv", x, config)).mean((1, 2))
    return features @ p["head/kernel"] + p["head/bias"]
