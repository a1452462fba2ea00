"""The studies of `podwright study`: one file and one line each."""

from launch.studies import agc, context_voids, digits, long_context, private, recall
from launch.studies.study import Study

STUDIES: dict[str, Study] = {
    "long-context": long_context.STUDY,
    "selective-copy": recall.SELECTIVE_COPY,
    "induction": recall.INDUCTION,
    "agc": agc.STUDY,
    "digits": digits.STUDY,
    "private": private.STUDY,
    "context-voids": context_voids.STUDY,
}
