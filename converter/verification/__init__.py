"""Proof that a checkpoint computes its plan."""
