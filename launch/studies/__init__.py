"""The studies of `podwright study`: one file and one line each."""

from launch.studies import (
    agc,
    associative_memory,
    context_voids,
    digits,
    facts,
    long_context,
    long_range,
    optimizers,
    private,
    recall,
    universality,
)
from launch.studies.study import Study

STUDIES: dict[str, Study] = {
    "long-context": long_context.STUDY,
    "selective-copy": recall.SELECTIVE_COPY,
    "induction": recall.INDUCTION,
    "first-token": long_range.FIRST_TOKEN,
    "listops": long_range.LISTOPS,
    "agc": agc.STUDY,
    "digits": digits.STUDY,
    "optimizers": optimizers.STUDY,
    "private": private.STUDY,
    "universality": universality.STUDY,
    "facts": facts.STUDY,
    "associative-memory": associative_memory.STUDY,
    "context-voids": context_voids.STUDY,
}
