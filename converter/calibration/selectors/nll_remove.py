"""Remove-one: what a full-attention model loses when one layer slides.

D_l = L_ans(all FA, layer l SWA) - L_ans(all FA). The reading of the abstract of arXiv 2606.27791.
"""

from converter.calibration.selectors.switching import single_layer_scorer
from converter.model.mask import FULL

NLL_REMOVE = single_layer_scorer(
    name="nll-remove",
    summary="loss that sliding in one layer adds to the full-attention model",
    others=FULL,
)
