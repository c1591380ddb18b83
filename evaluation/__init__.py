"""How good a model is, and whether its text is its own.

`held_out` the texts · `perplexity` their loss by a sliding window · `metrics` the figures from it, and those of generated
texts · `generated` what the model writes · `style_report` whether styles work · `model_report` all of it for one model ·
`report` as Markdown and as a picture · `originality` passages copied from the training text.
"""
