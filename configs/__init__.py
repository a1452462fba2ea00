"""What a run is. `EXPERIMENTS` says which ones exist: one function and one line an experiment."""

from collections.abc import Callable

from configs import gemma, griffin, nfnet, studies
from configs.schema import Config

EXPERIMENTS: dict[str, Callable[[], Config]] = {
    "griffin-tiny": griffin.tiny,
    "gemma-tiny": gemma.tiny,
    "nfnet-tiny": nfnet.tiny,
    **griffin.PAPER,
    "recurrentgemma-2b": griffin.recurrentgemma_2b,
    "recurrentgemma-9b": griffin.recurrentgemma_9b,
    **studies.STUDIES,
}
