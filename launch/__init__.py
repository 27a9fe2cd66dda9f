"""What runs on a login node: no torch, no deepspeed."""
