"""GGUF files that unmodified llama.cpp honours: written, proved and run.

The way of an export: `stock` (the model as llama.cpp's own converter would write it) ->
`architecture` (the same under an architecture that honours the plan) -> `writer`. A retrofit enters
in the middle, from a file (`container`).
"""

# Types that are written tensor by tensor, and those that llama.cpp's quantiser makes.
WRITTEN = ("f32", "f16", "bf16", "q8_0")
QUANTISED = (
    *("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m"),
    *("q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"),
)
TYPES = (*WRITTEN, *QUANTISED)
