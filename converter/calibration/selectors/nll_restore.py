"""Restore-one: what full attention in one layer brings back to an all-sliding model.

D_l = L_ans(all SWA) - L_ans(all SWA, layer l FA). The score its authors propose
(NLL-guided layer selection, arXiv 2606.27791).
"""

from converter.calibration.selectors.switching import switching_scorer
from converter.model.mask import SLIDING

NLL_RESTORE = switching_scorer(
    name="nll-restore",
    summary="loss that one layer's full attention brings back to the all-sliding model",
    others=SLIDING,
)
