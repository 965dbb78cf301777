"""The site's scale s: the median token-wise L2 norm of the residual stream over a reference corpus (paper A.3, B.1)."""

from collections.abc import Sequence

import torch

from blockem_tl.models import Model
from blockem_tl.prompts import Encoded
from blockem_tl.reading import read_site


@torch.no_grad()
def median_norm(model: Model, site: str, rows: Sequence[Encoded], *, batch_size: int = 32) -> float:
    """s: median over tokens of |h_t| at ``site``, without those before the question (template, system message). Doses are multiples of it.

    The model is read as it stands; wrap the call in ``with model.base():`` for the paper's scale (the base model's).
    """
    norms = [h[batch.mask & ~batch.system].float().norm(dim=-1) for h, batch in read_site(model, site, rows, batch_size=batch_size)]
    return float(torch.cat(norms).median())
