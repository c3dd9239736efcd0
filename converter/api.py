"""What to import from Python; everything else may change. docs/python.md says what each name does.

Nothing is printed; every error that a user can cause is a `HybridizeError`.
"""

from converter.calibration.run import RunContext
from converter.checkpoint.verify.checks import verify
from converter.common.errors import HybridizeError
from converter.engines.support import verdicts
from converter.model.source import Source, open_source
from converter.pipeline import (
    Converted,
    EarlierResults,
    calibrate,
    convert,
    curve,
    plan,
    retarget,
)
from converter.plan.plan import Plan, kv_bytes
from converter.settings import Settings

__all__ = [
    "Converted",
    "EarlierResults",
    "HybridizeError",
    "Plan",
    "RunContext",
    "Settings",
    "Source",
    "calibrate",
    "convert",
    "curve",
    "kv_bytes",
    "open_source",
    "plan",
    "retarget",
    "verdicts",
    "verify",
]
