"""What a run is. `EXPERIMENTS` says which ones exist: one function and one line an experiment."""

from collections.abc import Callable

from configs import gemma, griffin, nfnet
from configs.schema import Config

EXPERIMENTS: dict[str, Callable[[], Config]] = {
    "griffin-tiny": griffin.tiny,
    "gemma-tiny": gemma.tiny,
    "gemma1-tiny": gemma.gemma1_tiny,
    "gemma2-tiny": gemma.gemma2_tiny,
    "nfnet-tiny": nfnet.tiny,
    **griffin.PAPER,
    "recurrentgemma-2b": griffin.recurrentgemma_2b,
    "recurrentgemma-9b": griffin.recurrentgemma_9b,
    **gemma.PUBLISHED,
}
