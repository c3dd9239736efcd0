"""Running a model: loading, generating, and the forward pass that many plans share.

What is computed once for several plans, and which tokens a layer may leave out, is decided here
and nowhere else.
"""
