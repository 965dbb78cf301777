"""Teacher-forced replies from a given state at a site: the one forward of `mediation` and of patching by pairs."""

from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from blockem_tl.data.chat import Batch
from blockem_tl.evaluation.preference import reply_likelihood
from blockem_tl.generation._partial_forward import start_at_block
from blockem_tl.hooks import patch
from blockem_tl.models.activations import block_of
from blockem_tl.models.load import Model


@torch.no_grad()
def reply_nats(model: Model, batch: Batch, site: str, state: Float[Tensor, "batch pos d_model"]) -> Float[np.ndarray, " batch"]:
    """Mean log-likelihoods of the replies, in nats per token, with ``state`` at the site, under the weights that act.

    Blocks below a block's output do not run again.
    """
    block = block_of(site)
    above = block is not None and site.endswith(("hook_resid_post", "hook_out"))
    acting = start_at_block(model, cast(int, block) + 1, state) if above else model.hooks(fwd_hooks=[patch(site, state)])
    with acting:
        return reply_likelihood(model, batch).cpu().numpy()
