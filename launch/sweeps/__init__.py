"""The sweeps of `podwright sweep`: one function that yields configs, and one line, each."""

from collections.abc import Callable, Iterator

from configs.schema import Config
from launch.sweeps import convnets, griffins, long_range

SWEEPS: dict[str, Callable[[], Iterator[Config]]] = {
    "griffin-law": griffins.law,
    "griffin-rates": griffins.rates,
    "first-token-rates": long_range.first_token,
    "listops-rates": long_range.listops,
    "convnets-scale": convnets.small,
    "convnets-scale-full": convnets.published,
}


def summary(sweep: Callable) -> str:
    return (sweep.__doc__ or "").strip().splitlines()[0]
