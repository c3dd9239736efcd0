"""Restore-one: what full attention in one layer brings back to an all-sliding model.

D_l = L_ans(all SWA) - L_ans(all SWA, layer l FA). The score its authors propose
(NLL-guided layer selection, arXiv 2606.27791).
"""

from converter.calibration.selectors.switching import single_layer_scorer
from converter.model.mask import SLIDING

NLL_RESTORE = single_layer_scorer(
    name="nll-restore",
    summary="loss that one layer's full attention brings back to the all-sliding model",
    others=SLIDING,
)
