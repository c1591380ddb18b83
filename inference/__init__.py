"""From a prompt to text.

`writing` one caller's stream of events · `engine` many callers, one model · `decoder` continuous batching, which both use ·
`quantize` the weights in the form that is fastest to write with · `compiled` the forward step on CPUs: `kernels`, made of
`vectors` · `cuda_graphs` the decode step on NVIDIA GPUs ·
`scoring` how likely a given text is · `terminal` what generate.py prints and reads · `prompts` openings to try.
"""
