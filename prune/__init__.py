"""Take blocks out of a denoiser."""
