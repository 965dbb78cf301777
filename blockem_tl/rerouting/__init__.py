"""Where does a blocked fine-tune move instead? The same tokens, teacher-forced through base, plain and blocked (paper, section 5)."""

from blockem_tl.rerouting.depth import returning_sites, shift_by_site
from blockem_tl.rerouting.latents import Rerouting, diagnose_rerouting

__all__ = ["Rerouting", "diagnose_rerouting", "returning_sites", "shift_by_site"]
