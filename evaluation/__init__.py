"""How good a model is and whether its text is its own: metrics, reports, the style report, the originality index."""
