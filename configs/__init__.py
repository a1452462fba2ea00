"""What a run is. `EXPERIMENTS` says which ones exist: one function and one line an experiment."""

from collections.abc import Callable

from configs import chat, cvs, facts, gemma, griffin, image_studies, long_range, lru, nfnet, private, studies
from configs.schema import Config

RELEASED: dict[str, Callable[[], Config]] = {
    "recurrentgemma-2b": griffin.recurrentgemma_2b,
    "recurrentgemma-9b": griffin.recurrentgemma_9b,
    **gemma.PUBLISHED,
}
TINY: dict[str, Callable[[], Config]] = {
    "griffin-tiny": griffin.tiny,
    "gemma-tiny": gemma.tiny,
    "gemma1-tiny": gemma.gemma1_tiny,
    "gemma2-tiny": gemma.gemma2_tiny,
    "lru-tiny": lru.tiny,
}
EXPERIMENTS: dict[str, Callable[[], Config]] = {
    **TINY,
    "nfnet-tiny": nfnet.tiny,
    **nfnet.PUBLISHED,
    **griffin.PAPER,
    **RELEASED,
    **{f"{name}-chat": chat.chat(experiment) for name, experiment in {**TINY, **RELEASED}.items()},
    "cv-tiny": cvs.tiny,
    **studies.STUDIES,
    **facts.FACTS,
    **image_studies.STUDIES,
    **private.PRIVATE,
    **long_range.LONG_RANGE,
}
