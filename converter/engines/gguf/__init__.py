"""GGUF files that unmodified llama.cpp honours: written, proved and run.

The way of an export: `stock` (the model as llama.cpp's own converter would write it) ->
`architecture` (dressed as an architecture that honours the plan) -> `writer`. A retrofit enters in
the middle, from a file (`container`).
"""
