"""Plans: which layers keep full attention, how many a budget allows, and what their KV cache takes.

Nothing here runs a model, and nothing knows how the layers of a plan were found.
"""
