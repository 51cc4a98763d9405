"""Train what is left of a pruned denoiser against the whole one."""
