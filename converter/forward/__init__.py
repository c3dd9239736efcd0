"""Many plans of one model in one walk up its layers, nothing computed twice.

Two plans that agree on the lowest layers share the hidden states there, so the walk forks only
where plans part. Rows that no answer depends on are not computed.
"""
