"""Which numbers of devices can share the rows of an image (`mesh.sequence`), and until where in the network they do."""

from typing import Any

from configs.section import ConfigError


def check_shared_images(data: Any, mesh: Any) -> None:
    """Raises ConfigError where the first stride of 2 does not divide a device's rows."""
    size = data.image_size
    if mesh.sequence > 1 and size % (2 * mesh.sequence):
        numbers = [n for n in range(1, size // 2 + 1) if size % (2 * n) == 0] or [1]
        nearest = min(numbers, key=lambda n: abs(n - mesh.sequence))
        raise ConfigError(
            f"{mesh.show('sequence')} devices can't share the {size} rows of an image ({data.show('image_size')}) in pairs: "
            f"the nearest number that can is {nearest}"
        )


def whole_images(model: Any, data: Any, mesh: Any) -> list[str]:
    """The sentence that says where devices that share an image stop to."""
    rows = data.image_size
    for _ in range(len(model.widths) + 1):  # two strides of 2 in the stem, one in every stage but the first
        if mesh.sequence > 1 and rows % (2 * mesh.sequence):
            return [
                f"{mesh.show('sequence')} devices share an image's rows until {rows} are left, which they can't halve: from "
                f"there on each takes whole images"
            ]
        rows //= 2
    return []
