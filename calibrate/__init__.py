"""Run the full-precision pipeline and keep what enters its denoisers."""
