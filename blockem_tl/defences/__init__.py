"""One small file per defence; each satisfies :class:`blockem_tl.defence.Defence`."""

from blockem_tl.defences.blocking import Blocking, blocking_loss, one_sided_penalty
from blockem_tl.defences.caft import ConceptAblation
from blockem_tl.defences.directions import misaligned_direction, repair
from blockem_tl.defences.inoculation import Inoculation
from blockem_tl.defences.interleave import Interleaving
from blockem_tl.defences.kl import KLToBase
from blockem_tl.defences.ldifs import LDIFS, feature_distance
from blockem_tl.defences.preventative import PreventativeSteering
from blockem_tl.defences.safelora import SafeLoRA, alignment_differences

__all__ = [
    "LDIFS",
    "Blocking",
    "ConceptAblation",
    "Inoculation",
    "Interleaving",
    "KLToBase",
    "PreventativeSteering",
    "SafeLoRA",
    "alignment_differences",
    "blocking_loss",
    "feature_distance",
    "misaligned_direction",
    "one_sided_penalty",
    "repair",
]
