"""Weights in files: written so that they survive a crash, read without running code; the averaged and the best ones."""
