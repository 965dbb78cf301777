"""One small file per defence; each satisfies :class:`blockem_tl.defence.Defence`."""

from blockem_tl.defences.blocking import Blocking, one_sided_penalty
from blockem_tl.defences.kl import KLToBase

__all__ = ["Blocking", "KLToBase", "one_sided_penalty"]
