"""What `train.py` is made of: the optimizer step, run folders and checkpoints, metrics, the plan, the one-dial mode."""
