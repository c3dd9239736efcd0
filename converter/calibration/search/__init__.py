"""Search for the layers that keep full attention, by true losses.

Each module is one algorithm over an oracle that tells the loss of a set of layers (see
`converter.calibration.search.oracle`); nothing here knows of models. All of them are
deterministic, and among equally good layers or sets the lower layer index wins.
"""
