"""The mathematics. `FAMILIES` says which models exist: one file and one line a family."""

from collections.abc import Callable
from dataclasses import dataclass

from models import gemma, griffin, lru, nfnet, state


@dataclass(frozen=True)
class Family:
    """What a trainer asks of a family of models."""

    model: Callable  # (config, init) -> module
    train_flops: Callable[..., float]  # (config, tokens a row or pixels a side) -> FLOPs a token or image
    decays: Callable[[str], bool]  # parameter name -> weight decay applies
    clips: Callable[[str], bool] = lambda name: True  # parameter name -> adaptive gradient clipping applies
    below_head: Callable[..., int] = lambda config, name: (
        0
    )  # (config, parameter name) -> blocks between it and the head
    # (config) -> parameter name -> of the learning rate; None: 1 for all
    rates: Callable[..., Callable[[str], float] | None] = lambda config: None
    prepare: Callable | None = None  # model -> what gives the same and costs less when it is called several times
    init_state: Callable | None = (
        None  # (config, batch, dtype, spec, capacity) -> what a model passes on from call to call
    )


FAMILIES = {
    "griffin": Family(griffin.Griffin, griffin.train_flops, griffin.decays, init_state=state.init_state),
    "gemma": Family(gemma.Gemma, gemma.train_flops, gemma.decays, init_state=state.init_state),
    "lru": Family(lru.LRUModel, lru.train_flops, lru.decays, rates=lru.rates, init_state=state.init_state),
    "nfnet": Family(
        nfnet.NFNet, nfnet.train_flops, nfnet.decays, nfnet.clips, nfnet.below_head, prepare=nfnet.standardised
    ),
}
